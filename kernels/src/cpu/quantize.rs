//! Quantization of a row of activations to int8 blocks; see [`phidias_quant::activations`].

use super::Kernels;
use phidias_quant::BLOCK;
use phidias_quant::activations::TileMut;

/// # Safety
/// The CPU has the features of the table; `x` fills the blocks of the tile (short only in the last
/// one); `row` is a row of the tile.
pub(super) type Quantize = unsafe fn(x: &[f32], tile: &mut TileMut<'_>, row: usize);

impl Kernels {
    /// Quantizes one row of activations into row `row` of a tile.
    /// # Panics
    /// When the row does not fill the blocks of the tile, or there is no such row.
    pub fn quantize(&self, x: &[f32], tile: &mut TileMut<'_>, row: usize) {
        assert!(row < tile.rows, "row {row} of {}", tile.rows);
        let blocks = tile.rows * x.len().div_ceil(BLOCK);
        assert_eq!(blocks, tile.starts.len(), "blocks of the tile");
        assert_eq!(blocks, tile.magics.len(), "blocks of the tile");
        assert_eq!(blocks * BLOCK, tile.quants.len(), "bytes of the tile");
        // SAFETY: the table exists only where the CPU has its features; lengths are checked above.
        unsafe { (self.quantize)(x, tile, row) }
    }
}
