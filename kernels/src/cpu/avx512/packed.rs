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
//! 3. Weights stay, tokens pass: a block of two panels is unpacked once into 16 registers, then up
//!    to `TOKENS` tokens are multiplied with it, four at a time. Each broadcast is used twice.
//! 4. The f32 sums of those tokens lie in L1 meanwhile (16 KiB); the store port has nothing else
//!    to do.
//! 5. Up to four tokens (decode) go through 256-bit registers, as AVX-VNNI does it: the same sums in
//!    the same order. Memory is the limit then, and 64-byte loads that run ahead of their data take the
//!    places of the requests that `prefetch.rs` makes: one core read weights at 0.98 of plain reading
//!    with 32-byte loads, at 0.89 with 64-byte ones.
//! Work   64 multiply-adds a vpdpbusd
//! Limit  many tokens: 8/9 of the vpdpbusd rate, 0.81 was measured; one: memory bandwidth
//! Exact  integers exactly; f32 with one fused multiply-add a block, where scalar rounds twice
//! ```

use crate::cpu::avx2::packed::four;
use crate::cpu::avx2::vnni::avx512_vnni as halves;
use crate::cpu::packed::{GROUP, TOKENS};
use crate::cpu::prefetch;
use crate::view::ColsMut;
use phidias_quant::activations::{Activations, TILE, Tile};
use phidias_quant::packed::{LINE, PANEL_ROWS, Panel};
use phidias_quant::{BLOCK, Packed, f16};
use std::arch::x86_64::*;
use std::ops::Range;

/// Sums of 16 rows, on a line of the cache: a register that crosses two costs a tenth of the speed.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([f32; PANEL_ROWS]);

/// The quants of one block of a panel, four columns of 16 rows a register. `LINES` is 4 for
/// nibbles, 8 for bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn unpack<const LINES: usize>(lines: &[[u8; LINE]; LINES]) -> [__m512i; 8] {
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
fn scales(scales: &[f16; PANEL_ROWS]) -> __m512 {
    // SAFETY: 16 scales are 32 bytes; the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(sums: &Sums) -> __m512 {
    // SAFETY: 16 floats, aligned by their type.
    unsafe { _mm512_load_ps(sums.0.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(sums: &mut Sums, v: __m512) {
    // SAFETY: 16 floats, aligned by their type.
    unsafe { _mm512_store_ps(sums.0.as_mut_ptr(), v) }
}

/// One block of `P` panels, unpacked.
struct Weights<const P: usize> {
    quants: [[__m512i; 8]; P],
    scales: [__m512; P],
}

/// The scaled products of one block with `T` tokens, `[token][panel]`: the integer sums start at
/// `starts` and are floats over `magics` at the end.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn products<const T: usize, const P: usize>(
    w: &[[__m512i; 8]; P],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
    magics: &[f32; T],
) -> [[__m512; P]; T] {
    let mut sums = [[_mm512_setzero_si512(); P]; T];
    for t in 0..T {
        sums[t] = [_mm512_set1_epi32(four(&starts[t])); P];
    }
    for g in 0..8 {
        for t in 0..T {
            let (fours, _) = a[t].as_chunks::<4>();
            let a = _mm512_set1_epi32(four(&fours[g]));
            for p in 0..P {
                sums[t][p] = _mm512_dpbusd_epi32(sums[t][p], w[p][g], a);
            }
        }
    }
    let mut out = [[_mm512_setzero_ps(); P]; T];
    for t in 0..T {
        let magic = _mm512_castsi512_ps(_mm512_set1_epi32(four(&magics[t])));
        for p in 0..P {
            out[t][p] = _mm512_sub_ps(_mm512_castsi512_ps(sums[t][p]), magic);
        }
    }
    out
}

/// One block with `T` tokens: their products are added to the sums in memory.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn group<const T: usize, const P: usize>(
    w: &Weights<P>,
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
    magics: &[f32; T],
    acc: &mut [[Sums; P]; T],
) {
    let products = products(&w.quants, a, starts, magics);
    for t in 0..T {
        for p in 0..P {
            let sum = _mm512_fmadd_ps(products[t][p], w.scales[p], load(&acc[t][p]));
            store(&mut acc[t][p], sum);
        }
    }
}

/// Block `b` with all tokens of some tiles.
///
/// A function of its own, so that the compiler has all registers for this loop.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline(never)]
fn pass<const P: usize>(w: &Weights<P>, b: usize, x: &[Tile<'_>], acc: &mut [[Sums; P]]) {
    let (whole, rest) = acc.as_chunks_mut::<TILE>();
    let (whole_tiles, rest_tiles) = x.split_at(whole.len());
    for (x, acc) in whole_tiles.iter().zip(whole) {
        let a: &[[i8; BLOCK]; TILE] = &x.quants.as_chunks().0.as_chunks().0[b];
        let starts: &[i32; TILE] = &x.starts.as_chunks().0[b];
        let magics: &[f32; TILE] = &x.magics.as_chunks().0[b];
        rows(w, a, starts, magics, acc);
    }
    for x in rest_tiles {
        let at = b * x.rows..(b + 1) * x.rows;
        let a = &x.quants.as_chunks().0[at.clone()];
        rows(w, a, &x.starts[at.clone()], &x.magics[at], rest);
    }
}

/// One block with some tokens, in groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn rows<const P: usize>(
    w: &Weights<P>,
    a: &[[i8; BLOCK]],
    starts: &[i32],
    magics: &[f32],
    acc: &mut [[Sums; P]],
) {
    let (a, a_rest) = a.as_chunks::<GROUP>();
    let (starts, starts_rest) = starts.as_chunks::<GROUP>();
    let (magics, magics_rest) = magics.as_chunks::<GROUP>();
    let (acc, acc_rest) = acc.as_chunks_mut::<GROUP>();
    for (((a, starts), magics), acc) in a.iter().zip(starts).zip(magics).zip(acc) {
        group(w, a, starts, magics, acc);
    }
    let rest = (a_rest.iter().zip(starts_rest)).zip(magics_rest.iter().zip(acc_rest));
    for ((a, start), (magic, acc)) in rest {
        group(w, &[*a], &[*start], &[*magic], std::array::from_mut(acc));
    }
}

/// `P` neighbouring panels as blocks.
struct Panels<'a, const P: usize, const LINES: usize> {
    scales: [&'a [[f16; PANEL_ROWS]]; P],
    quants: [&'a [[[u8; LINE]; LINES]]; P],
}

impl<'a, const P: usize, const LINES: usize> Panels<'a, P, LINES> {
    fn new(w: Packed<'a>, first: usize) -> Self {
        let panels: [Panel<'a>; P] = std::array::from_fn(|p| w.panel(first + p));
        Self {
            quants: panels.map(|p| p.blocks().0),
            scales: panels.map(|p| p.blocks::<LINES>().1),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn block(&self, b: usize) -> Weights<P> {
        let mut w = Weights {
            quants: [[_mm512_setzero_si512(); 8]; P],
            scales: [_mm512_setzero_ps(); P],
        };
        for p in 0..P {
            prefetch::ahead(&self.quants[p][b]);
            prefetch::ahead(&self.scales[p][b]);
            w.quants[p] = unpack(&self.quants[p][b]);
            w.scales[p] = scales(&self.scales[p][b]);
        }
        w
    }
}

/// Some panels times up to [`TOKENS`] tokens, which are added up in `acc`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn many<const P: usize, const LINES: usize>(
    panels: &Panels<'_, P, LINES>,
    blocks: usize,
    x: &[Tile<'_>],
    acc: &mut [[Sums; P]],
) {
    acc.fill([Sums([0.0; PANEL_ROWS]); P]);
    for b in 0..blocks {
        let w = panels.block(b);
        pass(&w, b, x, acc);
    }
}

/// `P` panels from panel `first` on, times all tokens; `column` is where their results begin, `acc`
/// room for the sums.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn panels<const P: usize, const LINES: usize>(
    w: Packed<'_>,
    first: usize,
    x: &Activations,
    y: &mut ColsMut<'_>,
    column: usize,
    acc: &mut [Sums],
) {
    let panels = Panels::<P, LINES>::new(w, first);
    let (all, _) = acc.as_chunks_mut::<P>();
    for (first, tiles, count, tokens) in x.tile_groups::<{ TOKENS / TILE }>() {
        let acc = &mut all[..tokens];
        many(&panels, x.blocks(), &tiles[..count], acc);
        for (t, sums) in acc.iter().enumerate() {
            let y = &mut y.row(first + t)[column..];
            for (y, sums) in y.chunks_mut(PANEL_ROWS).zip(sums) {
                y.copy_from_slice(&sums.0[..y.len()]);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn gemm<const LINES: usize>(
    w: Packed<'_>,
    range: Range<usize>,
    x: &Activations,
    mut y: ColsMut<'_>,
) {
    let column = |p: usize| (p - range.start) * PANEL_ROWS;
    let mut acc = [Sums([0.0; PANEL_ROWS]); 2 * TOKENS];
    let mut p = range.start;
    while p + 2 <= range.end {
        panels::<2, LINES>(w, p, x, &mut y, column(p), &mut acc);
        p += 2;
    }
    if p < range.end {
        panels::<1, LINES>(w, p, x, &mut y, column(p), &mut acc);
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn gemm_q4(w: Packed<'_>, panels: Range<usize>, x: &Activations, y: ColsMut<'_>) {
    match x.rows() {
        ..=GROUP => halves::gemm_q4(w, panels, x, y),
        _ => gemm::<4>(w, panels, x, y),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn gemm_q8(w: Packed<'_>, panels: Range<usize>, x: &Activations, y: ColsMut<'_>) {
    match x.rows() {
        ..=GROUP => halves::gemm_q8(w, panels, x, y),
        _ => gemm::<8>(w, panels, x, y),
    }
}
