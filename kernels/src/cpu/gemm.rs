//! GEMM: a weight matrix times rows of activations; GEMV is the case of one row.
//!
//! ```text
//! Maths   y[t, r] = sum over k of w[r, k] * x[t, k]
//! Packed  y[t, r] = sum over blocks b, in order, of
//!                   sw[r, b] * (sx[t, b] * (sum over i of u[r, b, i] * a[t, b, i]  -  zero * sum a[t, b]))
//! Dense   partial sum l of 16 takes k = l, l + 16, l + 32, ...; then 16 -> 8 -> 4 -> 2 -> 1,
//!         partial sum l plus partial sum l + half each time
//! Work    2 operations a weight and row; q4 reads 4.5 bits a weight, q8 8.5, bf16 16
//! Limit   one row: memory bandwidth; many rows: the multipliers
//! Exact   packed: integers inside a block (|sum| <= 32 * 128 * 127), times a power of two: exact;
//!         then f32 across blocks.  Dense: f32
//! ```
//!
//! A worker computes a range of weight rows for all rows of activations. A result depends on its
//! own weight row and activation row only: not on the range, nor on how many rows there are.

use super::Kernels;
use crate::view::{ColsMut, Dense, Elements};
use phidias_quant::activations::Activations;
use phidias_quant::packed::PANEL_ROWS;
use phidias_quant::{Format, Packed};
use std::ops::Range;

/// `y = x w^T` for the panels `panels` of `w`.
/// # Safety
/// The CPU has the features of the table; `w` is of the field's format; `panels` is inside `w`;
/// `x.blocks() == w.blocks()`, `x.zero()` is that of the format; `y` has `x.rows()` rows and the columns of those panels.
pub(super) type GemmPacked =
    unsafe fn(w: Packed<'_>, panels: Range<usize>, x: &Activations, y: ColsMut<'_>);

/// `y = x w^T` for the rows of `w`, `[y.cols(), cols]`, and `x`, `[y.rows(), cols]`.
/// # Safety
/// The CPU has the features of the table; `w.len() == y.cols() * cols`, `x.len() == y.rows() * cols`.
pub(super) type GemmDense<T> = unsafe fn(w: &[T], cols: usize, x: &[f32], y: ColsMut<'_>);

/// Columns of the result that `panels` of a matrix of `rows` rows make.
#[must_use]
pub(super) fn panel_cols(panels: &Range<usize>, rows: usize) -> usize {
    (panels.end * PANEL_ROWS).min(rows) - (panels.start * PANEL_ROWS).min(rows)
}

impl Kernels {
    /// int4 or int8 weights times int8 activations: `y[t, r] = <x[t], w[r]>` for the rows of
    /// `panels`; `y` is `[x.rows(), rows of those panels]`.
    /// # Panics
    /// When the shapes do not fit.
    pub fn gemm_packed(
        &self,
        w: Packed<'_>,
        panels: Range<usize>,
        x: &Activations,
        y: ColsMut<'_>,
    ) {
        let layout = w.layout();
        assert!(
            panels.start <= panels.end && panels.end <= layout.panels(),
            "panels {panels:?} of {}",
            layout.panels()
        );
        assert_eq!(
            x.blocks(),
            layout.blocks(),
            "blocks of the activations and of the weights"
        );
        assert_eq!(
            x.zero(),
            layout.format().zero(),
            "zero point of the activations and of the weights"
        );
        assert_eq!(
            y.rows(),
            x.rows(),
            "rows of the result and of the activations"
        );
        assert_eq!(
            y.cols(),
            panel_cols(&panels, layout.rows()),
            "columns of the result, rows of the panels"
        );
        let gemm = match layout.format() {
            Format::Q4 => self.gemm_q4,
            Format::Q8 => self.gemm_q8,
        };
        // SAFETY: the table exists only where the CPU has its features; shapes are checked above.
        unsafe { gemm(w, panels, x, y) }
    }

    /// Panels that a call of [`Kernels::gemm_packed`] with many tokens had better have: what it prepares serves
    /// them all.
    #[must_use]
    pub fn panels_a_call(&self) -> usize {
        self.panels_a_call
    }

    /// Bytes that a thread keeps once it has called [`Kernels::gemm_packed`] with many tokens, and
    /// [`Kernels::attend`] with many queries.
    #[must_use]
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// Weights as stored times f32 activations: `y[t, r] = <x[t], w[r]>` for `rows` of `w`;
    /// `x` is `[y.rows(), w.cols()]`, `y` is `[.., rows.len()]`.
    /// # Panics
    /// When the shapes do not fit.
    pub fn gemm_dense(&self, w: Dense<'_>, rows: Range<usize>, x: &[f32], y: ColsMut<'_>) {
        let cols = w.cols();
        assert!(
            rows.start <= rows.end && rows.end <= w.rows(),
            "rows {rows:?} of {}",
            w.rows()
        );
        assert_eq!(
            y.cols(),
            rows.len(),
            "columns of the result, rows of the weights"
        );
        assert_eq!(
            x.len(),
            y.rows() * cols,
            "activations of {} rows of {cols}",
            y.rows()
        );
        // SAFETY: the table exists only where the CPU has its features; shapes are checked above.
        unsafe {
            match w.elements().slice(rows.start * cols..rows.end * cols) {
                Elements::F32(w) => (self.gemm_f32)(w, cols, x, y),
                Elements::F16(w) => (self.gemm_f16)(w, cols, x, y),
                Elements::Bf16(w) => (self.gemm_bf16)(w, cols, x, y),
            }
        }
    }
}
