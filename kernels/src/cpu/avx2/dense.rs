//! GEMM, weights as stored x f32 activations; maths in `gemm.rs`.
//!
//! ```text
//! The 16 partial sums of a result are two registers, folded as the definition says.
//! 1. Four weight rows at a time: eight independent sums hide the latency of the multiply-add, and
//!    the activations are loaded once for the four.
//! 2. The last columns go through a padded copy: zeros add nothing.
//! Limit  memory bandwidth for one token
//! Exact  f32, one rounding a multiply-add where scalar has two
//! ```

use crate::view::ColsMut;
use phidias_quant::{bf16, f16};
use std::arch::x86_64::*;

/// Columns taken at a time: the partial sums of a result.
const LANES: usize = 16;
/// Weight rows taken at a time.
const ROWS: usize = 4;

/// Elements that can be loaded as f32.
trait Load: Copy + Default {
    /// Eight of them, widened exactly.
    /// # Safety
    /// The CPU has AVX2 and F16C; eight elements can be read at `from`.
    unsafe fn load(from: *const Self) -> __m256;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's contract.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's contract; eight elements are 16 bytes.
        unsafe {
            let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))
        }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's contract; eight elements are 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load<T: Load>(chunk: &[T; LANES]) -> [__m256; 2] {
    // SAFETY: this function has the features, and the loads are inside the 16 elements.
    unsafe { [T::load(chunk.as_ptr()), T::load(chunk.as_ptr().add(8))] }
}

/// 16 -> 8 -> 4 -> 2 -> 1, as the definition folds.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fold(acc: [__m256; 2]) -> f32 {
    let eight = _mm256_add_ps(acc[0], acc[1]);
    let four = _mm_add_ps(
        _mm256_castps256_ps128(eight),
        _mm256_extractf128_ps::<1>(eight),
    );
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// `x` padded with zeros.
#[inline]
fn padded<T: Load>(x: &[T]) -> [T; LANES] {
    let mut chunk = [T::default(); LANES];
    chunk[..x.len()].copy_from_slice(x);
    chunk
}

/// Inner products of some weight rows with one row of activations.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn dots<T: Load, const N: usize>(w: [&[T]; N], x: &[f32]) -> [f32; N] {
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    let w_chunks = w.map(|row| row.as_chunks::<LANES>());
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    for (i, x) in x_chunks.iter().enumerate() {
        let x = load(x);
        for r in 0..N {
            let w = load(&w_chunks[r].0[i]);
            for h in 0..2 {
                acc[r][h] = _mm256_fmadd_ps(w[h], x[h], acc[r][h]);
            }
        }
    }
    if !x_rest.is_empty() {
        let x = load(&padded(x_rest));
        for r in 0..N {
            let w = load(&padded(w_chunks[r].1));
            for h in 0..2 {
                acc[r][h] = _mm256_fmadd_ps(w[h], x[h], acc[r][h]);
            }
        }
    }
    acc.map(|acc| fold(acc))
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn gemm<T: Load>(w: &[T], cols: usize, x: &[f32], mut y: ColsMut<'_>) {
    let row = |r: usize| &w[r * cols..][..cols];
    let mut r = 0;
    while r + ROWS <= y.cols() {
        let rows: [&[T]; ROWS] = std::array::from_fn(|i| row(r + i));
        for t in 0..y.rows() {
            y.row(t)[r..r + ROWS].copy_from_slice(&dots(rows, &x[t * cols..][..cols]));
        }
        r += ROWS;
    }
    for r in r..y.cols() {
        for t in 0..y.rows() {
            y.row(t)[r] = dots([row(r)], &x[t * cols..][..cols])[0];
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn gemm_f32(w: &[f32], cols: usize, x: &[f32], y: ColsMut<'_>) {
    gemm(w, cols, x, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn gemm_f16(w: &[f16], cols: usize, x: &[f32], y: ColsMut<'_>) {
    gemm(w, cols, x, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn gemm_bf16(w: &[bf16], cols: usize, x: &[f32], y: ColsMut<'_>) {
    gemm(w, cols, x, y);
}
