//! What the packed GEMMs of the instruction sets have around their products; maths in `gemm.rs`.

#[cfg(target_arch = "x86_64")]
use super::prefetch::{self, RUNS};
use crate::view::ColsMut;
use phidias_quant::packed::PANEL_ROWS;
#[cfg(target_arch = "x86_64")]
use phidias_quant::{Packed, activations::Tile, packed::Panel};
#[cfg(target_arch = "x86_64")]
use std::ops::Range;

/// Tokens that a panel meets before the next one: their activations stay in the second-level cache.
pub(super) const TOKENS: usize = 128;

/// `gemm_q4` and `gemm_q8` compiled for `$features`.
///
/// Where it stands there must be `gemm::<LINES>(w, panels, x, y)`.
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
    };
}
pub(super) use packed_gemm;

/// Blocks of one of `R` panels that are multiplied before some of the next one's. Where panels are read together,
/// nibbles of two stay with their line of scales (one token: 16.0 GB/s instead of 15.3; bytes: 15.9 instead of 16.3).
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn blocks_in_turn<const LINES: usize, const R: usize>(blocks: usize) -> usize {
    match (R, LINES) {
        (1, _) => blocks.max(1),
        (_, 4) => 2,
        _ => 1,
    }
}

/// The panels that are to be read together with the first `tokens` tokens of a tile, if they are.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn several<'w>(
    w: Packed<'w>,
    left: &Range<usize>,
    tile: Tile<'_>,
    tokens: usize,
) -> Option<[Panel<'w>; RUNS]> {
    let several = prefetch::several_runs() && left.len() >= RUNS && tile.rows >= tokens;
    several.then(|| std::array::from_fn(|i| w.panel(left.start + i)))
}

/// `gemm` for [`packed_gemm`], some tokens at a time.
///
/// Where it stands there must be `tokens::<T, LINES, R>(panels, tile, first)`, the products `[[[f32; 16]; T]; R]` of `R`
/// panels, read together, with the tokens `first .. first + T` of a tile, for the numbers `$t` of tokens, which go up one
/// by one from 1.
#[cfg(target_arch = "x86_64")]
macro_rules! by_tokens {
    ($features:literal, $($t:literal)+) => {
        #[target_feature(enable = $features)]
        #[inline]
        pub(in crate::cpu) fn gemm<const LINES: usize>(
            w: Packed<'_>,
            panels: Range<usize>,
            x: &Activations,
            mut y: ColsMut<'_>,
        ) {
            const AT_ONCE: usize = [$($t),+].len();
            if x.tiles() == 1 && x.rows() <= AT_ONCE {
                return match x.rows() {
                    $($t => few::<$t, LINES>(w, panels, x.tile(0), &mut y),)+
                    _ => unreachable!("a tile has rows"),
                };
            }
            for tiles in (0..x.tiles()).step_by(TOKENS / TILE) {
                let tiles = tiles..(tiles + TOKENS / TILE).min(x.tiles());
                let mut left = panels.clone();
                while !left.is_empty() {
                    // Several panels are read with the first tokens, then each meets the others.
                    let column = (left.start - panels.start) * PANEL_ROWS;
                    let (some, met) = match several(w, &left, x.tile(tiles.start), AT_ONCE) {
                        Some(some) => {
                            let first = tokens::<AT_ONCE, LINES, RUNS>(some, x.tile(tiles.start), 0);
                            for (i, sums) in first.iter().enumerate() {
                                put(sums, (tiles.start * TILE, column + i * PANEL_ROWS), &mut y);
                            }
                            (RUNS, AT_ONCE)
                        }
                        None => (1, 0),
                    };
                    for i in 0..some {
                        let panel = w.panel(left.start + i);
                        for t in tiles.clone() {
                            let tile = x.tile(t);
                            let met = if t == tiles.start { met } else { 0 };
                            for first in (met..tile.rows).step_by(AT_ONCE) {
                                let at = (t * TILE + first, column + i * PANEL_ROWS);
                                match (tile.rows - first).min(AT_ONCE) {
                                    $($t => {
                                        let [sums] = tokens::<$t, LINES, 1>([panel], tile, first);
                                        put(&sums, at, &mut y);
                                    })+
                                    _ => unreachable!("a token is left"),
                                }
                            }
                        }
                    }
                    left.start += some;
                }
            }
        }

        /// Panels times the `T` tokens of a tile, which are all there are.
        #[target_feature(enable = $features)]
        #[inline]
        fn few<const T: usize, const LINES: usize>(
            w: Packed<'_>,
            panels: Range<usize>,
            x: Tile<'_>,
            y: &mut ColsMut<'_>,
        ) {
            let mut left = panels.clone();
            if prefetch::several_runs() {
                together::<T, LINES, RUNS>(w, &panels, &mut left, x, y);
            }
            together::<T, LINES, 1>(w, &panels, &mut left, x, y);
        }

        /// Takes panels, `R` at a time, of those that are left of `panels`.
        #[target_feature(enable = $features)]
        #[inline]
        fn together<const T: usize, const LINES: usize, const R: usize>(
            w: Packed<'_>,
            panels: &Range<usize>,
            left: &mut Range<usize>,
            x: Tile<'_>,
            y: &mut ColsMut<'_>,
        ) {
            while left.len() >= R {
                let some: [_; R] = std::array::from_fn(|i| w.panel(left.start + i));
                for sums in tokens::<T, LINES, R>(some, x, 0) {
                    put(&sums, (0, (left.start - panels.start) * PANEL_ROWS), y);
                    left.start += 1;
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use by_tokens;

/// Writes the products of a panel with some tokens from this row and column on, as far as there are columns.
#[inline(always)]
pub(super) fn put(sums: &[[f32; PANEL_ROWS]], at: (usize, usize), y: &mut ColsMut<'_>) {
    for (t, sums) in sums.iter().enumerate() {
        let y = &mut y.row(at.0 + t)[at.1..];
        let cols = y.len().min(PANEL_ROWS);
        y[..cols].copy_from_slice(&sums[..cols]);
    }
}
