//! Pipeline schedules: idle time and activations in flight.
//!
//! Formulas of arXiv 2104.04473 (interleaving) and of DeepSeek-V3 (arXiv 2412.19437,
//! table 2), where `F`, `B`, `W` are the forward, whole backward and weight-gradient
//! times of a stage: 1F1B `(P-1)(F+B)`, ZB1P `(P-1)(F+B-2W)`,
//! DualPipe `(P/2-1)(F&B+B-3W)`.

use crate::choice::Schedule;
use serde::Serialize;

/// Times of a stage for one micro-batch, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageTimes {
    /// Forward.
    pub forward: f64,
    /// Backward, with recomputation.
    pub backward: f64,
    /// Weight-gradient part of the backward pass.
    pub weight_gradient: f64,
}

impl StageTimes {
    /// Forward and backward.
    pub fn total(&self) -> f64 {
        self.forward + self.backward
    }
}

/// Seconds the slowest stage idles per step: it waits while the first micro-batch passes through the others
/// and the last one returns through them. `t` is their mean, not the slowest stage itself.
pub fn bubble_seconds(schedule: Schedule, stages: u64, virtual_stages: u64, t: StageTimes) -> f64 {
    let p = stages as f64;
    if stages <= 1 {
        return 0.0;
    }
    let both = t.total();
    match schedule {
        Schedule::OneForwardOneBackward => (p - 1.0) * both / virtual_stages as f64,
        Schedule::ZeroBubble => (p - 1.0) * (both - 2.0 * t.weight_gradient).max(0.0),
        // An overlapped forward and backward pair takes at least as long as the longer of both.
        Schedule::DualPipe => (p / 2.0 - 1.0).max(0.0) * (both + t.backward - 3.0 * t.weight_gradient).max(0.0),
    }
}

/// Micro-batches whose activations stage `stage` holds, in units of a whole stage: those it has read before the
/// first backward pass reaches it, and the one it computes.
pub fn in_flight(schedule: Schedule, stages: u64, virtual_stages: u64, micro_batches: u64, stage: u64) -> f64 {
    let after = (stages - 1 - stage.min(stages - 1)) as f64;
    let (p, v) = (stages as f64, virtual_stages as f64);
    let limit = match schedule {
        Schedule::OneForwardOneBackward if virtual_stages > 1 => (2.0 * after + (v - 1.0) * p + 1.0) / v,
        Schedule::OneForwardOneBackward | Schedule::ZeroBubble => after + 1.0,
        Schedule::DualPipe => p + 1.0,
    };
    limit.min(micro_batches as f64)
}

/// Copies of the weights a rank keeps.
pub fn weight_copies(schedule: Schedule) -> f64 {
    match schedule {
        Schedule::OneForwardOneBackward | Schedule::ZeroBubble => 1.0,
        Schedule::DualPipe => 2.0,
    }
}

/// Layers of every stage when `layers` are spread over `stages x virtual_stages` chunks.
///
/// Chunk `c` belongs to stage `c % stages`; earlier chunks get the larger share, so
/// that the last one, which also holds the output projection, is never larger.
pub fn stage_layers(layers: usize, stages: u64, virtual_stages: u64) -> Vec<Vec<std::ops::Range<usize>>> {
    let chunks = (stages * virtual_stages) as usize;
    let mut all = vec![Vec::new(); stages as usize];
    let mut next = 0;
    for chunk in 0..chunks {
        let size = (layers - next).div_ceil(chunks - chunk);
        all[chunk % stages as usize].push(next..next + size);
        next += size;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: StageTimes = StageTimes { forward: 1.0, backward: 2.0, weight_gradient: 1.0 };

    #[test]
    fn bubbles_follow_the_published_formulas() {
        assert_eq!(bubble_seconds(Schedule::OneForwardOneBackward, 8, 1, T), 21.0);
        assert_eq!(bubble_seconds(Schedule::OneForwardOneBackward, 8, 7, T), 3.0);
        assert_eq!(bubble_seconds(Schedule::ZeroBubble, 8, 1, T), 7.0);
        assert_eq!(bubble_seconds(Schedule::DualPipe, 8, 1, T), 6.0);
        assert_eq!(bubble_seconds(Schedule::DualPipe, 1, 1, T), 0.0);
    }

    #[test]
    fn stages_hold_what_is_read_before_the_first_backward_pass() {
        // arXiv 2104.04473, section 2.2: a stage of four keeps 4, 3, 2, 1 micro-batches; interleaved a little more.
        let held = |v| (0..4).map(|s| in_flight(Schedule::OneForwardOneBackward, 4, v, 64, s)).collect::<Vec<_>>();
        assert_eq!(held(1), [4.0, 3.0, 2.0, 1.0]);
        assert_eq!(held(2), [5.5, 4.5, 3.5, 2.5]);
        assert_eq!(in_flight(Schedule::OneForwardOneBackward, 4, 2, 2, 0), 2.0);
        assert_eq!(in_flight(Schedule::DualPipe, 4, 1, 64, 3), 5.0);
    }

    #[test]
    fn every_layer_is_in_one_chunk() {
        for (layers, pp, vpp) in [(61, 8, 4), (56, 8, 7), (5, 4, 2), (3, 4, 1)] {
            let mut seen: Vec<usize> = stage_layers(layers, pp, vpp).into_iter().flatten().flatten().collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..layers).collect::<Vec<_>>());
        }
    }
}
