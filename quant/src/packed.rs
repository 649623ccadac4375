//! The packed order: how an int4 or int8 matrix lies in memory and in a file.
//!
//! A matrix `[rows, cols]` is cut into *panels* of 16 rows (the last one padded with rows of
//! zeros) and each row into *blocks* of 32 columns (the last one padded with zeros). A panel is made
//! of 64-byte *lines*, and two blocks share a line of scales, which stands before them:
//!
//! ```text
//! | f16 scales of blocks 0, 1 [2][16] | quants of block 0 | quants of block 1 | scales of 2, 3 | ...
//! ```
//!
//! Of an odd number the last block stands alone, and half of its line of scales is zero. Each line of quants
//! holds four consecutive columns of all 16 rows, so byte `4 r + j` of a line belongs to row `r`:
//!
//! ```text
//! q8, 8 lines:  line g, byte 4 r + j             = u of row r, column 4 g + j
//! q4, 4 lines:  line g, byte 4 r + j, low nibble = row r, column 4 g + j
//!                                     high nibble = row r, column 4 (g + 4) + j
//! ```
//!
//! One order serves every instruction set, because each takes its piece of a line:
//!
//! | | register | rows in it | inner product of four |
//! |---|---|---|---|
//! | AVX-512 VNNI | 64 bytes | 16 | `vpdpbusd` |
//! | AMX | the same, converted to tiles of bf16 | 16 | `tdpbf16ps` |
//! | AVX2 | 32 bytes | 8 | `vpmaddubsw`, `vpmaddwd` |
//! | NEON dotprod | 16 bytes | 4 | `sdot` by lane |
//! | NEON i8mm | 16 bytes | 4 | `zip1`/`zip2` of two lines give the 2 x 8 tiles of `smmla` |
//!
//! The lanes of a register are rows, so no sum across lanes is needed, and the four columns that
//! one inner product takes are a 4-byte broadcast of the activations. Everything starts on a
//! 64-byte boundary and is read front to back, once and line by line: what the hardware prefetches
//! best. (With the scales of a panel before all of its quants, one core of a Zen 4 read at 0.70 of the
//! speed of memory instead of 0.95: each panel was two streams, and both began anew with each.)

use crate::{ALIGN, BLOCK, Line, q4, q8};
use half::f16;

/// Rows in a panel.
pub const PANEL_ROWS: usize = 16;
/// Bytes in a line: four columns of every row of a panel.
pub const LINE: usize = PANEL_ROWS * 4;
/// The version of the order, named in every prepacked file.
pub const VERSION: u32 = 2;

/// A block format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Four bits a weight, see [`q4`].
    Q4,
    /// Eight bits a weight, see [`q8`].
    Q8,
}

impl Format {
    /// The name in files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4 => "q4",
            Self::Q8 => "q8",
        }
    }

    /// The format of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Q4, Self::Q8].into_iter().find(|f| f.name() == name)
    }

    /// Bytes of the quants of one block of a panel.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4 => PANEL_ROWS * BLOCK / 2,
            Self::Q8 => PANEL_ROWS * BLOCK,
        }
    }

    /// Where in a panel block `b` has its quants, in bytes.
    fn quants_at(self, b: usize) -> usize {
        LINE + b / 2 * self.pair_bytes() + b % 2 * self.block_bytes()
    }

    /// Where in a panel row `r` of block `b` has its scale, in bytes.
    fn scale_at(self, b: usize, r: usize) -> usize {
        b / 2 * self.pair_bytes() + (b % 2 * PANEL_ROWS + r) * size_of::<f16>()
    }

    /// Bytes of two blocks and their line of scales.
    fn pair_bytes(self) -> usize {
        LINE + 2 * self.block_bytes()
    }

    /// The quant that stands for zero.
    #[must_use]
    pub fn zero(self) -> i32 {
        match self {
            Self::Q4 => q4::ZERO,
            Self::Q8 => q8::ZERO,
        }
    }
}

/// Why a matrix cannot be packed, or bytes are not a packed matrix.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PackError {
    /// `rows * cols` in this format does not fit in the address space, or a side is zero.
    #[error("a matrix of {rows} x {cols} cannot be packed")]
    Shape {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// The bytes are not as many as the shape needs.
    #[error("a {format} matrix of {rows} x {cols} takes {expected} bytes, found {found}")]
    Length {
        /// Format name.
        format: &'static str,
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes there.
        found: usize,
    },
    /// The bytes do not start on a 64-byte boundary.
    #[error("packed data must start on a 64-byte boundary, found an address {0} bytes past one")]
    Misaligned(usize),
    /// A weight cannot be represented.
    #[error(
        "expected finite weights of which an f16 scale can be made, found {found} in row {row}, block {block}"
    )]
    Weight {
        /// Row within the panel.
        row: usize,
        /// Block of 32 columns.
        block: usize,
        /// The largest of the block, or what is no number.
        found: f32,
    },
}

/// Shape and format of a packed matrix, with every size computed once and known not to overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    format: Format,
    rows: usize,
    cols: usize,
    bytes: usize,
}

impl PackedLayout {
    /// The layout of a `[rows, cols]` matrix.
    /// # Errors
    /// [`PackError::Shape`] when a side is zero or the size overflows.
    pub fn new(format: Format, rows: usize, cols: usize) -> Result<Self, PackError> {
        let bytes = (|| {
            let blocks = cols.div_ceil(BLOCK);
            let scales = blocks.div_ceil(2).checked_mul(LINE)?;
            let panel = blocks
                .checked_mul(format.block_bytes())?
                .checked_add(scales)?;
            let bytes = rows.div_ceil(PANEL_ROWS).checked_mul(panel)?;
            (rows > 0 && cols > 0 && isize::try_from(bytes).is_ok()).then_some(bytes)
        })();
        let bytes = bytes.ok_or(PackError::Shape { rows, cols })?;
        Ok(Self {
            format,
            rows,
            cols,
            bytes,
        })
    }

    /// Block format.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }
    /// Rows of the matrix.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Columns of the matrix.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Blocks in a row.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }
    /// Panels of 16 rows.
    #[must_use]
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }
    /// Bytes of the whole matrix.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    /// Bytes of one panel, a multiple of 64.
    #[must_use]
    pub fn panel_bytes(&self) -> usize {
        self.blocks().div_ceil(2) * LINE + self.blocks() * self.format.block_bytes()
    }
}

/// A packed matrix `[rows, cols]` over borrowed bytes.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    layout: PackedLayout,
    bytes: &'a [u8],
}

/// One panel of a packed matrix: 16 rows.
#[derive(Clone, Copy, Debug)]
pub struct Panel<'a> {
    lines: &'a [Line],
    blocks: usize,
}

/// One block of a panel: 32 columns of 16 rows. `LINES` is 4 for q4, 8 for q8.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a, const LINES: usize> {
    /// One for each row.
    pub scales: &'a [f16; PANEL_ROWS],
    /// Four columns of every row a line.
    pub quants: &'a [[u8; LINE]; LINES],
}

impl<'a> Panel<'a> {
    /// Blocks of 32 columns.
    #[inline(always)]
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes from its beginning to that of the next panel.
    #[inline(always)]
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines)
    }

    /// Block `b` of a panel in the format of `LINES`.
    /// # Panics
    /// When it has fewer.
    #[inline(always)]
    #[must_use]
    pub fn block<const LINES: usize>(&self, b: usize) -> Block<'a, LINES> {
        let pair = &self.lines[b / 2 * (1 + 2 * LINES)..];
        let scales: &[[f16; PANEL_ROWS]; 2] = bytemuck::must_cast_ref(&pair[0]);
        let quants: &[Line] = &pair[1 + b % 2 * LINES..][..LINES];
        let (quants, _) = bytemuck::must_cast_slice(quants).as_chunks();
        Block {
            scales: &scales[b % 2],
            quants: &quants[0],
        }
    }
}

impl<'a> Packed<'a> {
    /// A view of `bytes` as a matrix of that layout.
    /// # Errors
    /// [`PackError::Length`] or [`PackError::Misaligned`].
    pub fn new(layout: PackedLayout, bytes: &'a [u8]) -> Result<Self, PackError> {
        if bytes.len() != layout.bytes {
            return Err(PackError::Length {
                format: layout.format.name(),
                rows: layout.rows,
                cols: layout.cols,
                expected: layout.bytes,
                found: bytes.len(),
            });
        }
        match bytes.as_ptr() as usize % ALIGN {
            0 => Ok(Self { layout, bytes }),
            off => Err(PackError::Misaligned(off)),
        }
    }

    /// Its layout.
    #[must_use]
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// Panel `p`, rows `16 p ..`.
    #[must_use]
    pub fn panel(&self, p: usize) -> Panel<'a> {
        let size = self.layout.panel_bytes();
        let bytes = &self.bytes[p * size..][..size];
        Panel {
            lines: bytemuck::cast_slice(bytes),
            blocks: self.layout.blocks(),
        }
    }

    /// Row `row` as the weights it stands for.
    /// # Panics
    /// When `out` is not `cols` long or `row` is outside.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.layout.rows, "row {row} of {}", self.layout.rows);
        assert_eq!(out.len(), self.layout.cols, "columns");
        let size = self.layout.panel_bytes();
        let panel = &self.bytes[row / PANEL_ROWS * size..][..size];
        let (format, r) = (self.layout.format, row % PANEL_ROWS);
        for (b, out) in out.chunks_mut(BLOCK).enumerate() {
            let at = format.scale_at(b, r);
            let scale = f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
            let quants = &panel[format.quants_at(b)..][..format.block_bytes()];
            for (i, v) in out.iter_mut().enumerate() {
                let q = quant(format, quants, r, i);
                *v = (i32::from(q) - format.zero()) as f32 * scale;
            }
        }
    }
}

/// The quant of row `r` and column `i` of a block.
fn quant(format: Format, block: &[u8], r: usize, i: usize) -> u8 {
    let at = |g: usize| block[g * LINE + r * 4 + i % 4];
    match format {
        Format::Q8 => at(i / 4),
        Format::Q4 if i < BLOCK / 2 => at(i / 4) & 15,
        Format::Q4 => at(i / 4 - 4) >> 4,
    }
}

/// Quantizes and packs one panel.
///
/// `rows` holds up to 16 rows of `cols` weights one after the other; `out` is the panel's bytes.
/// # Errors
/// [`PackError::Weight`] for a weight that is not finite or too large.
/// # Panics
/// When a length does not fit the layout.
pub fn pack_panel(layout: &PackedLayout, rows: &[f32], out: &mut [u8]) -> Result<(), PackError> {
    let cols = layout.cols;
    assert!(
        rows.len().is_multiple_of(cols) && rows.len() <= PANEL_ROWS * cols,
        "{} weights",
        rows.len()
    );
    assert_eq!(out.len(), layout.panel_bytes(), "bytes of a panel");
    // Padding rows and columns: zero at the zero point, scale zero.
    let format = layout.format;
    let nothing = match format {
        Format::Q4 => 0x88,
        Format::Q8 => 128,
    };
    out.fill(0);
    for b in 0..layout.blocks() {
        out[format.quants_at(b)..][..format.block_bytes()].fill(nothing);
    }
    for (r, row) in rows.chunks_exact(cols).enumerate() {
        for (b, values) in row.chunks(BLOCK).enumerate() {
            let mut x = [0.0; BLOCK];
            x[..values.len()].copy_from_slice(values);
            let lines = &mut out[format.quants_at(b)..][..format.block_bytes()];
            let bad = || PackError::Weight {
                row: r,
                block: b,
                found: (x.into_iter())
                    .max_by(|a, b| a.abs().total_cmp(&b.abs()))
                    .unwrap_or(f32::NAN),
            };
            let scale = match format {
                Format::Q4 => {
                    let block = q4::quantize(&x).ok_or_else(bad)?;
                    for (j, &byte) in block.nibbles.iter().enumerate() {
                        lines[j / 4 * LINE + r * 4 + j % 4] = byte;
                    }
                    block.scale
                }
                Format::Q8 => {
                    let block = q8::quantize(&x).ok_or_else(bad)?;
                    for (j, &byte) in block.quants.iter().enumerate() {
                        lines[j / 4 * LINE + r * 4 + j % 4] = byte;
                    }
                    block.scale
                }
            };
            let at = format.scale_at(b, r);
            out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlignedBytes;
    use proptest::prelude::*;

    fn pack(format: Format, rows: usize, cols: usize, w: &[f32]) -> (PackedLayout, AlignedBytes) {
        let layout = PackedLayout::new(format, rows, cols).unwrap();
        let mut bytes = AlignedBytes::try_zeroed(layout.bytes()).unwrap();
        for (panel, out) in w
            .chunks(PANEL_ROWS * cols)
            .zip(bytes.as_mut().chunks_mut(layout.panel_bytes()))
        {
            pack_panel(&layout, panel, out).unwrap();
        }
        (layout, bytes)
    }

    proptest! {
        #[test]
        fn packing_keeps_every_block(
            (rows, cols, seed) in (1usize..40, 1usize..100, any::<u64>()),
            q4 in any::<bool>(),
        ) {
            let format = if q4 { Format::Q4 } else { Format::Q8 };
            let mut state = seed;
            let w: Vec<f32> = (0..rows * cols).map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / 8388608.0 - 1.0
            }).collect();
            let (layout, bytes) = pack(format, rows, cols, &w);
            let packed = Packed::new(layout, bytes.as_ref()).unwrap();
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                packed.dequantize_row(r, &mut row);
                for (b, values) in w[r * cols..][..cols].chunks(BLOCK).enumerate() {
                    let mut x = [0.0; BLOCK];
                    x[..values.len()].copy_from_slice(values);
                    let want = match format {
                        Format::Q4 => q4::dequantize(&q4::quantize(&x).unwrap()),
                        Format::Q8 => q8::dequantize(&q8::quantize(&x).unwrap()),
                    };
                    prop_assert_eq!(&row[b * BLOCK..][..values.len()], &want[..values.len()]);
                }
            }
        }
    }

    #[test]
    fn sizes_that_disagree_are_refused() {
        let (layout, bytes) = pack(Format::Q4, 17, 33, &[0.25; 17 * 33]);
        assert_eq!(
            (layout.panels(), layout.blocks(), layout.panel_bytes()),
            (2, 2, 64 + 512)
        );
        let all = bytes.as_ref();
        assert!(matches!(
            Packed::new(layout, &all[64..]),
            Err(PackError::Length { found: 1088, .. })
        ));
        let one = PackedLayout::new(Format::Q8, 1, 1).unwrap();
        let shifted = AlignedBytes::try_zeroed(one.bytes() + 8).unwrap();
        assert_eq!(
            Packed::new(one, &shifted.as_ref()[8..]).unwrap_err(),
            PackError::Misaligned(8)
        );
        for (rows, cols) in [
            (0, 1),
            (1, 0),
            (usize::MAX, 2),
            (2, usize::MAX),
            (1 << 40, 1 << 40),
        ] {
            assert_eq!(
                PackedLayout::new(Format::Q4, rows, cols),
                Err(PackError::Shape { rows, cols })
            );
        }
    }

    #[test]
    fn a_weight_that_cannot_be_kept_is_named() {
        let layout = PackedLayout::new(Format::Q4, 2, 64).unwrap();
        let mut out = vec![0; layout.panel_bytes()];
        for (bad, word) in [(f32::NAN, "found NaN"), (-1e9, "found -1000000000")] {
            let mut w = vec![0.5; 128];
            w[64 + 40] = bad;
            let error = pack_panel(&layout, &w, &mut out).unwrap_err();
            let named = format!("{word} in row 1, block 1");
            assert!(error.to_string().ends_with(&named), "{error}");
        }
    }
}
