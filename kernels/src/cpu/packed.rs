//! What the packed GEMMs of the instruction sets have around their products; maths in `gemm.rs`.

use crate::view::ColsMut;
use phidias_quant::packed::PANEL_ROWS;

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

/// `gemm` for [`packed_gemm`], some tokens at a time.
///
/// Where it stands there must be `tokens::<T, LINES>(panel, tile, first)`, the products `[[f32; 16]; T]` of a panel
/// with the tokens `first .. first + T` of a tile, for the numbers `$t` of tokens, which go up one by one
/// from 1, and `side_by_side::<LINES>(panels, tile)`, those of some panels that are read together with the only token.
#[cfg(target_arch = "x86_64")]
macro_rules! by_tokens {
    ($features:literal, $($t:literal)+) => {
        #[target_feature(enable = $features)]
        #[inline]
        fn gemm<const LINES: usize>(
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
                for (i, p) in panels.clone().enumerate() {
                    let panel = w.panel(p);
                    for t in tiles.clone() {
                        let tile = x.tile(t);
                        for first in (0..tile.rows).step_by(AT_ONCE) {
                            let at = (t * TILE + first, i * PANEL_ROWS);
                            match (tile.rows - first).min(AT_ONCE) {
                                $($t => put(&tokens::<$t, LINES>(panel, tile, first), at, &mut y),)+
                                _ => unreachable!("a token is left"),
                            }
                        }
                    }
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
            let mut rest = panels.clone();
            let mut put = |p: usize, sums: &[_]| {
                put(sums, (0, (p - panels.start) * PANEL_ROWS), y);
            };
            if T == 1 && prefetch::several_runs() {
                while rest.len() >= RUNS {
                    let four: [_; RUNS] = std::array::from_fn(|i| w.panel(rest.start + i));
                    for sums in side_by_side::<LINES>(four, x) {
                        put(rest.start, &[sums]);
                        rest.start += 1;
                    }
                }
            }
            for p in rest {
                put(p, &tokens::<T, LINES>(w.panel(p), x, 0));
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
