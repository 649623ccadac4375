//! GEMM, int4 and int8 weights x int8 activations; maths in `gemm.rs`, layout in
//! [`phidias_quant::packed`], the scales of the activations in [`phidias_quant::activations`].
//!
//! ```text
//! A line of 64 bytes is one register: 16 rows, four columns of each. `vpdpbusd` multiplies it with
//! a broadcast of the four activations that meet those columns and adds the products to 16 sums.
//! 1. Nibbles and bytes stay unsigned, the operand that vpdpbusd wants; the zero point is in the
//!    number that the sum starts from. No sign, no absolute value.
//! 2. The scale of the activations is in that start too: after the sum one subtraction leaves the
//!    scaled product as a float. What is left a block is one multiply-add by the weights' scales:
//!    one for eight vpdpbusd on the same two ports, so at most 8/9 of their rate can be reached.
//! 3. A panel meets up to eight tokens at once, a tile of the activations. A block of it is unpacked into 8
//!    registers, 8 have the integer sums, 8 the sums of all blocks: nothing goes to memory until the
//!    panel ends, and the tile is read front to back.
//! 4. More tokens take the same panel again, from the second-level cache.
//! 5. One token goes through 256-bit registers. A Zen 4 read bytes at 0.97 to 1.00 of the memory's speed so, and at 0.80
//!    to 0.89 in registers of 512 bits, nibbles the same either way; an Intel Xeon of 2024 nibbles at 14.2 GB/s
//!    instead of 13.2. Where panels are read together so do nibbles with up to four tokens (1.04 to 1.13 of 512 bits)
//!    and bytes with up to eight (1.06 to 1.15); nibbles with eight lose there (0.8).
//! 6. More than eight tokens are left to `pairs.rs` on cores that compute 512 bits at once.
//! Work   64 multiply-adds a vpdpbusd
//! Limit  many tokens: 8/9 of the vpdpbusd rate, a Zen 4 reaches 0.87; one: memory bandwidth
//! Exact  integers exactly; f32 with one fused multiply-add a block, where scalar rounds twice
//! ```

use crate::cpu::avx2::packed::four;
use crate::cpu::avx2::vnni::avx512_vnni;
use crate::cpu::packed::{TOKENS, blocks_in_turn, by_tokens, packed_gemm, put, several};
use crate::cpu::prefetch::{self, RUNS};
use crate::view::ColsMut;
use phidias_quant::activations::{Activations, TILE, Tile};
use phidias_quant::packed::{LINE, PANEL_ROWS, Panel};
use phidias_quant::{BLOCK, Packed, f16};
use std::arch::x86_64::*;
use std::ops::Range;

/// The quants of one block of a panel, four columns of 16 rows a register. `LINES` is 4 for
/// nibbles, 8 for bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(in crate::cpu) fn unpack<const LINES: usize>(lines: &[[u8; LINE]; LINES]) -> [__m512i; 8] {
    // SAFETY: a line is 64 bytes; the load needs no alignment.
    let load = |g: usize| unsafe { _mm512_loadu_si512(lines[g].as_ptr().cast()) };
    if LINES == 8 {
        return std::array::from_fn(load);
    }
    let mask = _mm512_set1_epi8(15);
    let mut w = [_mm512_setzero_si512(); 8];
    for g in 0..4 {
        let bytes = load(g);
        w[g] = _mm512_and_si512(bytes, mask);
        w[g + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
    }
    w
}

/// 16 scales as f32.
#[target_feature(enable = "avx512f")]
#[inline]
pub(in crate::cpu) fn scales(scales: &[f16; PANEL_ROWS]) -> __m512 {
    // SAFETY: 16 scales are 32 bytes; the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) })
}

/// The products of one block with `T` tokens, scaled by the activations: the integer sums start at
/// `starts` and are floats over `magics` at the end.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn products<const T: usize>(
    w: &[__m512i; 8],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
    magics: &[f32; T],
) -> [__m512; T] {
    let mut sums = [_mm512_setzero_si512(); T];
    for t in 0..T {
        sums[t] = _mm512_set1_epi32(four(&starts[t]));
    }
    for g in 0..8 {
        for t in 0..T {
            let (fours, _) = a[t].as_chunks::<4>();
            let a = _mm512_set1_epi32(four(&fours[g]));
            sums[t] = _mm512_dpbusd_epi32(sums[t], w[g], a);
        }
    }
    let mut out = [_mm512_setzero_ps(); T];
    for t in 0..T {
        let magic = _mm512_castsi512_ps(_mm512_set1_epi32(four(&magics[t])));
        out[t] = _mm512_sub_ps(_mm512_castsi512_ps(sums[t]), magic);
    }
    out
}

const _: () = assert!(TILE == 8, "a tile is what a panel meets at once");

/// `R` panels times the `T` tokens of a tile, some blocks of each in turn.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn tokens<const T: usize, const LINES: usize, const R: usize>(
    panels: [Panel<'_>; R],
    x: Tile<'_>,
    _: usize,
) -> [[[f32; PANEL_ROWS]; T]; R] {
    // A line of nibbles has two groups of columns.
    if T == 1 || R > 1 && T * 8 / LINES <= 8 {
        return avx512_vnni::tokens::<T, LINES, R>(panels, x, 0);
    }
    let mut out = [[[0.0; PANEL_ROWS]; T]; R];
    // The tile has `T` rows, so its blocks are whole arrays.
    let (a, _) = x.quants.as_chunks::<BLOCK>().0.as_chunks::<T>();
    let (starts, _) = x.starts.as_chunks::<T>();
    let (magics, _) = x.magics.as_chunks::<T>();
    let mut sums = [[_mm512_setzero_ps(); T]; R];
    let blocks = panels[0].blocks();
    let in_turn = blocks_in_turn::<LINES, R>(blocks);
    for first in (0..blocks).step_by(in_turn) {
        for p in 0..R {
            for b in first..(first + in_turn).min(blocks) {
                let block = panels[p].block::<LINES>(b);
                prefetch::ahead::<T, LINES, R>(b, panels[p], block.quants);
                let products = products(&unpack(block.quants), &a[b], &starts[b], &magics[b]);
                let scales = scales(block.scales);
                for t in 0..T {
                    sums[p][t] = _mm512_fmadd_ps(products[t], scales, sums[p][t]);
                }
            }
        }
    }
    for p in 0..R {
        for t in 0..T {
            // SAFETY: 16 floats; the store needs no alignment.
            unsafe { _mm512_storeu_ps(out[p][t].as_mut_ptr(), sums[p][t]) }
        }
    }
    out
}

by_tokens!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni", 1 2 3 4 5 6 7 8);
packed_gemm!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni");
