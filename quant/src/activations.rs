//! Activations as signed bytes: what an int4 or int8 matrix is multiplied with.
//!
//! ```text
//! Maths   block of 32 values of a row, amax their largest magnitude:
//!         scale = the smallest power of two with amax <= 127 * scale
//!         a     = round(x / scale), ties to even
//! ```
//!
//! A block has its own scale, so a result never depends on the rows or blocks beside it, and the
//! scale is a power of two, so that multiplying by it is exact and *free* in the kernels. They
//! start the integer sum of a block not at zero but at
//!
//! ```text
//! start = bits(magic) - zero * sum(a),      magic = 1.5 * 2^23 * scale
//! ```
//!
//! One unit in the last place of `magic` is `scale`. So when `sum(u * a)` of the unsigned weights
//! has been added to the *bits*, they are those of the float `magic + scale * sum((u - zero) * a)`:
//! subtracting `magic` gives the block's product with zero point and scale applied, without a
//! conversion, a multiplication or a rounding (|sum| <= 32 * 128 * 127 < 2^22 keeps the exponent).
//!
//! What it costs: a step is up to twice `amax / 127`, 1.47 times in the root mean square for amax
//! spread evenly over an octave. The README's table of formats has the effect on a model.
//!
//! Rows lie in *tiles* of [`TILE`], each `[blocks][rows of the tile][32]`: a GEMM multiplies a panel of
//! weights with a tile, and reads both front to back.

use crate::aligned::{ALIGN, Line, bytes_of, bytes_of_mut};
use crate::{BLOCK, round};

/// Rows in a tile; the last one may have fewer.
pub const TILE: usize = 8;

/// Blocks behind the last one, see [`Rest`].
const BEHIND: usize = TILE - 1;

/// 1.5 * 2^23: one unit in the last place is 1, with room for 2^22 of them in both directions.
pub const MAGIC: f32 = 12_582_912.0;

/// The smallest scale, below which blocks are all but zero, and the largest, beyond which `magic`
/// overflows: exponents of two.
const EXPONENTS: std::ops::RangeInclusive<i32> = -120..=103;

/// Rows of quantized activations. Columns are padded with zeros to whole blocks.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    rows: usize,
    blocks: usize,
    zero: i32,
    /// per tile `[blocks][rows of the tile][32]`
    quants: Vec<Line>,
    /// per tile `[blocks][rows of the tile]`, see the head of the module
    starts: Vec<i32>,
    /// likewise
    magics: Vec<f32>,
}

/// Up to [`TILE`] rows of [`Activations`].
#[derive(Clone, Copy, Debug)]
pub struct Tile<'a> {
    /// Rows of this tile.
    pub rows: usize,
    /// `[blocks][rows][32]`
    pub quants: &'a [i8],
    /// `[blocks][rows]`
    pub starts: &'a [i32],
    /// `[blocks][rows]`
    pub magics: &'a [f32],
}

/// Blocks of [`Activations`] from a tile on, as they lie: `[tiles][blocks][rows of the tile]`. Behind them are
/// `TILE - 1` that mean nothing, so that what reads [`TILE`] rows at a time may do so in a last tile that has fewer.
#[derive(Clone, Copy, Debug)]
pub struct Rest<'a> {
    /// The bytes.
    pub quants: &'a [[i8; BLOCK]],
    /// See the head of the module.
    pub starts: &'a [i32],
    /// Likewise.
    pub magics: &'a [f32],
}

/// Up to [`TILE`] rows of [`Activations`], to be filled.
#[derive(Debug)]
pub struct TileMut<'a> {
    /// Rows of this tile.
    pub rows: usize,
    /// The zero point of the weights they will meet.
    pub zero: i32,
    /// `[blocks][rows][32]`
    pub quants: &'a mut [i8],
    /// `[blocks][rows]`
    pub starts: &'a mut [i32],
    /// `[blocks][rows]`
    pub magics: &'a mut [f32],
}

impl<'a> TileMut<'a> {
    /// Blocks of each row.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.starts.len() / self.rows.max(1)
    }

    /// Pieces of `blocks` blocks of every row, front to back; the last one may have fewer.
    /// # Panics
    /// When `blocks` is zero.
    pub fn pieces(self, blocks: usize) -> impl Iterator<Item = TileMut<'a>> {
        let (rows, zero) = (self.rows, self.zero);
        let piece = blocks * rows;
        (self.quants.chunks_mut(piece * BLOCK))
            .zip(self.starts.chunks_mut(piece))
            .zip(self.magics.chunks_mut(piece))
            .map(move |((quants, starts), magics)| TileMut {
                rows,
                zero,
                quants,
                starts,
                magics,
            })
    }
}

/// One block of one row as plain numbers: what the definition of the GEMM reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block<'a> {
    /// The bytes.
    pub quants: &'a [i8; BLOCK],
    /// Their step; NaN when a value was not finite.
    pub scale: f32,
    /// Their sum.
    pub sum: i32,
}

impl Activations {
    /// Bytes of a row of `cols` values.
    #[must_use]
    pub fn bytes_per_row(cols: usize) -> usize {
        cols.div_ceil(BLOCK) * (BLOCK + size_of::<i32>() + size_of::<f32>())
    }

    /// Makes room for `rows` rows of `cols` values that will meet weights with the zero point
    /// `zero`; what was there is overwritten by the next use.
    pub fn reshape(&mut self, rows: usize, cols: usize, zero: i32) {
        self.rows = rows;
        self.zero = zero;
        self.blocks = cols.div_ceil(BLOCK);
        let blocks = rows * self.blocks + BEHIND;
        let lines = (blocks * BLOCK).div_ceil(ALIGN);
        if lines > self.quants.capacity() {
            // Growing would copy what is overwritten anyway, into up to twice the room.
            (self.quants, self.starts, self.magics) = Default::default();
        }
        self.quants.resize(lines, Line::default());
        self.starts.resize(blocks, 0);
        self.magics.resize(blocks, 0.0);
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Blocks in a row.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The zero point of the weights they are for.
    #[must_use]
    pub fn zero(&self) -> i32 {
        self.zero
    }

    /// Tiles of rows.
    #[must_use]
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// Tile `i`.
    #[must_use]
    pub fn tile(&self, i: usize) -> Tile<'_> {
        let rows = (self.rows - i * TILE).min(TILE);
        let range = i * TILE * self.blocks..(i * TILE + rows) * self.blocks;
        let quants: &[i8] = bytemuck::cast_slice(bytes_of(&self.quants));
        Tile {
            rows,
            quants: &quants[range.start * BLOCK..range.end * BLOCK],
            starts: &self.starts[range.clone()],
            magics: &self.magics[range],
        }
    }

    /// Tile `i` and all that lies behind it.
    /// # Panics
    /// When there is no such tile.
    #[must_use]
    pub fn rest(&self, i: usize) -> Rest<'_> {
        assert!(i < self.tiles(), "tile {i} of {}", self.tiles());
        let range = i * TILE * self.blocks..self.rows * self.blocks + BEHIND;
        let quants: &[i8] = bytemuck::cast_slice(bytes_of(&self.quants));
        Rest {
            quants: &quants.as_chunks().0[range.clone()],
            starts: &self.starts[range.clone()],
            magics: &self.magics[range],
        }
    }

    /// The tiles one after the other, each to be filled by [`quantize`] or a faster twin of it.
    pub fn tiles_mut(&mut self) -> impl Iterator<Item = TileMut<'_>> {
        let blocks = self.rows * self.blocks;
        let tile = (TILE * self.blocks).max(1);
        let per_row = self.blocks.max(1);
        let zero = self.zero;
        let quants: &mut [i8] = bytemuck::cast_slice_mut(bytes_of_mut(&mut self.quants));
        (quants[..blocks * BLOCK].chunks_mut(tile * BLOCK))
            .zip(self.starts[..blocks].chunks_mut(tile))
            .zip(self.magics[..blocks].chunks_mut(tile))
            .map(move |((quants, starts), magics)| TileMut {
                rows: starts.len() / per_row,
                zero,
                quants,
                starts,
                magics,
            })
    }

    /// Block `b` of row `r`.
    #[must_use]
    pub fn block(&self, r: usize, b: usize) -> Block<'_> {
        let tile = self.tile(r / TILE);
        let at = b * tile.rows + r % TILE;
        let quants = tile.quants.as_chunks::<BLOCK>().0;
        let quants = &quants[at];
        Block {
            quants,
            scale: tile.magics[at] / MAGIC,
            sum: quants.iter().map(|q| i32::from(*q)).sum(),
        }
    }
}

/// The step of a block whose largest magnitude is `amax`: the smallest power of two with
/// `amax <= 127 * step`, within the range of the format; NaN when there is none.
#[inline(always)]
#[must_use]
pub fn step(amax: f32) -> f32 {
    // amax = m * 2^e with 1 <= m < 2. When m <= 127/64, 2^(e - 6) is enough, else 2^(e - 5): what
    // is added carries into the exponent just then.
    let carried = (amax.to_bits() + 0x1_FFFF) >> 23;
    let exponent = carried as i32 - 127 - 6;
    if exponent > *EXPONENTS.end() {
        return f32::NAN;
    }
    f32::from_bits(((exponent.max(*EXPONENTS.start()) + 127) as u32) << 23)
}

/// The definition, for row `row` of a tile.
///
/// A value that is not finite, or too large, makes its block's scale NaN, so that it cannot pass
/// unseen.
/// # Panics
/// When `x` does not fill the tile's blocks (short only in the last one), or there is no such row.
#[inline]
pub fn quantize(x: &[f32], tile: &mut TileMut<'_>, row: usize) {
    let blocks = tile.starts.len() / tile.rows;
    assert_eq!(x.len().div_ceil(BLOCK), blocks, "blocks of the row");
    assert!(row < tile.rows, "row {row} of {}", tile.rows);
    let (quants, _) = tile.quants.as_chunks_mut::<BLOCK>();
    for (b, values) in x.chunks(BLOCK).enumerate() {
        let mut block = [0.0; BLOCK];
        block[..values.len()].copy_from_slice(values);
        let amax = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // A maximum may pass over a NaN.
        let scale = if block.iter().any(|v| v.is_nan()) {
            f32::NAN
        } else {
            step(amax)
        };
        let inverse = if scale.is_nan() { 0.0 } else { 1.0 / scale };
        let at = b * tile.rows + row;
        let mut sum = 0;
        for (q, v) in quants[at].iter_mut().zip(block) {
            // Zero times infinity is NaN, which becomes the integer 0.
            *q = round(v * inverse) as i8;
            sum += i32::from(*q);
        }
        tile.magics[at] = MAGIC * scale;
        tile.starts[at] = ((MAGIC * scale).to_bits() as i32).wrapping_sub(tile.zero * sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn quantized(x: &[f32], cols: usize) -> Activations {
        let mut act = Activations::default();
        act.reshape(x.len() / cols, cols, 8);
        for (tile, x) in act.tiles_mut().zip(x.chunks(TILE * cols)) {
            let mut tile = tile;
            for (r, x) in x.chunks_exact(cols).enumerate() {
                quantize(x, &mut tile, r);
            }
        }
        act
    }

    proptest! {
        #[test]
        fn round_trip_is_within_half_a_step(
            (cols, x) in (1usize..100, prop::collection::vec(-100.0f32..100.0, 1..4000)),
        ) {
            let rows = x.len() / cols;
            let x = &x[..rows * cols];
            prop_assume!(rows > 0);
            let act = quantized(x, cols);
            for (r, x) in x.chunks_exact(cols).enumerate() {
                for (b, x) in x.chunks(BLOCK).enumerate() {
                    let block = act.block(r, b);
                    for (v, q) in x.iter().zip(block.quants) {
                        prop_assert!((v - f32::from(*q) * block.scale).abs() <= block.scale * 0.5);
                    }
                    let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    prop_assert!(amax <= 127.0 * block.scale && amax > 63.5 * block.scale);
                    prop_assert!(block.quants[x.len()..].iter().all(|q| *q == 0));
                    // The start is what it is said to be.
                    let tile = act.tile(r / TILE);
                    let at = b * tile.rows + r % TILE;
                    let start = (MAGIC * block.scale).to_bits() as i32 - 8 * block.sum;
                    prop_assert_eq!(tile.starts[at], start);
                }
            }
        }

        #[test]
        fn adding_to_the_bits_is_exact(k in -120i32..=103, sum in -(1i32 << 22)..(1 << 22)) {
            let scale = 2f32.powi(k.max(-126));
            let magic = MAGIC * scale;
            let got = f32::from_bits((magic.to_bits() as i32 + sum) as u32) - magic;
            prop_assert_eq!(f64::from(got), f64::from(sum) * f64::from(scale));
        }
    }

    #[test]
    fn the_step_is_the_smallest_power_of_two_that_holds() {
        for e in -100..100 {
            for m in [
                1.0,
                1.5,
                127.0 / 64.0,
                f32::from_bits((127.0f32 / 64.0).to_bits() + 1),
                1.999,
            ] {
                let amax = m * 2f32.powi(e);
                let s = step(amax);
                assert!(amax <= 127.0 * s && amax > 127.0 * s / 2.0, "{amax} {s}");
                assert_eq!(s.to_bits() & 0x7F_FFFF, 0);
            }
        }
        assert_eq!(step(0.0), 2f32.powi(-120));
        assert!(step(f32::MAX).is_nan() && step(f32::INFINITY).is_nan());
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        let mut x = [1.0; 40];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            x[3] = bad;
            let act = quantized(&x, 40);
            assert!(act.block(0, 0).scale.is_nan() && act.block(0, 1).scale > 0.0);
        }
    }

    #[test]
    fn subnormal_rows_stay_in_range() {
        let act = quantized(&[f32::from_bits(1); 32], 32);
        assert!(act.block(0, 0).quants.iter().all(|q| *q == 0));
    }
}
