//! Small computations of a training or decoding host, beside the kernels.
//!
//! Inputs are plain row-major slices of `f64`; sizes are checked, and a mismatch is a [`PlaceError`].

use crate::error::{Code, PlaceError};
use std::collections::BTreeMap;
use std::ops::Range;

fn sized(what: &str, found: usize, wanted: Option<usize>) -> Result<(), PlaceError> {
    match wanted {
        Some(wanted) if wanted == found && found > 0 => Ok(()),
        _ => Err(PlaceError::new(
            Code::Ragged,
            format!("{what} has {found} values"),
            format!("its shape needs {}", wanted.map_or("a smaller size".into(), |n| n.max(1).to_string())),
        )),
    }
}

/// Rows of softmax over `width` columns.
pub fn softmax(logits: &[f64], width: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(logits.len());
    for row in logits.chunks(width.max(1)) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let max = if max.is_finite() { max } else { 0.0 };
        let exp: Vec<f64> = row.iter().map(|z| (z - max).exp()).collect();
        let sum: f64 = exp.iter().sum();
        out.extend(exp.iter().map(|e| e / sum));
    }
    out
}

/// The `k` largest columns of each row, best first; equal scores go to the lower column, NaN ranks last.
pub fn top_k(scores: &[f64], width: usize, k: usize) -> Vec<i64> {
    let mut out = Vec::new();
    for row in scores.chunks(width.max(1)) {
        let key = |&e: &usize| if row[e].is_nan() { f64::NEG_INFINITY } else { row[e] };
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*a].is_nan().cmp(&row[*b].is_nan()).then(key(b).total_cmp(&key(a))));
        out.extend(order.into_iter().take(k).map(|e| e as i64));
    }
    out
}

/// Token ranges of `n` micro-batches of `tokens` tokens, as even as they can be.
pub fn micro_batches(tokens: usize, n: usize) -> Vec<Range<usize>> {
    let n = n.max(1);
    (0..n).map(|i| i * tokens / n..(i + 1) * tokens / n).filter(|r| !r.is_empty()).collect()
}

/// The two forms of the load-balance loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadBalanceLoss {
    /// Mean over micro-batches, each with its own choice frequencies.
    pub micro: f64,
    /// Mean over micro-batches, with the choice frequencies of the global batch.
    pub global: f64,
}

/// Load-balance loss per micro-batch and over the global batch (arXiv 2501.11873).
///
/// `experts * sum_e f_e p_e`: `f_e` the share of choices of expert `e` (summing to 1), `p_e` the mean of its
/// router probability. `probs` is `[tokens, experts]`, `ids` is `[tokens, top_k]`; `micro` are token ranges.
/// The frequencies of the global batch are the mean of those of its micro-batches, as every rank reduces them.
///
/// # Errors
/// Sizes that do not fit, ids out of range, or an empty micro-batch.
pub fn load_balance_loss(
    probs: &[f64],
    experts: usize,
    ids: &[i64],
    top_k: usize,
    micro: &[Range<usize>],
) -> Result<LoadBalanceLoss, PlaceError> {
    let tokens = probs.len().checked_div(experts).unwrap_or(0);
    sized("probs", probs.len(), tokens.checked_mul(experts))?;
    sized("ids", ids.len(), tokens.checked_mul(top_k))?;
    if micro.is_empty() || micro.iter().any(|r| r.is_empty() || r.end > tokens) {
        return Err(PlaceError::new(
            Code::BadOption,
            format!("micro-batches {micro:?} of {tokens} tokens"),
            "give at least one range; none may be empty or pass the end",
        ));
    }
    if let Some(id) = ids.iter().find(|&&id| !(0..experts as i64).contains(&id)) {
        return Err(PlaceError::new(
            Code::BadTrace,
            format!("expert id {id} of {experts} experts"),
            "every slot names an expert",
        ));
    }
    let frequencies = |range: &Range<usize>| {
        let chosen = &ids[range.start * top_k..range.end * top_k];
        let mut share = vec![0.0; experts];
        chosen.iter().for_each(|&id| share[id as usize] += 1.0 / chosen.len() as f64);
        share
    };
    let means = |range: &Range<usize>| {
        let mut mean = vec![0.0; experts];
        for row in probs[range.start * experts..range.end * experts].chunks(experts) {
            mean.iter_mut().zip(row).for_each(|(m, p)| *m += p / range.len() as f64);
        }
        mean
    };
    let loss = |f: &[f64], p: &[f64]| experts as f64 * f.iter().zip(p).map(|(f, p)| f * p).sum::<f64>();
    let f: Vec<Vec<f64>> = micro.iter().map(frequencies).collect();
    let p: Vec<Vec<f64>> = micro.iter().map(means).collect();
    let n = micro.len() as f64;
    let of_all: Vec<f64> = (0..experts).map(|e| f.iter().map(|row| row[e]).sum::<f64>() / n).collect();
    Ok(LoadBalanceLoss {
        micro: f.iter().zip(&p).map(|(f, p)| loss(f, p)).sum::<f64>() / n,
        global: p.iter().map(|p| loss(&of_all, p)).sum::<f64>() / n,
    })
}

/// Next-token scores by self-contrast (SCMoE, arXiv 2405.14507); serialising is up to the caller.
#[derive(Clone, Debug, PartialEq)]
pub struct Contrast {
    /// `(1 + beta) strong - beta weak`, negative infinity where the token is masked.
    pub scores: Vec<f64>,
    /// Whether each token is kept.
    pub kept: Vec<bool>,
    /// Best token of each row, the lower one on a tie.
    pub next_token: Vec<usize>,
}

/// Contrasts the logits of a strong and a weak activation of one model: `[rows, vocabulary]` each.
///
/// Tokens with `strong < log(alpha) + max(strong)` are masked. The paper uses alpha 0.1 and beta 0.5.
///
/// # Errors
/// Sizes that do not fit, or alpha outside 0 to 1.
pub fn self_contrast(
    strong: &[f64],
    weak: &[f64],
    vocabulary: usize,
    alpha: f64,
    beta: f64,
) -> Result<Contrast, PlaceError> {
    let rows = strong.len().checked_div(vocabulary).unwrap_or(0);
    sized("strong", strong.len(), rows.checked_mul(vocabulary))?;
    sized("weak", weak.len(), Some(strong.len()))?;
    if !(alpha > 0.0 && alpha <= 1.0 && beta.is_finite()) {
        return Err(PlaceError::new(
            Code::BadOption,
            format!("alpha is {alpha}, beta is {beta}"),
            "alpha lies above 0 and up to 1 (0.1 in the paper), beta is finite (0.5)",
        ));
    }
    let mut out = Contrast {
        scores: Vec::with_capacity(strong.len()),
        kept: Vec::with_capacity(strong.len()),
        next_token: Vec::with_capacity(rows),
    };
    for (s, w) in strong.chunks(vocabulary).zip(weak.chunks(vocabulary)) {
        let floor = alpha.ln() + s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let score = |(&s, &w): (&f64, &f64)| {
            if s < floor { f64::NEG_INFINITY } else { (1.0 + beta) * s - beta * w }
        };
        let row: Vec<f64> = s.iter().zip(w).map(score).collect();
        out.kept.extend(row.iter().map(|z| z.is_finite()));
        out.next_token.push((0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }));
        out.scores.extend(row);
    }
    Ok(out)
}

/// Tokens of one expert after compression; see [`lsh_moe`].
#[derive(Clone, Debug, PartialEq)]
pub struct Compressed {
    /// `expert(centroid) + (x - centroid)`, `[tokens, width]`.
    pub output: Vec<f64>,
    /// Bucket of each token, numbered in the order of the keys.
    pub buckets: Vec<usize>,
    /// Means of the buckets, `[buckets, width]`: what is sent.
    pub centroids: Vec<f64>,
}

/// Compresses the tokens of one expert by locality-sensitive hashing (LSH-MoE, arXiv 2411.08446).
///
/// Cross-polytope hash: for each rotation `[width, width]`, the column of the largest `|R x|` with its sign.
/// Tokens with the same key share a bucket, whose mean goes to the expert; residuals are added back. Lossy:
/// exact only where all tokens of a bucket are equal. `expert` maps one row to one row of the same width.
///
/// # Errors
/// Sizes that do not fit.
pub fn lsh_moe(
    x: &[f64],
    width: usize,
    rotations: &[&[f64]],
    expert: impl Fn(&[f64]) -> Vec<f64>,
) -> Result<Compressed, PlaceError> {
    let tokens = x.len().checked_div(width).unwrap_or(0);
    sized("x", x.len(), tokens.checked_mul(width))?;
    for rotation in rotations {
        sized("a rotation", rotation.len(), width.checked_mul(width))?;
    }
    let hash = |row: &[f64], rotation: &[f64]| -> i64 {
        let turned = rotation.chunks(width).map(|r| r.iter().zip(row).map(|(a, b)| a * b).sum::<f64>());
        let best =
            turned.enumerate().fold((0, 0.0_f64), |best, (i, z)| if z.abs() > best.1.abs() { (i, z) } else { best });
        let id = best.0 as i64 + 1;
        if best.1 >= 0.0 { id } else { -id }
    };
    let mut members: BTreeMap<Vec<i64>, Vec<usize>> = BTreeMap::new();
    for (token, row) in x.chunks(width).enumerate() {
        let key = rotations.iter().map(|rotation| hash(row, rotation)).collect();
        members.entry(key).or_default().push(token);
    }
    let mut out = Compressed {
        output: vec![0.0; x.len()],
        buckets: vec![0; tokens],
        centroids: Vec::with_capacity(members.len() * width),
    };
    for (bucket, tokens) in members.values().enumerate() {
        let mut centroid = vec![0.0; width];
        for &token in tokens {
            let row = &x[token * width..(token + 1) * width];
            centroid.iter_mut().zip(row).for_each(|(c, v)| *c += v / tokens.len() as f64);
        }
        let computed = expert(&centroid);
        sized("the expert's output", computed.len(), Some(width))?;
        for &token in tokens {
            out.buckets[token] = bucket;
            for i in 0..width {
                out.output[token * width + i] = computed[i] + (x[token * width + i] - centroid[i]);
            }
        }
        out.centroids.extend(centroid);
    }
    Ok(out)
}

/// A gated feed-forward expert, `down (silu(gate x) * (up x))`; matrices are `[out, in]`.
///
/// # Errors
/// Sizes that do not fit a row of `width`.
pub fn glu<'a>(
    width: usize,
    gate: &'a [f64],
    up: &'a [f64],
    down: &'a [f64],
) -> Result<impl Fn(&[f64]) -> Vec<f64> + 'a, PlaceError> {
    let hidden = gate.len().checked_div(width).unwrap_or(0);
    sized("gate", gate.len(), hidden.checked_mul(width))?;
    sized("up", up.len(), Some(gate.len()))?;
    sized("down", down.len(), Some(gate.len()))?;
    let times = |matrix: &[f64], x: &[f64]| -> Vec<f64> {
        matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    Ok(move |x: &[f64]| {
        let (g, u) = (times(gate, x), times(up, x));
        let h: Vec<f64> = g.iter().zip(&u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        times(down, &h)
    })
}
