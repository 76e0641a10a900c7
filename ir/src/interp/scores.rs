//! Changes of scores: additions, masks, transport plans.

use super::{
    Array, Failure, Rounding, Step, Value,
    select::order,
    value::{for_each_index, last_axis, size, strides, tensor},
    weights::Fetch,
};
use crate::ops::{Adjust, Transport};

const FORBIDDEN: f64 = f64::NEG_INFINITY;
const FORCED: f64 = f64::INFINITY;

pub(super) fn adjust(op: &Adjust, operands: &[&Value], w: &Fetch<'_>, tokens: Option<u64>) -> Step<Value> {
    let scores = last_axis(operands, 0)?;
    let (rows, experts) = (scores.count, scores.width);
    let mut s = scores.data;
    if let Some(add) = &op.add {
        let add = w.matrix(add)?.data;
        for (i, v) in s.iter_mut().enumerate() {
            *v += add[i % experts];
        }
    }
    if let Some(classes) = &op.class_experts {
        let class = tensor(operands, 1)?;
        for (row, class) in class.ints().unwrap_or_default().iter().enumerate() {
            let allowed = classes
                .iter()
                .find(|(name, _)| name.parse() == Ok(*class))
                .map(|(_, ids)| ids)
                .ok_or_else(|| Failure(format!("class {class} of row {row} is not in `class_experts`")))?;
            for e in 0..experts {
                if !allowed.contains(&(e as u64)) {
                    s[row * experts + e] = FORBIDDEN;
                }
            }
        }
    }
    if op.mask {
        forbid_masked(&mut s, &[rows, experts], tensor(operands, operands.len() - 1)?);
    }
    for row in 0..rows {
        for e in &op.off {
            s[row * experts + size(*e)?] = FORBIDDEN;
        }
        for e in &op.on {
            s[row * experts + size(*e)?] = FORCED;
        }
    }
    if let Some(block) = op.causal_block {
        let tokens =
            op.tokens.or(tokens).ok_or_else(|| Failure("`tokens` is not given, and no input tells T".into()))?;
        causal(&mut s, experts, size(block)?, size(tokens)?)?;
    }
    Ok(Value::Tensor(Array::f64(vec![rows, experts], s)))
}

/// Where the mask, repeated as needed, is not above 0.
fn forbid_masked(s: &mut [f64], shape: &[usize], mask: &Array) {
    let values = mask.floats();
    let steps = strides(&mask.shape);
    let skip = shape.len() - mask.shape.len();
    let mut at = 0;
    for_each_index(shape, |index| {
        let place: usize = index[skip..]
            .iter()
            .zip(&mask.shape)
            .zip(&steps)
            .map(|((i, n), step)| if *n == 1 { 0 } else { i * step })
            .sum();
        let open = values[place] > 0.0;
        if !open {
            s[at] = FORBIDDEN;
        }
        at += 1;
    });
}

/// Row `h*T + t` forces its own block and forbids later ones.
fn causal(s: &mut [f64], blocks: usize, block: usize, tokens: usize) -> Step<()> {
    for row in 0..s.len().checked_div(blocks).unwrap_or(0) {
        let own = (row % tokens) / block;
        if own >= blocks {
            return Err(Failure(format!("row {row} lies in block {own} of {blocks}")));
        }
        let line = &mut s[row * blocks..(row + 1) * blocks];
        line[own + 1..].fill(FORBIDDEN);
        line[own] = FORCED;
    }
    Ok(())
}

pub(super) fn transport(op: &Transport, operands: &[&Value], rounding: Rounding) -> Step<Value> {
    let scores = last_axis(operands, 0)?;
    let (m, n) = (scores.count, scores.width);
    let plan = match op {
        Transport::Sinkhorn { xi, iters } => sinkhorn(&scores.data, m, n, (*xi, *iters), rounding),
        Transport::Sparse { capacity, gamma, steps, eta } => {
            let cost: Vec<f64> = scores.data.iter().map(|v| -v).collect();
            sparse(&cost, [m, n, size((*capacity).min(m as u64))?], *gamma, (*steps, *eta), rounding)
        }
    };
    Ok(Value::Tensor(Array::f64(vec![m, n], plan)))
}

/// What an iteration hands to its next step, at place `at`.
fn carried(value: f64, at: usize, rounding: Rounding) -> f64 {
    let Rounding::Single(seed) = rounding else { return value };
    #[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
    let near = value as f32;
    let mixed = (seed ^ value.to_bits() ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    f64::from(match (mixed >> 32) % 3 {
        0 if seed > 0 => near.next_down(),
        1 if seed > 0 => near.next_up(),
        _ => near,
    })
}

/// Entropic transport with row sums 1 and column sums `m / n`.
fn sinkhorn(c: &[f64], m: usize, n: usize, (xi, iters): (f64, u64), rounding: Rounding) -> Vec<f64> {
    let top = c.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let kernel: Vec<f64> = c.iter().map(|v| ((v - top) / xi).exp()).collect();
    let (mut u, mut v) = (vec![1.0; m], vec![1.0; n]);
    for _ in 0..iters {
        for (j, v) in v.iter_mut().enumerate() {
            *v = carried((m as f64 / n as f64) / (0..m).map(|i| kernel[i * n + j] * u[i]).sum::<f64>(), j, rounding);
        }
        for (i, u) in u.iter_mut().enumerate() {
            *u = carried(1.0 / (0..n).map(|j| kernel[i * n + j] * v[j]).sum::<f64>(), m + i, rounding);
        }
    }
    (0..m * n).map(|at| u[at / n] * kernel[at] * v[at % n]).collect()
}

/// Semi-dual of `min <T, C> + gamma/2 |T|^2` with row sums `n / m` and column sums 1, at most
/// `capacity` nonzeros in a column, by plain gradient ascent.
fn sparse(
    c: &[f64],
    [m, n, capacity]: [usize; 3],
    gamma: f64,
    (steps, eta): (u64, f64),
    rounding: Rounding,
) -> Vec<f64> {
    let mut alpha = vec![0.0; m];
    let columns = |alpha: &[f64]| {
        let mut plan = vec![0.0; m * n];
        for j in 0..n {
            let s: Vec<f64> = (0..m).map(|i| alpha[i] - c[i * n + j]).collect();
            let kept: Vec<usize> = order(&s).into_iter().take(capacity).collect();
            let scaled: Vec<f64> = kept.iter().map(|i| s[*i] / gamma).collect();
            for (i, share) in kept.iter().zip(to_simplex(&scaled)) {
                plan[i * n + j] = share;
            }
        }
        plan
    };
    for _ in 0..steps {
        let plan = columns(&alpha);
        for (i, a) in alpha.iter_mut().enumerate() {
            *a = carried(*a + eta * (n as f64 / m as f64 - plan[i * n..(i + 1) * n].iter().sum::<f64>()), i, rounding);
        }
    }
    columns(&alpha)
}

/// The nearest point with entries from 0 up and sum 1.
fn to_simplex(v: &[f64]) -> Vec<f64> {
    let mut falling = v.to_vec();
    falling.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut shift) = (0.0, 0.0);
    for (i, u) in falling.iter().enumerate() {
        sum += u;
        let excess = (sum - 1.0) / (i as f64 + 1.0);
        if u - excess > 0.0 {
            shift = excess;
        }
    }
    v.iter().map(|x| (x - shift).max(0.0)).collect()
}
