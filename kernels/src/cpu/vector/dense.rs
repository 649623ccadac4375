//! GEMM, weights as stored x f32 activations; maths in `gemm.rs`.
//!
//! ```text
//! The 16 partial sums of a result are one `Lanes`, folded as the definition says.
//! 1. A tile of weight rows x tokens at a time: independent sums hide the latency of the multiply-add,
//!    and each load serves a whole side of the tile.
//! 2. The last columns go through a padded copy: zeros add nothing.
//! 3. Many tokens are taken in blocks that caches hold: 32 tokens meet 8 rows, 512 columns at a time, widened once
//!    for all of them; between those the partial sums lie in memory. Read as one run each, activations of 128 tokens
//!    came from the second-level cache for every four rows and those of 512 from beyond it.
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

/// Tokens up to which weights are read once and as they are.
const FEW: usize = 16;
/// Of many tokens, those whose activations stay in the second-level cache (393 KB of 3072 columns).
const TOKENS: usize = 32;
/// Rows of weights that they meet together.
const ROWS: usize = 8;
/// Columns at a time: of the rows 16 KiB as f32, of a tile's tokens 8 KiB, in the first-level cache.
const PIECE: usize = 512;

/// The partial sums of a block, or some columns of its weights: on lines of the cache.
#[repr(C, align(64))]
struct Aligned<T>(T);

/// The partial sums of [`ROWS`] rows with [`TOKENS`] tokens.
type Sums = [[[f32; LANES]; TOKENS]; ROWS];

/// Adds the products of `R` rows from `row` on with `N` tokens from `token` on, in some columns.
#[inline(always)]
fn add_products<L: Lanes, const R: usize, const N: usize>(
    w: &[[f32; PIECE]; ROWS],
    x: [&[f32]; N],
    sums: &mut Sums,
    (row, token): (usize, usize),
) {
    let mut acc = [[L::splat(0.0); N]; R];
    for r in 0..R {
        for t in 0..N {
            acc[r][t] = L::load(&sums[row + r][token + t]);
        }
    }
    let w: [&[[f32; LANES]]; R] = std::array::from_fn(|r| w[row + r].as_chunks().0);
    let x = x.map(|x| x.as_chunks::<LANES>());
    let chunks = x[0].0.len();
    let (w_chunks, x_chunks) = (w.map(|w| &w[..chunks]), x.map(|x| &x.0[..chunks]));
    for i in 0..chunks {
        let mut x = [L::splat(0.0); N];
        for t in 0..N {
            x[t] = L::load(&x_chunks[t][i]);
        }
        for r in 0..R {
            let w = L::load(&w_chunks[r][i]);
            for t in 0..N {
                acc[r][t] = w.mul_add(x[t], acc[r][t]);
            }
        }
    }
    if !x[0].1.is_empty() {
        for t in 0..N {
            let x = L::load(&padded(x[t].1));
            for r in 0..R {
                acc[r][t] = L::load(&w[r][chunks]).mul_add(x, acc[r][t]);
            }
        }
    }
    for r in 0..R {
        for t in 0..N {
            acc[r][t].store(&mut sums[row + r][token + t]);
        }
    }
}

/// The same for the rows `0..rows` and all tokens of a block, whose activations are `x` from some column on.
#[inline(always)]
fn add_rows<L: Lanes, const R: usize, const N: usize>(
    w: &[[f32; PIECE]; ROWS],
    rows: usize,
    x: [&[f32]; N],
    sums: &mut Sums,
    token: usize,
) {
    let mut r = 0;
    while r + R <= rows {
        add_products::<L, R, N>(w, x, sums, (r, token));
        r += R;
    }
    for r in r..rows {
        add_products::<L, 1, N>(w, x, sums, (r, token));
    }
}

/// As f32, with zeros in the last sixteen.
#[inline(always)]
fn widen<L: Lanes, T: Load>(from: &[T], to: &mut [f32; PIECE]) {
    let ((chunks, rest), (to, _)) = (from.as_chunks(), to.as_chunks_mut());
    for (chunk, to) in chunks.iter().zip(&mut *to) {
        T::load::<L>(chunk).store(to);
    }
    if !rest.is_empty() {
        T::load::<L>(&padded(rest)).store(&mut to[chunks.len()]);
    }
}

/// Many tokens, in tiles of `R` weight rows and `N` tokens.
#[inline(always)]
fn many<L: Lanes, T: Load, const R: usize, const N: usize>(
    w: &[T],
    cols: usize,
    x: &[f32],
    y: &mut ColsMut<'_>,
) {
    let mut sums = Aligned([[[0.0; LANES]; TOKENS]; ROWS]);
    let mut wide = Aligned([[0.0; PIECE]; ROWS]);
    let (sums, wide) = (&mut sums.0, &mut wide.0);
    for token in (0..y.rows()).step_by(TOKENS) {
        let tokens = TOKENS.min(y.rows() - token);
        for row in (0..y.cols()).step_by(ROWS) {
            let rows = ROWS.min(y.cols() - row);
            sums.as_flattened_mut().as_flattened_mut().fill(0.0);
            for from in (0..cols).step_by(PIECE) {
                let piece = from..cols.min(from + PIECE);
                for (r, wide) in wide[..rows].iter_mut().enumerate() {
                    widen::<L, T>(&w[(row + r) * cols..][piece.clone()], wide);
                }
                let mut t = 0;
                while t + N <= tokens {
                    let x: [&[f32]; N] =
                        std::array::from_fn(|i| &x[(token + t + i) * cols..][piece.clone()]);
                    add_rows::<L, R, N>(wide, rows, x, sums, t);
                    t += N;
                }
                for t in t..tokens {
                    let x = [&x[(token + t) * cols..][piece.clone()]];
                    add_rows::<L, R, 1>(wide, rows, x, sums, t);
                }
            }
            for t in 0..tokens {
                let y = &mut y.row(token + t)[row..row + rows];
                for (r, y) in y.iter_mut().enumerate() {
                    *y = L::load(&sums[r][t]).sum();
                }
            }
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
    if y.rows() > FEW {
        many::<L, T, R, N>(w, cols, x, &mut y);
        return;
    }
    let mut r = 0;
    while r + R <= y.cols() {
        rows::<L, T, R, N>(w, cols, x, &mut y, r);
        r += R;
    }
    for r in r..y.cols() {
        rows::<L, T, 1, N>(w, cols, x, &mut y, r);
    }
}
