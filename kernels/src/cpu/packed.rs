//! What the packed GEMMs of the instruction sets have around their products; maths in `gemm.rs`.

/// Tokens that pass a block of weights before the next one is unpacked.
pub(super) const TOKENS: usize = 128;
/// Tokens of one inner loop; so few are decoding, limited by memory.
pub(super) const GROUP: usize = 4;

/// `gemm_q4` and `gemm_q8` compiled for `$features`, panel by panel.
///
/// Where it stands there must be `few::<T, LINES>(panel, tile, sums)`, a panel times `T` tokens of one
/// tile, up to [`GROUP`]; `many::<LINES>(panel, tiles, sums)`, a panel times up to [`TOKENS`]; and
/// `Sums`, the sums of a panel's rows in order, `[[f32; 16 / PARTS]; PARTS]`.
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
            use crate::cpu::packed::{GROUP, TOKENS};
            // Room for the sums: little for few tokens, since it is set to zero each time.
            if x.rows() <= GROUP {
                gemm_in::<LINES>(w, panels, x, y, &mut [ZERO; GROUP]);
            } else {
                gemm_in::<LINES>(w, panels, x, y, &mut [ZERO; TOKENS]);
            }
        }

        const ZERO: Sums = [[0.0; PANEL_ROWS / PARTS]; PARTS];

        #[target_feature(enable = $features)]
        #[inline]
        fn gemm_in<const LINES: usize>(
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
                    match tokens {
                        1 => few::<1, LINES>(panel, tiles[0], sums),
                        2 => few::<2, LINES>(panel, tiles[0], sums),
                        3 => few::<3, LINES>(panel, tiles[0], sums),
                        4 => few::<4, LINES>(panel, tiles[0], sums),
                        _ => many::<LINES>(panel, &tiles[..count], sums),
                    }
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
