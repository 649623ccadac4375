//! What the packed GEMMs of the instruction sets have around their products; maths in `gemm.rs`.

use crate::view::ColsMut;
use phidias_quant::packed::PANEL_ROWS;

/// Tokens that a panel meets before the next one: their activations stay in the second-level cache.
pub(super) const TOKENS: usize = 128;

/// `gemm_q4` and `gemm_q8` compiled for `$features`.
///
/// Where it stands there must be `panel::<LINES>(panel, x, tiles, column, y)`, the products of a panel with some tiles,
/// written from a column on.
macro_rules! packed_gemm {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(in crate::cpu) fn gemm_q4(
            w: phidias_quant::Packed<'_>,
            panels: std::ops::Range<usize>,
            x: &phidias_quant::activations::Activations,
            y: crate::view::ColsMut<'_>,
        ) {
            gemm::<4>(w, panels, x, y);
        }

        #[target_feature(enable = $features)]
        pub(in crate::cpu) fn gemm_q8(
            w: phidias_quant::Packed<'_>,
            panels: std::ops::Range<usize>,
            x: &phidias_quant::activations::Activations,
            y: crate::view::ColsMut<'_>,
        ) {
            gemm::<8>(w, panels, x, y);
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn gemm<const LINES: usize>(
            w: phidias_quant::Packed<'_>,
            panels: std::ops::Range<usize>,
            x: &phidias_quant::activations::Activations,
            mut y: crate::view::ColsMut<'_>,
        ) {
            const TILES: usize = crate::cpu::packed::TOKENS / phidias_quant::activations::TILE;
            for first in (0..x.tiles()).step_by(TILES) {
                let tiles = first..(first + TILES).min(x.tiles());
                for (i, p) in panels.clone().enumerate() {
                    panel::<LINES>(w.panel(p), x, tiles.clone(), i * PANEL_ROWS, &mut y);
                }
            }
        }
    };
}
pub(super) use packed_gemm;

/// `panel` for [`packed_gemm`], some tokens at a time.
///
/// Where it stands there must be `tokens::<T, LINES>(panel, tile, first)`, the products `[[f32; 16]; T]` of a panel
/// with the tokens `first .. first + T` of a tile, for the numbers `$t` of tokens, which go up one by one
/// from 1.
#[cfg(target_arch = "x86_64")]
macro_rules! by_tokens {
    ($features:literal, $($t:literal)+) => {
        #[target_feature(enable = $features)]
        #[inline]
        fn panel<const LINES: usize>(
            panel: Panel<'_>,
            x: &phidias_quant::activations::Activations,
            tiles: std::ops::Range<usize>,
            column: usize,
            y: &mut crate::view::ColsMut<'_>,
        ) {
            const AT_ONCE: usize = [$($t),+].len();
            for i in tiles {
                let tile = x.tile(i);
                for first in (0..tile.rows).step_by(AT_ONCE) {
                    let row = i * phidias_quant::activations::TILE + first;
                    match (tile.rows - first).min(AT_ONCE) {
                        $($t => {
                            let sums = tokens::<$t, LINES>(panel, tile, first);
                            crate::cpu::packed::put(&sums, row, column, y);
                        })+
                        _ => unreachable!("a token is left"),
                    }
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use by_tokens;

/// Writes the products of a panel with some tokens from row `row` and column `column` on, as far as there are columns.
#[inline(always)]
pub(super) fn put(sums: &[[f32; PANEL_ROWS]], row: usize, column: usize, y: &mut ColsMut<'_>) {
    for (t, sums) in sums.iter().enumerate() {
        let y = &mut y.row(row + t)[column..];
        let cols = y.len().min(PANEL_ROWS);
        y[..cols].copy_from_slice(&sums[..cols]);
    }
}
