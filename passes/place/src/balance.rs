//! Replicas and packing by water-filling, local search and a proven lower bound.
//!
//! The largest GPU load is minimised over replica counts and over the packing of replicas into equal numbers of
//! slots per GPU. Search: counts that level the load per replica, heaviest replica first onto the lightest GPU,
//! then the heaviest GPU trades replicas with each other GPU as long as the heavier of the two gets lighter, then
//! kicks with restarts from the best. It stops at the lower bound or after a fixed number of kicks, so the result
//! does not depend on the clock.

use crate::bound::lower_bound;

/// Replicas on each GPU, and how many replicas each expert has.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Packed {
    pub(crate) gpus: Vec<Vec<usize>>,
    pub(crate) count: Vec<usize>,
    pub(crate) load: Vec<f64>,
}

impl Packed {
    pub(crate) fn peak(&self) -> f64 {
        self.load.iter().copied().fold(0.0, f64::max)
    }

    fn heaviest(&self) -> usize {
        (0..self.load.len()).fold(0, |best, gpu| if self.load[gpu] > self.load[best] { gpu } else { best })
    }
}

/// Relative gain below which a trade counts as none (guards against rounding loops).
const GAIN: f64 = 1e-9;
/// Replicas of two GPUs that are split anew over all subsets; with more, single swaps are used.
const MAX_ITEMS: usize = 10;
/// Kicks of one layer times the square of its slots: small cases get many, large ones few.
const KICK_WORK: usize = 8_000_000;
/// Relative distance to the bound at which the search ends: far below what load statistics are good for.
const CLOSE: f64 = 2e-4;
/// Kicks without a gain after which the search ends.
const IDLE_KICKS: usize = 400;

/// A small fast generator (SplitMix64); kicks need variety, not quality.
pub(crate) struct Kicks(pub(crate) u64);

impl Kicks {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }
}

/// Places `load` on `n_gpus` GPUs of `slots / n_gpus` slots each. Needs `slots >= load.len()`, a multiple of `n_gpus`.
pub(crate) fn balance(load: &[f64], n_gpus: usize, slots: usize) -> Packed {
    let bound = lower_bound(load, n_gpus, slots);
    let close = |packed: &Packed| packed.peak() <= bound * (1.0 + CLOSE);
    let mut best = pack(load, water_fill(load, slots), n_gpus, slots);
    descend(load, &mut best);
    let mut kicks = Kicks(slots as u64);
    let mut current = best.clone();
    let rounds = (KICK_WORK / slots.saturating_mul(slots)).clamp(24, 4_000);
    let mut idle = 0;
    for round in 0..rounds {
        if close(&best) || n_gpus == 1 || idle == IDLE_KICKS {
            break;
        }
        let next = match round % 2 {
            1 if slots > load.len() => recount(load, &current, &mut kicks),
            _ => shuffle(load, &current, &mut kicks),
        };
        let better = next.peak() < best.peak() * (1.0 - GAIN);
        if next.peak() <= current.peak() * (1.0 + GAIN) {
            current = next;
        }
        idle = if better { 0 } else { idle + 1 };
        if better {
            best = current.clone();
        } else if idle % 64 == 63 {
            current = best.clone();
        }
    }
    best
}

/// Each slot beyond one per expert goes to the largest load per replica: the least possible largest replica.
pub(crate) fn water_fill(load: &[f64], slots: usize) -> Vec<usize> {
    let mut count = vec![1; load.len()];
    for _ in load.len()..slots {
        let share = |e: usize| load[e] / count[e] as f64;
        let hottest = (0..load.len()).fold(0, |best, e| if share(e) > share(best) { e } else { best });
        count[hottest] += 1;
    }
    count
}

/// Heaviest replica first, each to the lightest GPU with a free slot.
fn pack(load: &[f64], count: Vec<usize>, n_gpus: usize, slots: usize) -> Packed {
    let mut order: Vec<usize> = (0..load.len()).collect();
    let share = |e: usize| load[e] / count[e] as f64;
    order.sort_by(|&a, &b| share(b).total_cmp(&share(a)));
    let mut packed =
        Packed { gpus: vec![Vec::with_capacity(slots / n_gpus); n_gpus], load: vec![0.0; n_gpus], count: Vec::new() };
    for &expert in &order {
        for _ in 0..count[expert] {
            let open = (0..n_gpus).filter(|&gpu| packed.gpus[gpu].len() < slots / n_gpus);
            let Some(gpu) = open.min_by(|&a, &b| packed.load[a].total_cmp(&packed.load[b])) else {
                break;
            };
            packed.gpus[gpu].push(expert);
            packed.load[gpu] += share(expert);
        }
    }
    packed.count = count;
    packed
}

/// Trades between the heaviest GPU and the others until none helps.
fn descend(load: &[f64], packed: &mut Packed) {
    let n_gpus = packed.gpus.len();
    let few = 2 * packed.gpus[0].len() <= MAX_ITEMS;
    loop {
        let top = packed.heaviest();
        let peak = packed.load[top];
        let mut best: Option<(f64, usize, Vec<usize>, Vec<usize>)> = None;
        // Lightest first: after one good trade, the heavier GPUs cannot offer a better one.
        let mut others: Vec<usize> = (0..n_gpus).filter(|&gpu| gpu != top).collect();
        others.sort_by(|&a, &b| packed.load[a].total_cmp(&packed.load[b]));
        for other in others {
            // Not even an even split would beat what is found already.
            let floor = best.as_ref().map_or(peak * (1.0 - GAIN), |found| found.0);
            if (peak + packed.load[other]) / 2.0 >= floor {
                break;
            }
            let pair = (&packed.gpus[top], &packed.gpus[other]);
            let found = if few {
                repartition(load, &packed.count, pair, floor)
            } else {
                best_swap(load, packed, (top, other), floor)
            };
            if let Some((value, a, b)) = found {
                best = Some((value, other, a, b));
            }
        }
        let Some((_, other, a, b)) = best else { return };
        for (gpu, experts) in [(top, a), (other, b)] {
            packed.load[gpu] = experts.iter().map(|&e| load[e] / packed.count[e] as f64).sum();
            packed.gpus[gpu] = experts;
        }
    }
}

type Trade = (f64, Vec<usize>, Vec<usize>);

/// The most even split of the replicas of two GPUs into equal numbers, if below `floor`.
fn repartition(load: &[f64], count: &[usize], (a, b): (&Vec<usize>, &Vec<usize>), floor: f64) -> Option<Trade> {
    let (n, half) = (a.len() + b.len(), a.len());
    if half < 2 {
        return None;
    }
    let mut items = [0.0; MAX_ITEMS];
    for (item, &e) in items.iter_mut().zip(a.iter().chain(b)) {
        *item = load[e] / count[e] as f64;
    }
    let share = &items[..n];
    let total: f64 = share.iter().sum();
    let mut rising = items;
    rising[..n].sort_unstable_by(f64::total_cmp);
    if rising[n - 1] + rising[..half - 1].iter().sum::<f64>() >= floor {
        return None;
    }
    // Sums of all subsets of the lower and of the upper items, so that a subset costs two look-ups.
    let (low_sums, high_sums) = (subset_sums(&share[..half]), subset_sums(&share[half..]));
    let mut best = floor;
    let mut best_mask = None;
    // Subsets with item 0: the other `half - 1` items, in increasing order of their bit masks.
    let last = ((1_u64 << (half - 1)) - 1) << (n - half);
    let mut others = (1_u64 << (half - 1)) - 1;
    loop {
        let mask = others << 1 | 1;
        let sum = low_sums[(mask & ((1 << half) - 1)) as usize] + high_sums[(mask >> half) as usize];
        let value = sum.max(total - sum);
        if value < best {
            best = value;
            best_mask = Some(mask);
        }
        if others == last {
            break;
        }
        let lowest = others & others.wrapping_neg();
        let carry = others + lowest;
        others = (((carry ^ others) >> 2) / lowest) | carry;
    }
    let mask = best_mask?;
    let expert = |bit: usize| if bit < half { a[bit] } else { b[bit - half] };
    let side = |bit_set: u64| (0..n).filter(|bit| mask >> bit & 1 == bit_set).map(expert).collect();
    Some((best, side(1), side(0)))
}

/// `sums[mask]`: the sum of the items in `mask`.
fn subset_sums(share: &[f64]) -> [f64; 1 << (MAX_ITEMS / 2)] {
    let mut sums = [0.0; 1 << (MAX_ITEMS / 2)];
    for (bit, s) in share.iter().enumerate() {
        for mask in 0..1 << bit {
            sums[mask | 1 << bit] = sums[mask] + s;
        }
    }
    sums
}

/// The best exchange of one replica each, if below `floor`.
fn best_swap(load: &[f64], packed: &Packed, (top, other): (usize, usize), floor: f64) -> Option<Trade> {
    let share = |e: usize| load[e] / packed.count[e] as f64;
    let (mut best, mut best_pair) = (floor, None);
    for (i, &a) in packed.gpus[top].iter().enumerate() {
        for (j, &b) in packed.gpus[other].iter().enumerate() {
            let moved = share(a) - share(b);
            let value = (packed.load[top] - moved).max(packed.load[other] + moved);
            if moved > 0.0 && value < best {
                best = value;
                best_pair = Some((i, j));
            }
        }
    }
    let (i, j) = best_pair?;
    let (mut a, mut b) = (packed.gpus[top].clone(), packed.gpus[other].clone());
    std::mem::swap(&mut a[i], &mut b[j]);
    Some((best, a, b))
}

/// Deals the replicas of the heaviest and one to three other GPUs anew, then descends.
fn shuffle(load: &[f64], from: &Packed, kicks: &mut Kicks) -> Packed {
    let mut packed = from.clone();
    let n_gpus = packed.gpus.len();
    let mut chosen = vec![packed.heaviest()];
    for _ in 0..1 + kicks.below(3) {
        let gpu = kicks.below(n_gpus);
        if !chosen.contains(&gpu) {
            chosen.push(gpu);
        }
    }
    let mut pool: Vec<usize> = chosen.iter().flat_map(|&gpu| packed.gpus[gpu].clone()).collect();
    for i in (1..pool.len()).rev() {
        pool.swap(i, kicks.below(i + 1));
    }
    let per_gpu = packed.gpus[0].len();
    for (&gpu, experts) in chosen.iter().zip(pool.chunks(per_gpu)) {
        packed.load[gpu] = experts.iter().map(|&e| load[e] / packed.count[e] as f64).sum();
        packed.gpus[gpu] = experts.to_vec();
    }
    descend(load, &mut packed);
    packed
}

/// Gives a slot of a random replicated expert to an expert on the heaviest GPU (or to any), then descends.
fn recount(load: &[f64], from: &Packed, kicks: &mut Kicks) -> Packed {
    let replicated: Vec<usize> = (0..load.len()).filter(|&e| from.count[e] > 1).collect();
    let top = &from.gpus[from.heaviest()];
    let receiver = match kicks.below(4) {
        0 => kicks.below(load.len()),
        _ => top[kicks.below(top.len())],
    };
    let mut packed = from.clone();
    if replicated.is_empty() {
        return packed;
    }
    let donor = replicated[kicks.below(replicated.len())];
    let lightest = (0..packed.gpus.len()).filter(|&gpu| packed.gpus[gpu].contains(&donor));
    let place = lightest.min_by(|&a, &b| packed.load[a].total_cmp(&packed.load[b]));
    let slot = place.and_then(|gpu| Some((gpu, packed.gpus[gpu].iter().position(|&e| e == donor)?)));
    if let Some((gpu, slot)) = slot.filter(|_| donor != receiver) {
        packed.gpus[gpu][slot] = receiver;
        packed.count[donor] -= 1;
        packed.count[receiver] += 1;
        for (sum, experts) in packed.load.iter_mut().zip(&packed.gpus) {
            *sum = experts.iter().map(|&e| load[e] / packed.count[e] as f64).sum();
        }
        descend(load, &mut packed);
    }
    packed
}
