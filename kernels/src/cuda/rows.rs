//! Rows of activations as matrix products take them.

use super::device::Span;
use bytemuck::Pod;
use phidias_quant::{BLOCK, bf16};

/// Rows in blocks of signed bytes, the values of [`phidias_quant::activations`] in a plainer order:
/// `x = quant * scale`, every scale a power of two, or a NaN where a value was not finite.
#[derive(Clone, Copy, Debug)]
pub struct Quantized<'m> {
    /// Rows.
    pub rows: usize,
    /// Columns, which are padded with zeros to whole blocks of 32.
    pub cols: usize,
    /// `[rows][blocks][32]`
    pub quants: Span<'m, i8>,
    /// `[rows][blocks]`
    pub scales: Span<'m, f32>,
    /// `[rows][blocks]`, the sums of the quants: times a zero point, what that adds to a product.
    pub sums: Span<'m, i32>,
}

impl<'m> Quantized<'m> {
    /// Bytes that so many rows take.
    #[must_use]
    pub fn bytes(rows: usize, cols: usize) -> usize {
        rows * cols.div_ceil(BLOCK) * (BLOCK + 8)
    }

    /// Rows in `place`, which is at least as long as [`Quantized::bytes`] says.
    /// # Panics
    /// When it is shorter, or does not begin at a multiple of 4.
    #[must_use]
    pub fn new(place: Span<'m, u8>, rows: usize, cols: usize) -> Self {
        let blocks = rows * cols.div_ceil(BLOCK);
        let (scales, sums) = (blocks * BLOCK, blocks * (BLOCK + 4));
        Self {
            rows,
            cols,
            quants: place.slice(..scales).cast(),
            scales: place.slice(scales..sums).cast(),
            sums: place.slice(sums..Self::bytes(rows, cols)).cast(),
        }
    }

    /// Blocks in a row.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }
}

/// Rows rounded to bf16.
#[derive(Clone, Copy, Debug)]
pub struct Rounded<'m> {
    /// Rows.
    pub rows: usize,
    /// Columns, which are padded with zeros to a multiple of 32.
    pub cols: usize,
    /// `[rows][padded columns]`
    pub values: Span<'m, bf16>,
}

impl<'m> Rounded<'m> {
    /// Bytes that so many rows take.
    #[must_use]
    pub fn bytes(rows: usize, cols: usize) -> usize {
        rows * cols.next_multiple_of(BLOCK) * 2
    }

    /// Rows in `place`, which is at least as long as [`Rounded::bytes`] says.
    /// # Panics
    /// When it is shorter, or does not begin at an even address.
    #[must_use]
    pub fn new(place: Span<'m, u8>, rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            values: place.slice(..Self::bytes(rows, cols)).cast(),
        }
    }
}

/// The rows of a matrix of `cols` columns, as a launch takes both.
/// # Panics
/// When they are not whole, or too many.
pub(super) fn rows_of<T: Pod>(matrix: Span<'_, T>, cols: usize, what: &str) -> (u32, u32) {
    assert!(
        cols > 0 && cols <= i32::MAX as usize && matrix.len().is_multiple_of(cols),
        "{} {what} in rows of {cols}",
        matrix.len()
    );
    let rows = matrix.len() / cols;
    assert!(rows <= i32::MAX as usize, "{rows} rows of {what}");
    (rows as u32, cols as u32)
}
