//! GEMM, weights as stored x f32 activations; maths in `gemm.rs`.
//!
//! ```text
//! The 16 partial sums of a result are one `Lanes`, folded as the definition says.
//! 1. A tile of weight rows x tokens at a time: independent sums hide the latency of the multiply-add,
//!    and each load serves a whole side of the tile.
//! 2. The last columns go through a padded copy: zeros add nothing.
//! Limit  memory bandwidth for one token, the multipliers for many
//! Exact  f32, one rounding a multiply-add where scalar has two
//! ```

use super::{LANES, Lanes, Load, padded};
use crate::view::ColsMut;

/// Inner products of `R` weight rows with `N` rows of activations, `[row][token]`.
#[inline(always)]
fn tile<L: Lanes, T: Load, const R: usize, const N: usize>(
    w: [&[T]; R],
    x: [&[f32]; N],
) -> [[f32; N]; R] {
    let mut acc = [[L::splat(0.0); N]; R];
    let w_chunks = w.map(|row| row.as_chunks::<LANES>());
    let x_chunks = x.map(|row| row.as_chunks::<LANES>());
    let chunks = w_chunks[0].0.len();
    for i in 0..chunks {
        let mut x = [L::splat(0.0); N];
        for t in 0..N {
            x[t] = L::load(&x_chunks[t].0[i]);
        }
        for r in 0..R {
            let w: L = T::load(&w_chunks[r].0[i]);
            for t in 0..N {
                acc[r][t] = w.mul_add(x[t], acc[r][t]);
            }
        }
    }
    if !w_chunks[0].1.is_empty() {
        let mut x = [L::splat(0.0); N];
        for t in 0..N {
            x[t] = L::load(&padded(x_chunks[t].1));
        }
        for r in 0..R {
            let w: L = T::load(&padded(w_chunks[r].1));
            for t in 0..N {
                acc[r][t] = w.mul_add(x[t], acc[r][t]);
            }
        }
    }
    let mut sums = [[0.0; N]; R];
    for r in 0..R {
        for t in 0..N {
            sums[r][t] = acc[r][t].sum();
        }
    }
    sums
}

/// `R` rows from `first` on times all tokens, `N` at a time.
#[inline(always)]
fn rows<L: Lanes, T: Load, const R: usize, const N: usize>(
    w: &[T],
    cols: usize,
    x: &[f32],
    y: &mut ColsMut<'_>,
    first: usize,
) {
    let w: [&[T]; R] = std::array::from_fn(|r| &w[(first + r) * cols..][..cols]);
    let token = |t: usize| &x[t * cols..][..cols];
    let mut t = 0;
    while t + N <= y.rows() {
        let sums = tile::<L, T, R, N>(w, std::array::from_fn(|i| token(t + i)));
        for i in 0..N {
            for r in 0..R {
                y.row(t + i)[first + r] = sums[r][i];
            }
        }
        t += N;
    }
    for t in t..y.rows() {
        let sums = tile::<L, T, R, 1>(w, [token(t)]);
        for r in 0..R {
            y.row(t)[first + r] = sums[r][0];
        }
    }
}

/// In tiles of `R` weight rows and `N` tokens.
#[inline(always)]
pub(in crate::cpu) fn gemm<L: Lanes, T: Load, const R: usize, const N: usize>(
    w: &[T],
    cols: usize,
    x: &[f32],
    mut y: ColsMut<'_>,
) {
    let mut r = 0;
    while r + R <= y.cols() {
        rows::<L, T, R, N>(w, cols, x, &mut y, r);
        r += R;
    }
    for r in r..y.cols() {
        rows::<L, T, 1, N>(w, cols, x, &mut y, r);
    }
}
