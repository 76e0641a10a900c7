//! Lower bounds on the largest GPU load: what no placement can beat.

use crate::balance::water_fill;

/// The largest of four bounds for `slots` replica slots, `slots / n_gpus` on each GPU:
///
/// * the mean;
/// * the largest replica when replicas are dealt so that it is least, beside the smallest possible replicas;
/// * without replicas, a pigeonhole: among the `j * n_gpus + 1` largest experts, some GPU holds `j + 1`;
/// * without replicas, the same taken with the smallest experts that fill the GPU's other slots.
pub fn lower_bound(load: &[f64], n_gpus: usize, slots: usize) -> f64 {
    let per_gpu = slots / n_gpus.max(1);
    let mean = load.iter().sum::<f64>() / n_gpus.max(1) as f64;
    if load.is_empty() || per_gpu == 0 {
        return mean;
    }
    let mut bound = mean;
    if slots > load.len() {
        let count = water_fill(load, slots);
        let peak = (0..load.len()).map(|e| load[e] / count[e] as f64).fold(0.0, f64::max);
        let most = (slots - load.len() + 1) as f64;
        let least = load.iter().map(|l| l / most).fold(f64::INFINITY, f64::min);
        return bound.max(peak + (per_gpu - 1) as f64 * least);
    }
    let mut falling = load.to_vec();
    falling.sort_by(|a, b| b.total_cmp(a));
    for j in 0..per_gpu {
        let top = j * n_gpus + 1;
        let crowded: f64 = falling[top - j - 1..top].iter().sum();
        let rest: f64 = falling[falling.len() - (per_gpu - j - 1)..].iter().sum();
        bound = bound.max(crowded + rest);
    }
    bound
}
