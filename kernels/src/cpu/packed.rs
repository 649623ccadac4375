//! What the packed GEMMs of the instruction sets have around their products; maths in `gemm.rs`.

/// Tokens that pass a block of weights before the next one is unpacked.
pub(super) const TOKENS: usize = 128;
/// Tokens of one inner loop; so few are decoding, limited by memory.
#[cfg(target_arch = "x86_64")]
pub(super) const GROUP: usize = 4;

/// Panels that are read side by side for one token, where that is faster than one after the other.
#[cfg(target_arch = "x86_64")]
pub(super) const STREAMS: usize = 4;

/// `gemm_q4` and `gemm_q8` compiled for `$features`, panel by panel.
///
/// Where it stands there must be `few::<T, P, LINES>(panels, tile, sums)`, `P` panels at once times `T`
/// tokens of one tile, up to 4; `many::<LINES>(panel, tiles, sums)`, a panel times up to
/// [`TOKENS`]; `STREAMS`, the panels at once for one token; and `Sums`, the sums of a panel's rows in order,
/// `[[f32; 16 / PARTS]; PARTS]`.
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
            y: crate::view::ColsMut<'_>,
        ) {
            use crate::cpu::packed::TOKENS;
            // The sums of the panels at once lie in registers: half as many panels for two tokens.
            match x.rows() {
                1 => streams::<1, STREAMS, LINES>(w, panels, x, y),
                2 => streams::<2, { STREAMS.div_ceil(2) }, LINES>(w, panels, x, y),
                3 => streams::<3, 1, LINES>(w, panels, x, y),
                4 => streams::<4, 1, LINES>(w, panels, x, y),
                _ => panel_by_panel::<LINES>(w, panels, x, y, &mut [ZERO; TOKENS]),
            }
        }

        const ZERO: Sums = [[0.0; PANEL_ROWS / PARTS]; PARTS];

        /// All panels times `T` tokens, `P` panels at once.
        #[target_feature(enable = $features)]
        #[inline]
        fn streams<const T: usize, const P: usize, const LINES: usize>(
            w: phidias_quant::Packed<'_>,
            panels: std::ops::Range<usize>,
            x: &phidias_quant::activations::Activations,
            mut y: crate::view::ColsMut<'_>,
        ) {
            // As many rows as a tile has at most: there is one.
            let Some((_, tiles, ..)) = x.tile_groups::<1>().next() else {
                return;
            };
            let mut p = panels.start;
            while p < panels.end {
                let mut sums = [[ZERO; T]; P];
                let at_once = if p + P <= panels.end {
                    let all = std::array::from_fn(|i| w.panel(p + i));
                    few::<T, P, LINES>(all, tiles[0], &mut sums);
                    P
                } else {
                    let (first, _) = sums.split_first_chunk_mut().expect("one panel at least");
                    few::<T, 1, LINES>([w.panel(p)], tiles[0], first);
                    1
                };
                for (i, sums) in sums[..at_once].iter().enumerate() {
                    let column = (p + i - panels.start) * PANEL_ROWS;
                    for (t, sums) in sums.iter().enumerate() {
                        let y = &mut y.row(t)[column..];
                        let cols = y.len().min(PANEL_ROWS);
                        y[..cols].copy_from_slice(&sums.as_flattened()[..cols]);
                    }
                }
                p += at_once;
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn panel_by_panel<const LINES: usize>(
            w: phidias_quant::Packed<'_>,
            panels: std::ops::Range<usize>,
            x: &phidias_quant::activations::Activations,
            mut y: crate::view::ColsMut<'_>,
            room: &mut [Sums],
        ) {
            use crate::cpu::packed::TOKENS;
            use phidias_quant::activations::TILE;
            for (i, p) in panels.enumerate() {
                let panel = w.panel(p);
                for (first, tiles, count, tokens) in x.tile_groups::<{ TOKENS / TILE }>() {
                    let sums = &mut room[..tokens];
                    many::<LINES>(panel, &tiles[..count], sums);
                    for (t, sums) in sums.iter().enumerate() {
                        let y = &mut y.row(first + t)[i * PANEL_ROWS..];
                        let cols = y.len().min(PANEL_ROWS);
                        y[..cols].copy_from_slice(&sums.as_flattened()[..cols]);
                    }
                }
            }
        }
    };
}
pub(super) use packed_gemm;
