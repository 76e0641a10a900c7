//! Pipeline schedules as blocks in time: which micro-batch every rank works on, and when it waits.
//!
//! The blocks follow from what each schedule allows, not from its formula: a rank starts the block that can start
//! first, a backward pass before a forward pass before the gradient of weights, and holds no more micro-batches than
//! the schedule permits. Interleaved chunks run in Megatron's fixed order (arXiv 2104.04473, section 2.2). Transfers
//! take no time here.

use crate::{choice::Schedule, pipeline::StageTimes};
use std::collections::BTreeMap;

/// What a block computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// Backward; where weights' gradients are apart, of the input only.
    Backward,
    /// Forward.
    Forward,
    /// Gradient of the weights, where the schedule computes it apart.
    Weight,
}

/// One block of a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block {
    /// Pipeline rank.
    pub rank: usize,
    /// What it computes.
    pub pass: Pass,
    /// Micro-batch.
    pub micro_batch: usize,
    /// Virtual stage of the rank, or the direction of DualPipe.
    pub chunk: usize,
    /// Seconds from the start of the step.
    pub start: f64,
    /// Seconds from the start of the step.
    pub end: f64,
}

/// Names a piece of work: pass, micro-batch, and how far down the model (in chunks) it is.
type Work = (Pass, usize, usize);

/// A step of `micro_batches` micro-batches; `stages` are the times of every stage for one micro-batch.
///
/// Interleaving needs micro-batches in multiples of the stages, as Megatron does; others are drawn as if rounded up.
pub fn blocks(schedule: Schedule, stages: &[StageTimes], virtual_stages: u64, micro_batches: u64) -> Vec<Block> {
    let (p, v) = (stages.len(), virtual_stages.max(1) as usize);
    let interleaved = schedule == Schedule::OneForwardOneBackward && v > 1 && p > 1;
    let n = if interleaved { (micro_batches as usize).div_ceil(p) * p } else { micro_batches as usize };
    let mut step = Step {
        schedule,
        stages,
        chunks: if interleaved { v } else { 1 },
        micro_batches: n,
        ends: BTreeMap::new(),
        free: vec![0.0; p],
        started: vec![[0; 2]; p],
        finished: vec![[0; 2]; p],
        blocks: Vec::new(),
    };
    if interleaved {
        step.in_order();
    } else {
        step.as_ready();
    }
    step.blocks
}

/// A step as far as it is laid out.
struct Step<'a> {
    schedule: Schedule,
    stages: &'a [StageTimes],
    chunks: usize,
    micro_batches: usize,
    /// When work was done.
    ends: BTreeMap<Work, f64>,
    /// When a rank is free again.
    free: Vec<f64>,
    /// Forward passes started by rank and direction.
    started: Vec<[usize; 2]>,
    /// Backward passes finished by rank and direction.
    finished: Vec<[usize; 2]>,
    blocks: Vec<Block>,
}

impl Step<'_> {
    fn seconds(&self, stage: usize, pass: Pass) -> f64 {
        let t = &self.stages[stage];
        let whole = match pass {
            Pass::Forward => t.forward,
            Pass::Backward if self.splits() => t.backward - t.weight_gradient,
            Pass::Backward => t.backward,
            Pass::Weight => t.weight_gradient,
        };
        whole.max(0.0) / self.chunks as f64
    }

    /// Whether gradients of weights are computed apart.
    fn splits(&self) -> bool {
        match self.schedule {
            Schedule::OneForwardOneBackward => false,
            Schedule::ZeroBubble | Schedule::DualPipe => true,
        }
    }

    fn depth(&self) -> usize {
        self.stages.len() * self.chunks
    }

    /// When the inputs of a piece of work are there; `None` while they are not laid out.
    fn ready(&self, (pass, micro, at): Work) -> Option<f64> {
        let done = |work: Work| self.ends.get(&work).copied();
        match pass {
            Pass::Forward if at == 0 => Some(0.0),
            Pass::Forward => done((Pass::Forward, micro, at - 1)),
            Pass::Backward if at + 1 == self.depth() => done((Pass::Forward, micro, at)),
            Pass::Backward => done((Pass::Backward, micro, at + 1)),
            Pass::Weight => done((Pass::Backward, micro, at)),
        }
    }

    /// Lays a block out on a rank; `stage` is the part of the model it belongs to.
    fn place(&mut self, rank: usize, stage: usize, work: Work, chunk: usize, start: f64) {
        let (pass, micro_batch, _) = work;
        let end = start + self.seconds(stage, pass);
        self.ends.insert(work, end);
        self.free[rank] = end;
        self.blocks.push(Block { rank, pass, micro_batch, chunk, start, end });
    }

    /// Every rank runs a fixed list: forward passes until the first backward pass can come, then one of each.
    fn in_order(&mut self) {
        let (p, v) = (self.stages.len(), self.chunks);
        let all = self.micro_batches * v;
        let work = |rank: usize, k: usize, pass: Pass| -> (Work, usize) {
            let chunk = k % (p * v) / p;
            let chunk = if pass == Pass::Forward { chunk } else { v - 1 - chunk };
            ((pass, k / (p * v) * p + k % p, chunk * p + rank), chunk)
        };
        let lists: Vec<Vec<(Work, usize)>> = (0..p)
            .map(|rank| {
                let before = (2 * (p - 1 - rank) + (v - 1) * p).min(all);
                let mut list: Vec<_> = (0..before).map(|k| work(rank, k, Pass::Forward)).collect();
                for k in 0..all {
                    if before + k < all {
                        list.push(work(rank, before + k, Pass::Forward));
                    }
                    list.push(work(rank, k, Pass::Backward));
                }
                list
            })
            .collect();
        let mut next = vec![0; p];
        while next.iter().zip(&lists).any(|(n, list)| *n < list.len()) {
            let mut moved = false;
            for rank in 0..p {
                while let Some(&(work, chunk)) = lists[rank].get(next[rank]) {
                    let Some(ready) = self.ready(work) else { break };
                    self.place(rank, rank, work, chunk, ready.max(self.free[rank]));
                    next[rank] += 1;
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// Every rank runs what can start first, of what it may hold.
    fn as_ready(&mut self) {
        let p = self.stages.len();
        let directions = if self.schedule == Schedule::DualPipe && p > 1 { 2 } else { 1 };
        loop {
            let mut best: Option<(f64, Pass, usize, usize, Work)> = None;
            for rank in 0..p {
                for direction in 0..directions {
                    for (start, work) in self.candidates(rank, direction, directions) {
                        let key = (start, work.0, rank);
                        let earlier = best
                            .as_ref()
                            .is_none_or(|b| key.0.total_cmp(&b.0).then(key.1.cmp(&b.1)).then(key.2.cmp(&b.2)).is_lt());
                        if earlier {
                            best = Some((start, work.0, rank, direction, work));
                        }
                    }
                }
            }
            let Some((start, pass, rank, direction, work)) = best else { return };
            match pass {
                Pass::Forward => self.started[rank][direction] += 1,
                Pass::Backward => self.finished[rank][direction] += 1,
                Pass::Weight => {}
            }
            self.place(rank, work.2, work, direction, start);
        }
    }

    /// The next forward pass, backward pass and weights' gradient of a rank that could start, with the time.
    /// Micro-batches of the second direction are the odd ones, which enter at the last rank.
    fn candidates(&self, rank: usize, direction: usize, directions: usize) -> Vec<(f64, Work)> {
        let p = self.stages.len();
        let at = if direction == 0 { rank } else { p - 1 - rank };
        let micro = |k: usize| k * directions + direction;
        let held = self.started[rank][direction] - self.finished[rank][direction];
        let mut found = Vec::new();
        let mut offer = |pass: Pass, k: usize| {
            let work = (pass, micro(k), at);
            if micro(k) < self.micro_batches && !self.ends.contains_key(&work) {
                found.extend(self.ready(work).map(|ready| (ready.max(self.free[rank]), work)));
            }
        };
        if held < p - at {
            offer(Pass::Forward, self.started[rank][direction]);
        }
        if held > 0 {
            offer(Pass::Backward, self.finished[rank][direction]);
        }
        if self.splits() {
            let first =
                (0..self.finished[rank][direction]).find(|&k| !self.ends.contains_key(&(Pass::Weight, micro(k), at)));
            if let Some(k) = first {
                offer(Pass::Weight, k);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::bubble_seconds;

    const T: StageTimes = StageTimes { forward: 1.0, backward: 2.0, weight_gradient: 1.0 };

    fn run(schedule: Schedule, p: usize, v: u64, n: u64) -> (Vec<Block>, f64) {
        let all = blocks(schedule, &vec![T; p], v, n);
        let end = all.iter().map(|b| b.end).fold(0.0, f64::max);
        (all, end)
    }

    #[test]
    fn steps_last_as_long_as_the_formulas_say() {
        for (p, v, n) in [(2, 1, 4), (4, 1, 8), (8, 1, 8), (8, 1, 32), (4, 2, 8), (4, 7, 16), (8, 3, 16), (1, 1, 3)] {
            let (_, end) = run(Schedule::OneForwardOneBackward, p, v, n);
            let expected = n as f64 * 3.0 + bubble_seconds(Schedule::OneForwardOneBackward, p as u64, v, T);
            assert!((end - expected).abs() < 1e-9, "p {p} v {v} n {n}: {end} {expected}");
        }
        for (p, n) in [(2, 8), (4, 12), (8, 24)] {
            let (_, end) = run(Schedule::ZeroBubble, p, 1, n);
            let expected = n as f64 * 3.0 + bubble_seconds(Schedule::ZeroBubble, p as u64, 1, T);
            assert!((end - expected).abs() < 1e-9, "p {p} n {n}: {end} {expected}");
            let (_, one) = run(Schedule::OneForwardOneBackward, p, 1, n);
            let (_, dual) = run(Schedule::DualPipe, p, 1, n);
            assert!(dual < one, "p {p} n {n}: {dual} {one}");
        }
    }

    #[test]
    fn blocks_wait_for_their_inputs_and_never_overlap() {
        let schedules = [Schedule::OneForwardOneBackward, Schedule::ZeroBubble, Schedule::DualPipe];
        for (schedule, p, v, n) in schedules.into_iter().flat_map(|s| [(s, 1, 1, 2), (s, 4, 1, 3), (s, 6, 3, 12)]) {
            let (all, _) = run(schedule, p, v, n);
            let interleaved = schedule == Schedule::OneForwardOneBackward && p > 1;
            let (chunks, split) = (if interleaved { v } else { 1 }, schedule != Schedule::OneForwardOneBackward);
            assert_eq!(all.len(), p * n as usize * chunks as usize * if split { 3 } else { 2 }, "{schedule:?} {p}");
            for rank in 0..p {
                let mut own: Vec<&Block> = all.iter().filter(|b| b.rank == rank).collect();
                own.sort_by(|a, b| a.start.total_cmp(&b.start));
                assert!(own.windows(2).all(|w| w[0].end <= w[1].start + 1e-9), "{schedule:?} {p}");
                for b in own.iter().filter(|b| b.pass == Pass::Backward) {
                    let forward = own
                        .iter()
                        .find(|f| f.pass == Pass::Forward && f.micro_batch == b.micro_batch && f.chunk == b.chunk);
                    assert!(forward.unwrap().end <= b.start + 1e-9);
                }
            }
        }
    }
}
