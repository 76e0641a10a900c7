//! Splits the experts of all layers into equal parts so that tokens stay in their part.
//!
//! Per layer, every part gets the same number of experts. Search: cluster the experts of one layer by how they
//! are used, carry the clusters to the other layers by best assignment, sweep back and forth (each layer is
//! assigned optimally to its neighbors), from several layers and from the contiguous layout; then every pair of
//! parts is split afresh while that helps.

use crate::assign;
use crate::flow::{Flow, Sides};

/// Part of each expert, `[layer][expert]`; `None` for experts outside the members.
pub(crate) type Parts = Vec<Vec<Option<usize>>>;

/// Layers from which clusters are grown.
const SEED_LAYERS: usize = 4;
/// Passes over all pairs of parts.
const PAIR_PASSES: usize = 4;
/// Pairs of parts (of 16 parts) above which pairs are not refined: the time grows with pairs times layers.
const MAX_PAIRS: usize = 120;

/// Splits `members[layer]` into `parts` equal parts; needs `members[layer].len()` divisible by `parts`.
pub(crate) fn split(flow: &Flow, members: &[Vec<usize>], parts: usize) -> Parts {
    let mut best = quick_split(flow, members, parts);
    let mut local = flow.local(&best);
    if parts < 3 || parts * (parts - 1) / 2 > MAX_PAIRS || flow.layers < 2 {
        return best;
    }
    for _ in 0..PAIR_PASSES {
        let before = local;
        for p in 0..parts {
            for q in p + 1..parts {
                let of_pair = |part: &Vec<Option<usize>>| -> Vec<usize> {
                    (0..part.len()).filter(|&e| part[e] == Some(p) || part[e] == Some(q)).collect()
                };
                let pair: Vec<Vec<usize>> = best.iter().map(of_pair).collect();
                let halves = quick_split(flow, &pair, 2);
                let current = only(&best, p, q);
                if flow.local(&halves) <= flow.local(&current) {
                    continue;
                }
                for (row, half) in best.iter_mut().zip(&halves) {
                    for (part, side) in row.iter_mut().zip(half) {
                        *part = side.map_or(*part, |side| Some(if side == 0 { p } else { q }));
                    }
                }
            }
        }
        sweep(flow, members, parts, &mut best);
        local = flow.local(&best);
        if local == before {
            break;
        }
    }
    best
}

/// The layout with all parts but `p` and `q` left out.
fn only(part: &Parts, p: usize, q: usize) -> Parts {
    let keep = |of: &Option<usize>| of.filter(|&of| of == p || of == q);
    part.iter().map(|row| row.iter().map(keep).collect()).collect()
}

/// The best of the contiguous start and of clusters grown from a few layers, each swept to rest.
fn quick_split(flow: &Flow, members: &[Vec<usize>], parts: usize) -> Parts {
    let mut best = contiguous(flow, members, parts);
    if flow.layers < 2 || parts < 2 {
        return best;
    }
    sweep(flow, members, parts, &mut best);
    let mut local = flow.local(&best);
    let mut seeds: Vec<usize> = (0..SEED_LAYERS).map(|i| i * (flow.layers - 1) / (SEED_LAYERS - 1)).collect();
    seeds.dedup();
    for seed in seeds {
        let mut next = vec![vec![None; flow.experts]; flow.layers];
        let clusters = cluster(&likeness(flow, seed, &members[seed]), parts);
        for (&e, &p) in members[seed].iter().zip(&clusters) {
            next[seed][e] = Some(p);
        }
        for layer in seed + 1..flow.layers {
            assign_layer(flow, members, parts, &mut next, layer, Sides { before: true, after: false });
        }
        for layer in (0..seed).rev() {
            assign_layer(flow, members, parts, &mut next, layer, Sides { before: false, after: true });
        }
        sweep(flow, members, parts, &mut next);
        let found = flow.local(&next);
        if found > local {
            (best, local) = (next, found);
        }
    }
    best
}

/// Members in order, the first share to part 0 and so on.
pub(crate) fn contiguous(flow: &Flow, members: &[Vec<usize>], parts: usize) -> Parts {
    let mut part = vec![vec![None; flow.experts]; flow.layers];
    for (row, experts) in part.iter_mut().zip(members) {
        let share = (experts.len() / parts).max(1);
        for (index, &e) in experts.iter().enumerate() {
            row[e] = Some(index / share);
        }
    }
    part
}

/// Assigns layer after layer optimally to its neighbors, forth and back, until nothing is gained.
fn sweep(flow: &Flow, members: &[Vec<usize>], parts: usize, part: &mut Parts) {
    loop {
        let mut raised = false;
        for layer in (0..flow.layers).chain((0..flow.layers).rev()) {
            raised |= assign_layer(flow, members, parts, part, layer, Sides::BOTH);
        }
        if !raised {
            return;
        }
    }
}

/// Best assignment of one layer given its neighbors; whether the transitions kept local rose.
fn assign_layer(
    flow: &Flow,
    members: &[Vec<usize>],
    parts: usize,
    part: &mut Parts,
    layer: usize,
    sides: Sides,
) -> bool {
    let experts = &members[layer];
    let gain: Vec<Vec<i64>> = experts.iter().map(|&e| flow.gain(layer, e, parts, part, sides)).collect();
    let share = (experts.len() / parts).max(1);
    let start: Vec<usize> = match experts.iter().map(|&e| part[layer][e]).collect::<Option<Vec<usize>>>() {
        Some(start) => start,
        None => greedy(&gain, parts, share),
    };
    let value = |of: &[usize]| of.iter().zip(&gain).map(|(&p, g)| g[p]).sum::<i64>();
    let before = value(&start);
    let found = assign::improve(&gain, parts, start);
    for (&e, &p) in experts.iter().zip(&found) {
        part[layer][e] = Some(p);
    }
    value(&found) > before
}

/// Largest gains first, while parts have room: a start for the exact assignment.
fn greedy(gain: &[Vec<i64>], parts: usize, share: usize) -> Vec<usize> {
    let mut pairs: Vec<(usize, usize)> = (0..gain.len()).flat_map(|i| (0..parts).map(move |p| (i, p))).collect();
    pairs.sort_by_key(|&(i, p)| (std::cmp::Reverse(gain[i][p]), i, p));
    let mut part = vec![usize::MAX; gain.len()];
    let mut room = vec![share; parts];
    for (item, p) in pairs {
        if part[item] == usize::MAX && room[p] > 0 {
            part[item] = p;
            room[p] -= 1;
        }
    }
    part
}

/// Clusters of equal size by a symmetric matrix of likeness: the part of each item.
pub(crate) fn cluster(likeness: &[Vec<i64>], parts: usize) -> Vec<usize> {
    let items = likeness.len();
    let share = items / parts;
    let mut part = vec![usize::MAX; items];
    for p in 0..parts {
        let mut pull = vec![0_i64; items];
        for taken in 0..share {
            let free = (0..items).filter(|&i| part[i] == usize::MAX);
            let next = if taken == 0 {
                // The free expert most alike to its nearest free experts: the heart of a cluster.
                free.max_by_key(|&i| (nearest(&likeness[i], &part, share), std::cmp::Reverse(i)))
            } else {
                free.max_by_key(|&i| (pull[i], std::cmp::Reverse(i)))
            };
            let Some(next) = next else { break };
            part[next] = p;
            pull.iter_mut().zip(&likeness[next]).for_each(|(sum, &l)| *sum += l);
        }
    }
    refine(likeness, parts, part)
}

fn nearest(row: &[i64], part: &[usize], share: usize) -> i64 {
    let mut free: Vec<i64> = (0..row.len()).filter(|&i| part[i] == usize::MAX).map(|i| row[i]).collect();
    free.sort_unstable_by(|a, b| b.cmp(a));
    free.iter().take(share).sum()
}

/// Reassigns all experts to the cluster they are most alike to, while the likeness inside clusters rises.
fn refine(likeness: &[Vec<i64>], parts: usize, mut part: Vec<usize>) -> Vec<usize> {
    let inside = |part: &[usize]| -> i64 {
        let row = |(i, row): (usize, &Vec<i64>)| -> i64 {
            (0..part.len()).filter(|&j| part[j] == part[i] && j != i).map(|j| row[j]).sum()
        };
        likeness.iter().enumerate().map(row).sum()
    };
    let mut best = inside(&part);
    loop {
        let mut gain = vec![vec![0; parts]; part.len()];
        for (i, row) in likeness.iter().enumerate() {
            for (j, &l) in row.iter().enumerate() {
                if i != j {
                    gain[i][part[j]] += l;
                }
            }
        }
        let next = assign::improve(&gain, parts, part.clone());
        let found = inside(&next);
        if found <= best {
            return part;
        }
        (part, best) = (next, found);
    }
}

/// Cosine of the profiles, in millionths.
fn likeness(flow: &Flow, layer: usize, experts: &[usize]) -> Vec<Vec<i64>> {
    let unit = |&e: &usize| -> Vec<f64> {
        let profile: Vec<f64> = flow.profile(layer, e).iter().map(|&n| n as f64).collect();
        let norm = profile.iter().map(|n| n * n).sum::<f64>().sqrt().max(1e-12);
        profile.iter().map(|n| n / norm).collect()
    };
    let units: Vec<Vec<f64>> = experts.iter().map(unit).collect();
    let cosine = |a: &Vec<f64>, b: &Vec<f64>| (a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>() * 1e6) as i64;
    units.iter().map(|a| units.iter().map(|b| cosine(a, b)).collect()).collect()
}
