//! Quantization of a row of activations to int8 blocks; see [`phidias_quant::activations`].

use super::Kernels;
use phidias_quant::BLOCK;
use phidias_quant::activations::RowMut;

impl Kernels {
    /// Quantizes one row of activations.
    /// # Panics
    /// When the row does not fill the blocks of `out`.
    pub fn quantize(&self, x: &[f32], out: RowMut<'_>) {
        assert_eq!(
            x.len().div_ceil(BLOCK),
            out.scales.len(),
            "blocks of the row"
        );
        // SAFETY: the table exists only where the CPU has its features; lengths are checked above.
        unsafe { (self.quantize)(x, out) }
    }
}
