//! Products of rows and columns in f32, for wgmma.

/// Columns that lie together in the results.
pub(super) const COLUMNS: usize = 8;

/// `dots[j / 8][i][j % 8] = sum over k of a[i][k] * b[k][j]` for sixteen rows. Sums of integers of eight bits stay exact
/// in f32 only up to 2^24, which products over 32 steps do not reach.
pub(super) fn multiply(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { multiply_512(a, b, dots, n, k) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { multiply_256(a, b, dots, n, k) };
        }
    }
    multiply_by_rows(a, b, dots, n, k);
}

/// With wider vectors. Products and sums stay apart, so that every width rounds alike.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_512(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    multiply_by_rows(a, b, dots, n, k);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_256(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    multiply_by_rows(a, b, dots, n, k);
}

#[inline(always)]
fn multiply_by_rows(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    if n.is_multiple_of(16) {
        multiply_columns::<16>(a, b, dots, n, k);
    } else {
        multiply_columns::<8>(a, b, dots, n, k);
    }
}

/// Four rows and `W` columns at a time, whose sums stay in registers.
#[inline(always)]
fn multiply_columns<const W: usize>(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    for (i, a) in a.chunks_exact(4 * k).enumerate() {
        for c in (0..n).step_by(W) {
            let mut sums = [[0f32; W]; 4];
            for kk in 0..k {
                let column = &b[kk * n + c..][..W];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = a[row * k + kk];
                    sums.iter_mut().zip(column).for_each(|(s, y)| *s += x * y);
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                for (block, sums) in sums.chunks_exact(COLUMNS).enumerate() {
                    dots[((c / COLUMNS + block) * 16 + 4 * i + row) * COLUMNS..][..COLUMNS].copy_from_slice(sums);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_matrices() {
        for (n, k) in [(8, 8), (24, 16), (32, 32)] {
            let a: Vec<f32> = (0..16 * k).map(|i| (i % 13) as f32 - 6.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i % 11) as f32 - 5.0).collect();
            let mut dots = vec![0.0; 16 * n];
            multiply(&a, &b, &mut dots, n, k);
            for (i, j) in (0..16).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let sum: f32 = (0..k).map(|x| a[i * k + x] * b[x * n + j]).sum();
                assert_eq!(dots[(j / COLUMNS * 16 + i) * COLUMNS + j % COLUMNS], sum);
            }
        }
    }
}
