//! GEMM, int4 and int8 weights x int8 activations in 128-bit registers; maths in `gemm.rs`, layout
//! in [`phidias_quant::packed`], the scales of the activations in [`phidias_quant::activations`].
//!
//! ```text
//! A line of 64 bytes is four registers, one a *quarter* of the panel: four rows, four columns of each.
//! Three instructions multiply it with the activations a of those columns:
//!     plain    smlal, smlal2    8 products into 16 bits each; dup puts the four a in every row's place
//!     dotprod  sdot by lane     16 products, four into a row's 32 bits; the lane is the four a
//!     i8mm     smmla            32 products: 2 rows x 2 tokens x 8 columns
//! 1. Weights become signed bytes: nibbles are already, of bytes the top bit is turned (u - 128). The
//!    zero point of nibbles is in the number that the sum starts from; that of bytes is out already.
//! 2. The scale of the activations is in that start too: after the sum one subtraction leaves the
//!    scaled product as a float. What is left a block is one multiply-add by the weights' scales.
//! 3. plain, q4: a product is at most 15 * 127, so the eight groups of a block fit in 16 bits
//!    (15240) and are widened once a block; q8: two groups do (2 * 128 * 127 = 32512).
//! 4. sdot by lane takes its four a from a register of sixteen: no broadcast.
//! 5. i8mm: zip1 and zip2 of two lines make tiles of 2 rows x 8 columns, once for all tokens that
//!    pass; the same of two tokens' activations makes theirs. A sum is 2 x 2, and zip takes the
//!    tokens apart again.
//! 6. Weights stay, tokens pass: a panel's block is unpacked once (512 bytes, in L1), then up to
//!    `TOKENS` tokens are multiplied with it, four at a time: 16 independent sums, which hide the
//!    latency of the multipliers. The f32 sums of those tokens lie in L1 meanwhile.
//! 7. Up to four tokens (decode) keep their f32 sums in registers instead. There sdot serves i8mm
//!    too: with one token half of an smmla is thrown away.
//! Work   for 4 rows x 32 columns and a token: plain 16 smlal (q8 and 8 sadalp), sdot 8, smmla 4
//! Limit  one token: memory bandwidth; many: the multipliers. No speed was measured: the tests run
//!        under an emulator
//! Exact  integers exactly; f32 with one fused multiply-add a block, where scalar rounds twice
//! ```

use super::lanes::widen;
use phidias_quant::activations::Tile;
use phidias_quant::packed::{LINE, PANEL_ROWS};
use phidias_quant::{BLOCK, f16};
use std::arch::aarch64::*;

/// Quarters of a panel: a register has four rows.
pub(super) const QUARTERS: usize = PANEL_ROWS / 4;

/// The quants of one block of a quarter as signed bytes, four columns of four rows a register.
pub(super) type Quarter = [int8x16_t; 8];
/// Sums of 16 rows.
pub(super) type Sums = [f32; PANEL_ROWS];
/// None yet.
pub(super) const ZERO: Sums = [0.0; PANEL_ROWS];

/// Those of quarter `q`.
#[inline(always)]
pub(super) fn quarter_mut(sums: &mut Sums, q: usize) -> &mut [f32; 4] {
    &mut sums.as_chunks_mut().0[q]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_bytes(from: &[i8; 16]) -> int8x16_t {
    // SAFETY: 16 bytes; the load needs no alignment.
    unsafe { vld1q_s8(from.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load(from: &[f32; 4]) -> float32x4_t {
    // SAFETY: 4 floats; the load needs no alignment.
    unsafe { vld1q_f32(from.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store(to: &mut [f32; 4], v: float32x4_t) {
    // SAFETY: 4 floats; the store needs no alignment.
    unsafe { vst1q_f32(to.as_mut_ptr(), v) }
}

/// The quants of one block of quarter `q`. `LINES` is 4 for nibbles, 8 for bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn unpack<const LINES: usize>(lines: &[[u8; LINE]; LINES], q: usize) -> Quarter {
    let load = |g: usize| {
        let bytes: &[u8; 16] = &lines[g].as_chunks().0[q];
        // SAFETY: 16 bytes; the load needs no alignment.
        unsafe { vld1q_u8(bytes.as_ptr()) }
    };
    let mut w = [vdupq_n_s8(0); 8];
    if LINES == 8 {
        for g in 0..8 {
            w[g] = vreinterpretq_s8_u8(veorq_u8(load(g), vdupq_n_u8(128)));
        }
    } else {
        for g in 0..4 {
            let bytes = load(g);
            w[g] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
            w[g + 4] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes));
        }
    }
    w
}

/// 16 scales as f32, by quarters.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn scales(scales: &[f16; PANEL_ROWS]) -> [float32x4_t; QUARTERS] {
    let from: *const u16 = scales.as_ptr().cast();
    // SAFETY: 16 halves; the loads need no alignment.
    let halves = unsafe { [vld1q_u16(from), vld1q_u16(from.add(8))] };
    let [[a, b], [c, d]] = halves.map(widen);
    [a, b, c, d]
}

/// Block `b` of `T` tokens of a tile from `t` on: the bytes, what their integer sums start from in
/// the format of `LINES`, and what is subtracted from them as floats.
#[inline(always)]
pub(super) fn tokens<const T: usize, const LINES: usize>(
    x: Tile<'_>,
    b: usize,
    t: usize,
) -> (&[[i8; BLOCK]; T], [i32; T], &[f32; T]) {
    let at = b * x.rows + t;
    let (quants, _) = x.quants.as_chunks::<BLOCK>();
    let inside = "tokens of the tile";
    let starts: &[i32; T] = x.starts[at..].first_chunk().expect(inside);
    let magics: &[f32; T] = x.magics[at..].first_chunk().expect(inside);
    // Bytes are without their zero point here.
    let starts = match LINES {
        8 => magics.map(|magic| magic.to_bits() as i32),
        _ => *starts,
    };
    (quants[at..].first_chunk().expect(inside), starts, magics)
}

/// The integer sum of a block and a token as their product in f32.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn scaled(sum: int32x4_t, magic: f32) -> float32x4_t {
    vsubq_f32(vreinterpretq_f32_s32(sum), vdupq_n_f32(magic))
}

/// `$body` for each of the numbers, as the constant `$i`: arrays that it indexes stay in registers,
/// and it can be the lane of an instruction.
macro_rules! unrolled {
    ($i:ident in $($n:literal)+ => $body:block) => {
        $({
            const $i: usize = $n;
            $body
        })+
    };
}
pub(super) use unrolled;

/// Everything around the products of one block, for the instructions in `$features`.
///
/// `$few` and `$many` multiply a block of some quarters with some tokens, `$many` in the order that
/// `$arrange` brings the weights into, `$q` quarters at a time.
macro_rules! packed_neon {
    ($features:literal, $few:ident, $arrange:ident, $many:ident, $q:literal) => {
        use crate::cpu::neon::packed::{
            QUARTERS, Quarter, Sums, ZERO, load, quarter_mut, scaled, scales, store, tokens, unpack,
        };
        use crate::cpu::packed::{TOKENS, packed_gemm, put};
        use crate::view::ColsMut;
        use phidias_quant::Packed;
        use phidias_quant::activations::{Activations, TILE, Tile};
        use phidias_quant::packed::{PANEL_ROWS, Panel};
        use std::arch::aarch64::*;
        use std::ops::Range;

        /// Quarters at a time when tokens are few: with four tokens their f32 sums take half of the
        /// registers.
        const FEW: usize = QUARTERS / 2;

        /// One block with `T` tokens: the products are added to the sums in memory.
        #[target_feature(enable = $features)]
        #[inline]
        fn group<const T: usize, const LINES: usize>(
            w: &[Quarter; QUARTERS],
            scales: &[float32x4_t; QUARTERS],
            x: Tile<'_>,
            (b, t): (usize, usize),
            acc: &mut [Sums],
        ) {
            let (a, starts, magics) = tokens::<T, LINES>(x, b, t);
            let acc: &mut [Sums; T] = acc[t..].first_chunk_mut().expect("sums of the tile");
            for (part, w) in w.as_chunks::<$q>().0.iter().enumerate() {
                let sums = $many::<T, $q, LINES>(w, a, &starts);
                for t in 0..T {
                    for i in 0..$q {
                        let q = part * $q + i;
                        let product = scaled(sums[t][i], magics[t]);
                        let at = quarter_mut(&mut acc[t], q);
                        store(at, vfmaq_f32(load(at), product, scales[q]));
                    }
                }
            }
        }

        /// A panel times up to `TOKENS` tokens, which are added up in `acc`.
        #[target_feature(enable = $features)]
        #[inline]
        fn many<const LINES: usize>(
            panel: Panel<'_>,
            x: &Activations,
            tiles: Range<usize>,
            acc: &mut [Sums],
        ) {
            for b in 0..panel.blocks() {
                let block = panel.block::<LINES>(b);
                let mut w = [[vdupq_n_s8(0); 8]; QUARTERS];
                for q in 0..QUARTERS {
                    w[q] = $arrange(unpack(block.quants, q));
                }
                let s = scales(block.scales);
                for (i, acc) in tiles.clone().zip(acc.chunks_mut(TILE)) {
                    let x = x.tile(i);
                    let mut t = 0;
                    while t + 4 <= x.rows {
                        group::<4, LINES>(&w, &s, x, (b, t), acc);
                        t += 4;
                    }
                    match x.rows - t {
                        1 => group::<1, LINES>(&w, &s, x, (b, t), acc),
                        2 => group::<2, LINES>(&w, &s, x, (b, t), acc),
                        3 => group::<3, LINES>(&w, &s, x, (b, t), acc),
                        _ => {}
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn gemm<const LINES: usize>(
            w: Packed<'_>,
            panels: Range<usize>,
            x: &Activations,
            mut y: ColsMut<'_>,
        ) {
            for first in (0..x.tiles()).step_by(TOKENS / TILE) {
                let tiles = first..(first + TOKENS / TILE).min(x.tiles());
                let tile = x.tile(first);
                for (i, p) in panels.clone().enumerate() {
                    let panel = w.panel(p);
                    let at = (first * TILE, i * PANEL_ROWS);
                    match x.rows() {
                        1 => put(&few::<1, LINES>(panel, tile), at, &mut y),
                        2 => put(&few::<2, LINES>(panel, tile), at, &mut y),
                        3 => put(&few::<3, LINES>(panel, tile), at, &mut y),
                        4 => put(&few::<4, LINES>(panel, tile), at, &mut y),
                        _ => {
                            let mut sums = [ZERO; TOKENS];
                            let sums = &mut sums[..(x.rows() - at.0).min(TOKENS)];
                            many::<LINES>(panel, x, tiles.clone(), sums);
                            put(sums, at, &mut y);
                        }
                    }
                }
            }
        }

        /// A panel times the `T` tokens of a tile with the sums in registers.
        #[target_feature(enable = $features)]
        #[inline]
        fn few<const T: usize, const LINES: usize>(panel: Panel<'_>, x: Tile<'_>) -> [Sums; T] {
            let mut out = [[vdupq_n_f32(0.0); QUARTERS]; T];
            for b in 0..panel.blocks() {
                let block = panel.block::<LINES>(b);
                let (a, starts, magics) = tokens::<T, LINES>(x, b, 0);
                let s = scales(block.scales);
                unrolled!(PART in 0 1 => {
                    let mut w = [[vdupq_n_s8(0); 8]; FEW];
                    for i in 0..FEW {
                        w[i] = unpack(block.quants, PART * FEW + i);
                    }
                    let sums = $few::<T, FEW, LINES>(&w, a, &starts);
                    for t in 0..T {
                        for i in 0..FEW {
                            let q = PART * FEW + i;
                            let product = scaled(sums[t][i], magics[t]);
                            out[t][q] = vfmaq_f32(out[t][q], product, s[q]);
                        }
                    }
                });
            }
            let mut sums = [ZERO; T];
            for t in 0..T {
                for q in 0..QUARTERS {
                    store(quarter_mut(&mut sums[t], q), out[t][q]);
                }
            }
            sums
        }

        packed_gemm!($features);
    };
}
pub(super) use packed_neon;

/// The weights as they are unpacked.
#[inline(always)]
pub(super) fn as_unpacked(w: Quarter) -> Quarter {
    w
}

/// The four activations of group `g` of a block, in every row's place.
#[target_feature(enable = "neon")]
#[inline]
fn broadcast(block: &[i8; BLOCK], g: usize) -> int8x16_t {
    let (fours, _) = block.as_chunks::<4>();
    let four = i32::from_le_bytes(fours[g].map(|v| v as u8));
    vreinterpretq_s8_s32(vdupq_n_s32(four))
}

/// The sums of a block of nibbles with `T` tokens, `[token][quarter]`.
#[target_feature(enable = "neon")]
#[inline]
fn sums_q4<const T: usize, const Q: usize>(
    w: &[Quarter; Q],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
) -> [[int32x4_t; Q]; T] {
    let mut low = [[vdupq_n_s16(0); Q]; T];
    let mut high = [[vdupq_n_s16(0); Q]; T];
    unrolled!(G in 0 1 2 3 4 5 6 7 => {
        for t in 0..T {
            let x = broadcast(&a[t], G);
            for q in 0..Q {
                let w = w[q][G];
                low[t][q] = vmlal_s8(low[t][q], vget_low_s8(w), vget_low_s8(x));
                high[t][q] = vmlal_high_s8(high[t][q], w, x);
            }
        }
    });
    let mut sums = [[vdupq_n_s32(0); Q]; T];
    for t in 0..T {
        for q in 0..Q {
            let rows = vpaddq_s32(vpaddlq_s16(low[t][q]), vpaddlq_s16(high[t][q]));
            sums[t][q] = vaddq_s32(vdupq_n_s32(starts[t]), rows);
        }
    }
    sums
}

/// The sums of a block of bytes with `T` tokens, `[token][quarter]`.
#[target_feature(enable = "neon")]
#[inline]
fn sums_q8<const T: usize, const Q: usize>(
    w: &[Quarter; Q],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
) -> [[int32x4_t; Q]; T] {
    let mut low = [[vdupq_n_s32(0); Q]; T];
    let mut high = [[vdupq_n_s32(0); Q]; T];
    unrolled!(G in 0 2 4 6 => {
        for t in 0..T {
            let x = [broadcast(&a[t], G), broadcast(&a[t], G + 1)];
            for q in 0..Q {
                let w = [w[q][G], w[q][G + 1]];
                let pair = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0]));
                let pair = vmlal_s8(pair, vget_low_s8(w[1]), vget_low_s8(x[1]));
                low[t][q] = vpadalq_s16(low[t][q], pair);
                let pair = vmull_high_s8(w[0], x[0]);
                let pair = vmlal_high_s8(pair, w[1], x[1]);
                high[t][q] = vpadalq_s16(high[t][q], pair);
            }
        }
    });
    let mut sums = [[vdupq_n_s32(0); Q]; T];
    for t in 0..T {
        for q in 0..Q {
            let rows = vpaddq_s32(low[t][q], high[t][q]);
            sums[t][q] = vaddq_s32(vdupq_n_s32(starts[t]), rows);
        }
    }
    sums
}

/// Every AArch64.
pub(super) mod plain {
    use super::{BLOCK, as_unpacked, sums_q4, sums_q8};

    /// The sums of a block with `T` tokens, `[token][quarter]`.
    #[target_feature(enable = "neon")]
    #[inline]
    fn sums<const T: usize, const Q: usize, const LINES: usize>(
        w: &[Quarter; Q],
        a: &[[i8; BLOCK]; T],
        starts: &[i32; T],
    ) -> [[int32x4_t; Q]; T] {
        match LINES {
            8 => sums_q8(w, a, starts),
            _ => sums_q4(w, a, starts),
        }
    }

    // Each sum is two registers here.
    packed_neon!("neon", sums, as_unpacked, sums, 2);
}
