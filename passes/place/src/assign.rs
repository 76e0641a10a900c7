//! Best assignment of items to parts of fixed sizes.
//!
//! Items keep their counts per part; the sum of `gain[item][part]` is raised by cancelling negative cycles in
//! the graph of parts, where an edge from `p` to `q` moves the item of `p` that loses least. Without such a
//! cycle the assignment is optimal (flow decomposition), and a good start needs few cycles.

/// Improves `part` (part of each item) to an optimum; the number of items in each part stays.
pub(crate) fn improve(gain: &[Vec<i64>], parts: usize, mut part: Vec<usize>) -> Vec<usize> {
    while let Some(cycle) = negative_cycle(gain, parts, &part) {
        for (item, to) in cycle {
            part[item] = to;
        }
    }
    part
}

/// Moves `(item, new part)` along a cycle that raises the gain, by Bellman and Ford over the parts.
fn negative_cycle(gain: &[Vec<i64>], parts: usize, part: &[usize]) -> Option<Vec<(usize, usize)>> {
    let mut edge = vec![(i64::MAX, usize::MAX); parts * parts];
    for (item, &from) in part.iter().enumerate() {
        for to in 0..parts {
            let loss = gain[item][from] - gain[item][to];
            if to != from && loss < edge[from * parts + to].0 {
                edge[from * parts + to] = (loss, item);
            }
        }
    }
    let mut distance = vec![0_i64; parts];
    let mut before = vec![usize::MAX; parts];
    let mut changed = None;
    for _ in 0..parts {
        changed = None;
        for from in 0..parts {
            for to in 0..parts {
                let (loss, item) = edge[from * parts + to];
                if item != usize::MAX && distance[from] + loss < distance[to] {
                    distance[to] = distance[from] + loss;
                    before[to] = from;
                    changed = Some(to);
                }
            }
        }
        changed?;
    }
    // Still changing after `parts` rounds: the predecessors of that part run into a negative cycle.
    let mut at = changed?;
    for _ in 0..parts {
        at = before[at];
    }
    let (start, mut cycle) = (at, Vec::new());
    loop {
        let from = before[at];
        cycle.push((edge[from * parts + at].1, at));
        at = from;
        if at == start {
            return Some(cycle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reaches_the_best_of_all_assignments() {
        let gain: Vec<Vec<i64>> =
            (0..6_i64).map(|i| (0..3_i64).map(|p| (i * 7 + p * 11 + i * p * 5) % 13).collect()).collect();
        let value = |part: &[usize]| part.iter().enumerate().map(|(i, &p)| gain[i][p]).sum::<i64>();
        let mut best = i64::MIN;
        for code in 0..3_usize.pow(6) {
            let part: Vec<usize> = (0..6).map(|i| code / 3_usize.pow(i) % 3).collect();
            if (0..3).all(|p| part.iter().filter(|&&q| q == p).count() == 2) {
                best = best.max(value(&part));
            }
        }
        let found = improve(&gain, 3, vec![0, 0, 1, 1, 2, 2]);
        assert_eq!(value(&found), best);
    }
}
