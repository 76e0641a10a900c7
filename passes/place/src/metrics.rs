//! What a routing trace says: evenness, local consistency, affinity, co-activation.
//!
//! Functions on slices take ids as row-major `[tokens, top_k]`, -1 for an unused slot; [`report`] measures all
//! layers of a [`Trace`].

use crate::error::{Code, PlaceError};
use crate::layout::max_over_mean;
use crate::trace::Trace;
use serde::Serialize;

/// Checks ids and returns tokens.
fn checked(ids: &[i64], top_k: usize, experts: usize) -> Result<usize, PlaceError> {
    let tokens = ids.len().checked_div(top_k).unwrap_or(0);
    if tokens == 0 || tokens * top_k != ids.len() {
        return Err(PlaceError::new(
            Code::Ragged,
            format!("{} ids are not rows of {top_k}", ids.len()),
            "give ids as row-major [tokens, top_k] with at least one token",
        ));
    }
    match ids.iter().find(|&&id| id < -1 || id >= experts as i64) {
        Some(id) => Err(PlaceError::new(
            Code::BadTrace,
            format!("expert id {id} of {experts} experts"),
            "ids lie between 0 and the number of experts, or are -1 for an unused slot",
        )),
        None => Ok(tokens),
    }
}

fn used(row: &[i64]) -> impl Iterator<Item = usize> + Clone {
    row.iter().filter(|&&id| id >= 0).map(|&id| id as usize)
}

/// Segment Routing best Performance for windows of `window` tokens (arXiv 2505.16056).
///
/// For every window and expert, `c` tokens of the window use the expert. The best F1, over a threshold on `c`,
/// of predicting "the expert is used by the whole window". 1 for a constant trace.
///
/// # Errors
/// Ids out of range, or a window that is zero or longer than the trace.
pub fn srp(ids: &[i64], top_k: usize, experts: usize, window: usize) -> Result<f64, PlaceError> {
    let tokens = checked(ids, top_k, experts)?;
    check_window(window, tokens)?;
    // How many (window, expert) pairs have each count.
    let mut pairs = vec![0_u64; window + 1];
    let mut count = vec![0_usize; experts];
    let rows: Vec<Vec<usize>> = ids.chunks(top_k).map(distinct).collect();
    for (end, row) in rows.iter().enumerate() {
        row.iter().for_each(|&e| count[e] += 1);
        if end >= window {
            rows[end - window].iter().for_each(|&e| count[e] -= 1);
        }
        if end + 1 >= window {
            count.iter().for_each(|&c| pairs[c] += 1);
        }
    }
    let all: u64 = pairs.iter().enumerate().map(|(c, n)| c as u64 * n).sum();
    let (mut hits, mut predicted, mut best) = (0_u64, 0_u64, 0.0_f64);
    for threshold in (1..=window).rev() {
        hits += threshold as u64 * pairs[threshold];
        predicted += pairs[threshold];
        let denominator = (predicted * window as u64 + all).max(1);
        best = best.max(2.0 * hits as f64 / denominator as f64);
    }
    Ok(best)
}

fn distinct(row: &[i64]) -> Vec<usize> {
    let mut experts: Vec<usize> = used(row).collect();
    experts.sort_unstable();
    experts.dedup();
    experts
}

fn check_window(window: usize, tokens: usize) -> Result<(), PlaceError> {
    if (1..=tokens).contains(&window) {
        return Ok(());
    }
    Err(PlaceError::new(
        Code::BadOption,
        format!("a window of {window} tokens in a trace of {tokens}"),
        format!("the window lies between 1 and {tokens}"),
    ))
}

/// Segment Cache best Hit rate, per aligned segment: an upper bound (arXiv 2505.16056, simplified).
///
/// In each segment of `segment` tokens the cache holds the `size` most used experts of that segment.
///
/// # Errors
/// Ids out of range, or a segment of zero tokens.
pub fn sch(ids: &[i64], top_k: usize, experts: usize, segment: usize, size: usize) -> Result<f64, PlaceError> {
    checked(ids, top_k, experts)?;
    check_window(segment, usize::MAX)?;
    let (mut hits, mut all) = (0_u64, 0_u64);
    for rows in ids.chunks(segment.saturating_mul(top_k)) {
        let mut count = vec![0_u64; experts];
        used(rows).for_each(|e| count[e] += 1);
        count.sort_unstable_by(|a, b| b.cmp(a));
        hits += count.iter().take(size).sum::<u64>();
        all += count.iter().sum::<u64>();
    }
    Ok(hits as f64 / all.max(1) as f64)
}

/// Segment Cache best Hit rate as the paper runs it: one cache over the trace, evicting the expert least used
/// in the next `lookahead` tokens (arXiv 2505.16056).
///
/// A used expert that is not cached is a miss and enters the cache; ties evict the lower expert.
///
/// # Errors
/// Ids out of range, or a lookahead or size of zero.
pub fn sch_online(ids: &[i64], top_k: usize, experts: usize, lookahead: usize, size: usize) -> Result<f64, PlaceError> {
    checked(ids, top_k, experts)?;
    check_window(lookahead, usize::MAX)?;
    check_window(size, usize::MAX)?;
    let rows: Vec<Vec<usize>> = ids.chunks(top_k).map(distinct).collect();
    let mut next = vec![0_i64; experts];
    rows.iter().take(lookahead).flatten().for_each(|&e| next[e] += 1);
    let mut cached = vec![false; experts];
    let (mut held, mut hits, mut all) = (0_usize, 0_u64, 0_u64);
    for (token, row) in rows.iter().enumerate() {
        // The window ahead starts after this token.
        row.iter().for_each(|&e| next[e] -= 1);
        if let Some(entering) = token.checked_add(lookahead).and_then(|end| rows.get(end)) {
            entering.iter().for_each(|&e| next[e] += 1);
        }
        all += row.len() as u64;
        hits += row.iter().filter(|&&e| cached[e]).count() as u64;
        for &e in row {
            if cached[e] {
                continue;
            }
            cached[e] = true;
            held += 1;
            if held > size {
                let kept = |x: &usize| cached[*x] && (*x != e);
                let victim = (0..experts).filter(kept).min_by_key(|&x| next[x]).unwrap_or(e);
                cached[victim] = false;
                held -= 1;
            }
        }
    }
    Ok(hits as f64 / all.max(1) as f64)
}

/// Inter-layer affinity: `[a * experts + b]` is the share of the transitions from expert `a` of one layer that
/// go to expert `b` of the next (arXiv 2401.08383). Rows of unused experts are zero.
///
/// # Errors
/// Ids out of range, or layers with different numbers of tokens.
pub fn affinity(first: (&[i64], usize), second: (&[i64], usize), experts: usize) -> Result<Vec<f64>, PlaceError> {
    let tokens = checked(first.0, first.1, experts)?;
    if checked(second.0, second.1, experts)? != tokens {
        return Err(PlaceError::new(
            Code::Ragged,
            format!("{tokens} tokens in one layer, {} in the next", second.0.len() / second.1),
            "record the same tokens in both layers",
        ));
    }
    let mut share = vec![0.0; experts * experts];
    for (row, next) in first.0.chunks(first.1).zip(second.0.chunks(second.1)) {
        for a in used(row) {
            used(next).for_each(|b| share[a * experts + b] += 1.0);
        }
    }
    for row in share.chunks_mut(experts) {
        let total = row.iter().sum::<f64>().max(1.0);
        row.iter_mut().for_each(|n| *n /= total);
    }
    Ok(share)
}

/// Share of all choices that each expert got.
///
/// # Errors
/// Ids out of range.
pub fn usage(ids: &[i64], top_k: usize, experts: usize) -> Result<Vec<f64>, PlaceError> {
    checked(ids, top_k, experts)?;
    let mut count = vec![0.0; experts];
    used(ids).for_each(|e| count[e] += 1.0);
    let total = count.iter().sum::<f64>().max(1.0);
    Ok(count.into_iter().map(|n| n / total).collect())
}

/// Tokens of one layer that use both experts of a pair; the diagonal counts the tokens of each expert.
pub fn coactivation(trace: &Trace, layer: usize) -> Vec<Vec<i64>> {
    let mut together = vec![vec![0; trace.experts()]; trace.experts()];
    for token in 0..trace.tokens() {
        for a in trace.routed(token, layer) {
            trace.routed(token, layer).for_each(|b| together[a][b] += 1);
        }
    }
    together
}

/// Metrics of one layer; serialises with these keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerMetrics {
    /// Tokens per expert.
    pub load: Vec<u64>,
    /// Largest expert load over the mean.
    pub expert_max_over_mean: f64,
    /// Segment Routing best Performance; `None` where the trace is shorter than the window.
    pub srp: Option<f64>,
    /// Cache hit rate per aligned segment, cache of twice the active experts.
    pub sch: f64,
    /// Cache hit rate of one running cache with lookahead, same size.
    pub sch_online: f64,
    /// Largest share of transitions from one expert to one expert of the next layer, averaged over tokens.
    pub affinity_to_next: Option<f64>,
    /// The pairs of experts used together most often: `(a, b, tokens)`, at most 16.
    pub coactivated: Vec<(usize, usize, i64)>,
}

/// Window of [`report`], in tokens: the one the paper reports.
pub const WINDOW: usize = 16;

/// Metrics of all layers of a trace.
///
/// # Errors
/// None for a trace that was read, but the slice functions it uses check again.
pub fn report(trace: &Trace) -> Result<Vec<LayerMetrics>, PlaceError> {
    (0..trace.layers()).map(|layer| layer_metrics(trace, layer)).collect()
}

fn layer_metrics(trace: &Trace, layer: usize) -> Result<LayerMetrics, PlaceError> {
    let (top_k, experts) = (trace.top_k(), trace.experts());
    let ids = trace.layer_ids(layer);
    let together = coactivation(trace, layer);
    let load: Vec<u64> = (0..experts).map(|e| together[e][e] as u64).collect();
    let as_f64: Vec<f64> = load.iter().map(|&n| n as f64).collect();
    let size = 2 * top_k;
    let affinity_to_next = if layer + 1 < trace.layers() {
        let next = trace.layer_ids(layer + 1);
        let share = affinity((&ids, top_k), (&next, top_k), experts)?;
        let top = |row: &[f64]| row.iter().copied().fold(0.0, f64::max);
        let total: f64 = as_f64.iter().sum::<f64>().max(1.0);
        Some(share.chunks(experts).zip(&as_f64).map(|(row, n)| top(row) * n / total).sum())
    } else {
        None
    };
    let mut coactivated: Vec<(usize, usize, i64)> = Vec::new();
    for (a, row) in together.iter().enumerate() {
        coactivated.extend(row.iter().enumerate().skip(a + 1).filter(|(_, n)| **n > 0).map(|(b, &n)| (a, b, n)));
    }
    coactivated.sort_by_key(|&(a, b, n)| (std::cmp::Reverse(n), a, b));
    coactivated.truncate(16);
    Ok(LayerMetrics {
        load,
        expert_max_over_mean: max_over_mean(&as_f64),
        srp: if trace.tokens() < WINDOW { None } else { Some(srp(&ids, top_k, experts, WINDOW)?) },
        sch: sch(&ids, top_k, experts, WINDOW, size)?,
        sch_online: sch_online(&ids, top_k, experts, WINDOW, size)?,
        affinity_to_next,
        coactivated,
    })
}
