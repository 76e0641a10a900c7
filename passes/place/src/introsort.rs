//! Order of equal weights as the published EPLB has it.
//!
//! EPLB sorts with a library sort that is not stable, so equal replicas change places. The order is that of the
//! C++ standard library of GCC: insertion up to 16 items, quicksort with the median of three above. Doing the
//! same makes published tables (`log2phy` too) come out slot by slot.

/// Below this length, ranges are left to the final insertion pass.
const SHORT: usize = 16;

/// Indices of `weight`, heaviest first.
pub(crate) fn falling_order(weight: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weight.len()).collect();
    let heavier = |a: usize, b: usize| weight[a] > weight[b];
    let n = order.len();
    if n <= 1 {
        return order;
    }
    partition_all(&mut order, &heavier);
    insert_all(&mut order[..n.min(SHORT)], &heavier);
    for i in SHORT..n {
        insert_unguarded(&mut order, i, &heavier);
    }
    order
}

/// Quicksort down to ranges of [`SHORT`] items; the right part of each cut first.
fn partition_all(order: &mut [usize], heavier: &impl Fn(usize, usize) -> bool) {
    let depth = 2 * order.len().ilog2();
    let mut ranges = vec![(0, order.len(), depth)];
    while let Some((first, last, depth)) = ranges.pop() {
        if last - first <= SHORT {
            continue;
        }
        let range = &mut order[first..last];
        if depth == 0 {
            // Input made to defeat the pivots; the library turns to a heap here. Equal weights may differ.
            range.sort_by(|&a, &b| heavier(b, a).cmp(&heavier(a, b)));
            continue;
        }
        let cut = first + cut(range, heavier);
        ranges.push((first, cut, depth - 1));
        ranges.push((cut, last, depth - 1));
    }
}

/// Partitions around the median of the second, middle and last item; where the right part begins.
fn cut(range: &mut [usize], heavier: &impl Fn(usize, usize) -> bool) -> usize {
    let (a, b, c) = (1, range.len() / 2, range.len() - 1);
    let before = |x: usize, y: usize| heavier(range[x], range[y]);
    let median = match (before(a, b), before(b, c), before(a, c)) {
        (true, true, _) | (false, false, false) => b,
        (true, false, true) | (false, true, false) => c,
        (true, false, false) | (false, _, true) => a,
    };
    range.swap(0, median);
    let (mut left, mut right) = (1, range.len());
    loop {
        while heavier(range[left], range[0]) {
            left += 1;
        }
        right -= 1;
        while heavier(range[0], range[right]) {
            right -= 1;
        }
        if left >= right {
            return left;
        }
        range.swap(left, right);
        left += 1;
    }
}

fn insert_all(order: &mut [usize], heavier: &impl Fn(usize, usize) -> bool) {
    for i in 1..order.len() {
        if heavier(order[i], order[0]) {
            order[..=i].rotate_right(1);
        } else {
            insert_unguarded(order, i, heavier);
        }
    }
}

/// Moves item `i` left over all lighter ones; an item that is not lighter lies somewhere before it.
fn insert_unguarded(order: &mut [usize], i: usize, heavier: &impl Fn(usize, usize) -> bool) {
    let mut at = i;
    while at > 0 && heavier(order[i], order[at - 1]) {
        at -= 1;
    }
    order[at..=i].rotate_right(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_whatever_the_weights_and_lengths() {
        for n in 0..300_usize {
            for spread in [1, 2, 5, 1000] {
                let weight: Vec<f32> = (0..n).map(|i| ((i * 7919 + n * 31) % 1009 % spread) as f32).collect();
                let order = falling_order(&weight);
                assert!(order.windows(2).all(|w| weight[w[0]] >= weight[w[1]]), "{n} {spread}");
                let mut ids = order.clone();
                ids.sort_unstable();
                assert!(ids.into_iter().eq(0..n));
            }
        }
    }

    #[test]
    fn keeps_the_order_of_equal_weights_up_to_sixteen() {
        assert!(falling_order(&[3.0; 16]).into_iter().eq(0..16));
    }
}
