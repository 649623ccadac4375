//! Rows of activations as matrix products take them.

use super::device::Span;
use bytemuck::{Pod, Zeroable};
use phidias_quant::BLOCK;

/// What a block of 32 quantized activations has beside them; see [`phidias_quant::activations`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Head {
    /// The bits of `magic` less the zero point of the weights times the sum of the quants.
    pub start: i32,
    /// `1.5 * 2^23 * scale`; a NaN where a value was not finite.
    pub magic: f32,
}

/// Activations as a matrix takes them, `[rows][blocks][32]`; columns past the last are zeros.
#[derive(Clone, Copy, Debug)]
pub enum Activations<'m> {
    /// For packed matrices.
    Quantized {
        /// `[rows][blocks][32]`
        quants: Span<'m, i8>,
        /// `[rows][blocks]`
        heads: Span<'m, Head>,
        /// The zero point of the format, which the heads are for.
        zero: i32,
    },
    /// For matrices of bf16: the bits, rounded to nearest even.
    Bf16(Span<'m, u16>),
    /// For matrices of f32 and f16.
    F32(Span<'m, f32>),
}

/// What activations are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// [`Activations::Quantized`] for weights with that zero point.
    Quantized {
        /// 8 of q4, 128 of q8.
        zero: i32,
    },
    /// [`Activations::Bf16`]
    Bf16,
    /// [`Activations::F32`]
    F32,
}

impl Form {
    /// Bytes that so many rows take.
    #[must_use]
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        let blocks = rows * cols.div_ceil(BLOCK);
        blocks
            * match self {
                Self::Quantized { .. } => BLOCK + size_of::<Head>(),
                Self::Bf16 => 2 * BLOCK,
                Self::F32 => 4 * BLOCK,
            }
    }

    /// Rows at the beginning of `place`.
    /// # Panics
    /// When it is shorter than [`Form::bytes`], or its address is not a multiple of 16.
    #[must_use]
    pub fn place(self, place: Span<'_, u8>, rows: usize, cols: usize) -> Activations<'_> {
        let place = place.slice(..self.bytes(rows, cols));
        assert!(place.is_aligned(16), "activations at {place:?}");
        match self {
            Self::Quantized { zero } => {
                let quants = rows * cols.next_multiple_of(BLOCK);
                Activations::Quantized {
                    quants: place.slice(..quants).cast(),
                    heads: place.slice(quants..).cast(),
                    zero,
                }
            }
            Self::Bf16 => Activations::Bf16(place.cast()),
            Self::F32 => Activations::F32(place.cast()),
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
