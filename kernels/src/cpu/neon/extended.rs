//! The packed GEMM with the 8-bit inner products of dotprod and the matrix products of i8mm; maths and
//! layout in `packed.rs`. The instructions are written out: their intrinsics are not stable.

use super::packed::{Quarter, load_bytes, packed_neon, unrolled};
use phidias_quant::BLOCK;
use std::arch::aarch64::*;
use std::arch::asm;

/// `sum` of four rows plus `w`, four columns of each, times the four activations in lane `LANE` of `a`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn sdot<const LANE: usize>(sum: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    // SAFETY: the caller has dotprod; registers in, registers out.
    unsafe {
        asm!("sdot {sum:v}.4s, {w:v}.16b, {a:v}.4b[{lane}]",
            sum = inout(vreg) sum, w = in(vreg) w, a = in(vreg) a, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// `sum`, two tokens x two rows, plus `a`, eight columns of two tokens, times `w`, the same of two rows.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn smmla(sum: int32x4_t, a: int8x16_t, w: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    // SAFETY: the caller has i8mm; registers in, registers out.
    unsafe {
        asm!("smmla {sum:v}.4s, {a:v}.16b, {w:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// The sums of a block with `T` tokens, `[token][quarter]`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dots<const T: usize, const Q: usize, const LINES: usize>(
    w: &[Quarter; Q],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
) -> [[int32x4_t; Q]; T] {
    let mut sums = [[vdupq_n_s32(0); Q]; T];
    for t in 0..T {
        sums[t] = [vdupq_n_s32(starts[t]); Q];
    }
    unrolled!(HALF in 0 1 => {
        let mut x = [vdupq_n_s8(0); T];
        for t in 0..T {
            x[t] = load_bytes(&a[t].as_chunks().0[HALF]);
        }
        unrolled!(LANE in 0 1 2 3 => {
            for t in 0..T {
                for q in 0..Q {
                    sums[t][q] = sdot::<LANE>(sums[t][q], w[q][4 * HALF + LANE], x[t]);
                }
            }
        });
    });
    sums
}

/// The first and the second eight bytes of `a`, each followed by those of `b`.
#[target_feature(enable = "neon")]
#[inline]
fn zip_eights(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
    [vzip1q_s64(a, b), vzip2q_s64(a, b)].map(|v| vreinterpretq_s8_s64(v))
}

/// Two registers of four columns and four rows as tiles of eight columns: rows 0 and 1, rows 2 and 3.
#[target_feature(enable = "neon")]
#[inline]
fn tiles(w: Quarter) -> Quarter {
    let mut out = w;
    for g in [0, 2, 4, 6] {
        let (a, b) = (vreinterpretq_s32_s8(w[g]), vreinterpretq_s32_s8(w[g + 1]));
        out[g] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        out[g + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
    out
}

/// The sums of a block in [`tiles`] with `T` tokens, at most four, `[token][quarter]`.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn matrix_products<const T: usize, const Q: usize, const LINES: usize>(
    w: &[Quarter; Q],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
) -> [[int32x4_t; Q]; T] {
    // Tokens in pairs; one that is left over is a pair with itself.
    let pairs = T.div_ceil(2);
    let tokens = |pair: usize| [2 * pair, (2 * pair + 1).min(T - 1)];
    // [pair][quarter][two rows]
    let mut sums = [[[vdupq_n_s32(0); 2]; Q]; 2];
    for pair in 0..pairs {
        let [s, t] = tokens(pair);
        let start = vcombine_s32(vdup_n_s32(starts[s]), vdup_n_s32(starts[t]));
        sums[pair] = [[start; 2]; Q];
    }
    unrolled!(HALF in 0 1 => {
        // [pair][eight columns]
        let mut x = [[vdupq_n_s8(0); 2]; 2];
        for pair in 0..pairs {
            let [s, t] = tokens(pair);
            let [s, t] = [&a[s], &a[t]].map(|a| load_bytes(&a.as_chunks().0[HALF]));
            x[pair] = zip_eights(s, t);
        }
        unrolled!(EIGHT in 0 1 => {
            for q in 0..Q {
                for rows in 0..2 {
                    let w = w[q][4 * HALF + 2 * EIGHT + rows];
                    for pair in 0..pairs {
                        let sum = &mut sums[pair][q][rows];
                        *sum = smmla(*sum, x[pair][EIGHT], w);
                    }
                }
            }
        });
    });
    let mut out = [[vdupq_n_s32(0); Q]; T];
    for pair in 0..pairs {
        let [s, t] = tokens(pair);
        for q in 0..Q {
            let [a, b] = sums[pair][q].map(|sum| vreinterpretq_s64_s32(sum));
            out[t][q] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
            out[s][q] = vreinterpretq_s32_s64(vzip1q_s64(a, b));
        }
    }
    out
}

/// With `sdot`.
pub(super) mod dotprod {
    use super::{dots, packed_neon, unrolled};
    use crate::cpu::neon::packed::as_unpacked;

    packed_neon!("neon,dotprod", dots, as_unpacked, dots, 4);
}

/// With `smmla`, and `sdot` for few tokens.
pub(super) mod i8mm {
    use super::{dots, matrix_products, packed_neon, tiles, unrolled};

    packed_neon!("neon,dotprod,i8mm", dots, tiles, matrix_products, 4);
}
