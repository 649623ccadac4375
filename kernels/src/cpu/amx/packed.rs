//! GEMM, int4 and int8 weights x int8 activations, in tiles; maths in `gemm.rs`, layout in
//! [`phidias_quant::packed`], the scales of the activations in [`phidias_quant::activations`].
//!
//! ```text
//! Maths   P[t, r] = sum over the 32 columns of a block of (sx[t] * a[t, i]) * (u[r, i] - zero)
//!         y[t, r] += sw[r] * P[t, r], block after block, fused
//! Layout  of tiles, 16 lines of 64 bytes:
//!         16 tokens, one block   line t   | a[t, 0] a[t, 1] ... a[t, 31] |                    bf16, scaled
//!         16 rows, one block     line k   | w[0, 2k] w[0, 2k + 1] w[1, 2k] ... w[15, 2k + 1] | bf16
//!         products               line t   | P[t, 0] ... P[t, 15] |                            f32
//!
//! `tdpbf16ps` multiplies two tiles of bf16 and sums in f32. Scales change with every block of 32 columns, so one
//! instruction is all that can be summed in a tile. Its products go through memory, where one fused
//! multiply-add a token takes them up, as the kernel of AVX-512 does.
//! 1. Bytes have `tdpbssd`, which needs no conversion of activations, but then a token takes three vector
//!    instructions instead of one: 18 ns a tile instead of 11.
//! 2. Steps overlap: while the product of block b is made, the sums take up block b - 3, and block b - 2 is
//!    stored. A store that waits for its product holds up those behind it: 13 ns a tile.
//! 3. A piece of 8 blocks of two panels (16 KiB), of 16 tokens (8 KiB) and four products on their way (4 KiB)
//!    are in the first-level cache together. With the tokens from the second a tile takes 17 ns.
//!    While a piece is computed, the tokens and sums of the next are asked for.
//! 4. Weights are converted once for 512 tokens, activations once for 32 panels.
//! 5. Few tokens are not worth the conversion and go the way of AVX-512.
//! Work    16 x 16 x 32 multiply-adds a `tdpbf16ps`, 16 cycles
//! Limit   `tdpbf16ps` and `tilestored` take 16 cycles each and hardly overlap: half of the rate of the former.
//!         Measured: 0.17 to 0.19 of it, of which the conversions take a fifth
//! Exact   weights (8 bits) and scaled activations (7 bits times 2^-120 to 2^103) are bf16 exactly; products and their
//!         sums are less than 2^24 times sx and never subnormal: exact in any order, and P is what AVX-512
//!         multiplies with the weights' scales. All results are its results, bit for bit
//! ```

use super::tile::{ROWS, Tiles};
use crate::cpu::avx512::packed as avx512;
use crate::view::ColsMut;
use phidias_quant::activations::{Activations, TILE, Tile};
use phidias_quant::packed::{PANEL_ROWS, Panel};
use phidias_quant::{BLOCK, Packed};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Fewer tokens go the way of AVX-512.
pub(super) const FEWEST: usize = 64;
/// Tokens that meet weights once converted.
const TOKENS: usize = 512;
/// Panels that meet activations once converted.
pub(super) const PANELS: usize = 32;
/// Panels of which pieces are in the first-level cache together.
const SIDE_BY_SIDE: usize = 2;
/// Blocks of a piece.
const PIECE: usize = 8;
/// Products on their way.
const STAGES: usize = 4;

/// A line of a tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line<T>(T);

/// A tile of bf16, as bits, `[tokens][32]` or `[16][rows][2]`.
type Halves = [Line<[u16; BLOCK]>; ROWS];
/// Sums or products of 16 tokens and a panel, `[tokens][rows]`.
type Floats = [Line<[f32; PANEL_ROWS]>; ROWS];

const _: () = assert!(ROWS == PANEL_ROWS && ROWS == 2 * TILE);
const _: () = assert!(size_of::<Halves>() == 1024 && size_of::<Floats>() == 1024);

/// A piece of a panel.
#[derive(Clone, Copy)]
struct Weights {
    tiles: [Halves; PIECE],
    scales: [Line<[f32; PANEL_ROWS]>; PIECE],
}

/// What a thread converts to and sums in: 1.3 MiB.
struct Scratch {
    /// `[groups of 16 tokens][blocks]`
    tokens: Vec<[Halves; PIECE]>,
    /// `[panels side by side]`
    weights: Vec<Weights>,
    /// `[panels][groups of 16 tokens]`
    sums: Vec<Floats>,
    stages: [Floats; STAGES],
}

/// Bytes of that.
pub(super) const SCRATCH_BYTES: usize = TOKENS / ROWS * size_of::<[Halves; PIECE]>()
    + SIDE_BY_SIDE * size_of::<Weights>()
    + PANELS * (TOKENS / ROWS) * size_of::<Floats>()
    + size_of::<Scratch>();

const NO_HALVES: Halves = [Line([0; BLOCK]); ROWS];
const NO_FLOATS: Floats = [Line([0.0; PANEL_ROWS]); ROWS];

impl Scratch {
    fn new() -> Self {
        let weights = Weights {
            tiles: [NO_HALVES; PIECE],
            scales: [Line([0.0; PANEL_ROWS]); PIECE],
        };
        Self {
            tokens: vec![[NO_HALVES; PIECE]; TOKENS / ROWS],
            weights: vec![weights; SIDE_BY_SIDE],
            sums: vec![NO_FLOATS; PANELS * (TOKENS / ROWS)],
            stages: [NO_FLOATS; STAGES],
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// The product of block `$b`, in tile `$to` by way of tiles `$x` and `$w`.
macro_rules! multiply {
    ($b:literal, $to:literal, $x:literal, $w:literal) => {
        concat!(
            "tileloadd tmm",
            $x,
            ", [{x} + {line} + 1024 * ",
            $b,
            "]\n",
            "tileloadd tmm",
            $w,
            ", [{w} + {line} + 1024 * ",
            $b,
            "]\n",
            "tilezero tmm",
            $to,
            "\n",
            "tdpbf16ps tmm",
            $to,
            ", tmm",
            $x,
            ", tmm",
            $w,
            "\n",
        )
    };
}

/// Asks for an eighth of what the next piece takes from the second-level cache.
macro_rules! ahead {
    ($b:literal) => {
        concat!(
            ahead!(@ $b: 0, 1, 2, 3, 4, 5, 6, 7),
            "prefetcht0 [{next_sums} + 128 * ", $b, "]\n",
            "prefetcht0 [{next_sums} + 128 * ", $b, " + 64]\n",
        )
    };
    (@ $b:literal: $($line:literal),+) => {
        concat!($("prefetcht0 [{next_x} + 512 * ", $b, " + 64 * ", $line, "]\n"),+)
    };
}

/// Tile `$from` to the stage of that number.
macro_rules! store {
    ($from:literal) => {
        concat!(
            "tilestored [{stages} + {line} + 1024 * ",
            $from,
            "], tmm",
            $from,
            "\n"
        )
    };
}

/// What is said of each token and the register of its sums.
macro_rules! each_token {
    ($macro:ident!($($args:tt)*)) => {
        concat!(
            $macro!($($args)* 0, 16), $macro!($($args)* 1, 17), $macro!($($args)* 2, 18), $macro!($($args)* 3, 19),
            $macro!($($args)* 4, 20), $macro!($($args)* 5, 21), $macro!($($args)* 6, 22), $macro!($($args)* 7, 23),
            $macro!($($args)* 8, 24), $macro!($($args)* 9, 25), $macro!($($args)* 10, 26), $macro!($($args)* 11, 27),
            $macro!($($args)* 12, 28), $macro!($($args)* 13, 29), $macro!($($args)* 14, 30), $macro!($($args)* 15, 31),
        )
    };
}

macro_rules! load_sum {
    ($t:literal, $sum:literal) => {
        concat!("vmovaps zmm", $sum, ", [{sums} + 64 * ", $t, "]\n")
    };
}

macro_rules! store_sum {
    ($t:literal, $sum:literal) => {
        concat!("vmovaps [{sums} + 64 * ", $t, "], zmm", $sum, "\n")
    };
}

macro_rules! add_product {
    ($from:literal, $t:literal, $sum:literal) => {
        concat!(
            "vfmadd231ps zmm",
            $sum,
            ", zmm0, [{stages} + 1024 * ",
            $from,
            " + 64 * ",
            $t,
            "]\n"
        )
    };
}

/// The products of block `$b`, in stage `$from`, times the weights' scales, to the sums.
macro_rules! add {
    ($b:literal, $from:literal) => {
        concat!(
            "vmovaps zmm0, [{scales} + 64 * ",
            $b,
            "]\n",
            each_token!(add_product!($from,)),
        )
    };
}

/// Code between the loads and the stores of the sums.
///
/// # Safety
/// The tiles are this thread's; the code reads what is there.
macro_rules! with_sums {
    ($x:ident, $w:ident, $sums:ident, $stages:ident, $next:ident; $($code:expr),+ $(,)?) => {
        asm!(
            each_token!(load_sum!()),
            $($code,)+
            each_token!(store_sum!()),
            x = in(reg) $x.as_ptr(),
            w = in(reg) $w.tiles.as_ptr(),
            scales = in(reg) $w.scales.as_ptr(),
            sums = in(reg) $sums.as_mut_ptr(),
            stages = in(reg) $stages.as_mut_ptr(),
            line = in(reg) 64usize,
            next_x = in(reg) $next.x,
            next_sums = in(reg) $next.sums,
            out("zmm0") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nostack, preserves_flags),
        )
    };
}

/// What the next piece takes from the second-level cache: asked for only.
#[derive(Clone, Copy)]
struct Next {
    /// As much of the next tokens as one of the panels side by side asks for.
    x: *const Halves,
    sums: *const Floats,
}

/// Adds the products of 16 tokens and a panel, block after block, for `blocks` of a piece.
#[target_feature(enable = "avx512f")]
fn piece(
    x: &[Halves; PIECE],
    w: &Weights,
    blocks: usize,
    sums: &mut Floats,
    stages: &mut [Floats; STAGES],
    next: Next,
    _: &Tiles,
) {
    if blocks == PIECE {
        // SAFETY: a `Tiles` proves that there are tiles and that they are this thread's, 16 lines of 64 bytes each.
        // Blocks 0 to 7 are inside `x` and `w`, tokens 0 to 15 inside `sums`, stages 0 to 3 inside
        // `stages`; all lines are aligned. What is written is borrowed exclusively, and every register
        // that changes is named; tiles are used in `asm!` only.
        unsafe {
            with_sums!(
                x, w, sums, stages, next;
                ahead!(0), multiply!(0, 0, 4, 5),
                ahead!(1), multiply!(1, 1, 6, 7),
                ahead!(2), multiply!(2, 2, 4, 5),
                store!(0),
                ahead!(3), multiply!(3, 3, 6, 7),
                add!(0, 0),
                store!(1),
                ahead!(4), multiply!(4, 0, 4, 5),
                add!(1, 1),
                store!(2),
                ahead!(5), multiply!(5, 1, 6, 7),
                add!(2, 2),
                store!(3),
                ahead!(6), multiply!(6, 2, 4, 5),
                add!(3, 3),
                store!(0),
                ahead!(7), multiply!(7, 3, 6, 7),
                add!(4, 0),
                store!(1),
                add!(5, 1),
                store!(2),
                add!(6, 2),
                store!(3),
                add!(7, 3),
            );
        }
        return;
    }
    for b in 0..blocks {
        let x = &x[b];
        let w = BlockOf {
            tiles: &w.tiles[b],
            scales: &w.scales[b].0,
        };
        // SAFETY: as above, for one block.
        unsafe {
            with_sums!(
                x, w, sums, stages, next;
                multiply!(0, 0, 4, 5), store!(0), add!(0, 0), "/* {next_x} {next_sums} */",
            );
        }
    }
}

/// One block of [`Weights`].
struct BlockOf<'a> {
    tiles: &'a Halves,
    scales: &'a [f32; PANEL_ROWS],
}

/// Blocks of up to eight tokens as bf16, scaled, from line `first` of the tiles on.
#[target_feature(enable = "avx512f,avx512bf16")]
fn widen(x: Tile<'_>, blocks: Range<usize>, first: usize, to: &mut [Halves; PIECE]) {
    /// `MAGIC * RATIO` is 1 when rounded, so a scale's `magic` gives the scale, exactly.
    const RATIO: f32 = (2.0 / 3.0) / (1 << 23) as f32;
    let quants = x.quants.as_chunks::<BLOCK>().0;
    for (b, to) in blocks.zip(to) {
        let at = b * x.rows..(b + 1) * x.rows;
        let lines = &mut to[first..first + x.rows];
        for ((a, magic), line) in quants[at.clone()].iter().zip(&x.magics[at]).zip(lines) {
            let scale = _mm512_set1_ps(magic * RATIO);
            let half = |i: usize| {
                // SAFETY: 16 of 32 bytes; the load needs no alignment.
                let bytes = unsafe { _mm_loadu_si128(a.as_ptr().add(16 * i).cast()) };
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale)
            };
            let halves = _mm512_cvtne2ps_pbh(half(1), half(0));
            // SAFETY: both are 64 bytes, of integers.
            line.0 = unsafe { std::mem::transmute::<__m512bh, [u16; BLOCK]>(halves) };
        }
    }
}

/// Blocks of a panel as bf16.
#[target_feature(enable = "avx512f,avx512bw")]
fn unpack<const LINES: usize>(panel: Panel<'_>, blocks: Range<usize>, zero: i32, to: &mut Weights) {
    /// 2^23: the float of these bits and a small integer is their sum.
    const MAGIC: i32 = 0x4B00_0000;
    /// `a & b | c`
    const AND_OR: i32 = 0xEA;
    let magic = _mm512_set1_epi32(MAGIC);
    let bias = _mm512_set1_ps(f32::from_bits(MAGIC as u32) + zero as f32);
    let byte = _mm512_set1_epi32(0xFF);
    let high = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
    // The lowest byte of each row, as the bits of a float; only the upper 16 are ever set.
    let float = |v: __m512i| {
        let bits = _mm512_ternarylogic_epi32::<AND_OR>(v, byte, magic);
        _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(bits), bias))
    };
    for ((b, tile), scales) in blocks.zip(&mut to.tiles).zip(&mut to.scales) {
        let block = panel.block::<LINES>(b);
        let quants = avx512::unpack(block.quants);
        for (four, lines) in quants.into_iter().zip(tile.as_chunks_mut::<2>().0) {
            let pairs = [
                [four, _mm512_srli_epi32::<8>(four)],
                [_mm512_srli_epi32::<16>(four), _mm512_srli_epi32::<24>(four)],
            ];
            for ([first, second], line) in pairs.into_iter().zip(lines) {
                let first = _mm512_srli_epi32::<16>(float(first));
                let pair = _mm512_ternarylogic_epi32::<AND_OR>(float(second), high, first);
                // SAFETY: 64 bytes; the store needs no alignment.
                unsafe { _mm512_storeu_si512(line.0.as_mut_ptr().cast(), pair) };
            }
        }
        // SAFETY: 16 floats; the store needs no alignment.
        unsafe { _mm512_storeu_ps(scales.0.as_mut_ptr(), avx512::scales(block.scales)) };
    }
}

/// Up to [`PANELS`] panels, from column `column` of `y` on, times the tokens from `first` on, up to [`TOKENS`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn some<const LINES: usize>(
    w: Packed<'_>,
    panels: Range<usize>,
    x: &Activations,
    (first, column): (usize, usize),
    y: &mut ColsMut<'_>,
    (scratch, in_tiles): (&mut Scratch, &Tiles),
) {
    let Scratch {
        tokens,
        weights,
        sums,
        stages,
    } = scratch;
    let rows = (x.rows() - first).min(TOKENS);
    let groups = rows.div_ceil(ROWS);
    let sums = &mut sums[..panels.len() * groups];
    sums.fill(NO_FLOATS);
    let zero = w.layout().format().zero();
    for blocks in (0..x.blocks()).step_by(PIECE) {
        let blocks = blocks..(blocks + PIECE).min(x.blocks());
        // The lines of a last group that has fewer tokens keep what they had; nobody reads their sums.
        for tile in 0..rows.div_ceil(TILE) {
            let lines = tile * TILE % ROWS;
            widen(
                x.tile(first / TILE + tile),
                blocks.clone(),
                lines,
                &mut tokens[tile * TILE / ROWS],
            );
        }
        let side_by_side = sums.chunks_mut(SIDE_BY_SIDE * groups);
        for (sums, p) in side_by_side.zip(panels.clone().step_by(SIDE_BY_SIDE)) {
            for (p, weights) in (p..panels.end).zip(weights.iter_mut()) {
                unpack::<LINES>(w.panel(p), blocks.clone(), zero, weights);
            }
            let at_once = sums.len() / groups;
            for (group, x) in tokens[..groups].iter().enumerate() {
                let after = (group + 1) % groups;
                for (p, w) in weights[..at_once].iter().enumerate() {
                    let after_sums = if p + 1 < at_once {
                        (p + 1) * groups + group
                    } else {
                        after
                    };
                    let next = Next {
                        x: tokens[after][p * (PIECE / SIDE_BY_SIDE)..].as_ptr(),
                        sums: &raw const sums[after_sums],
                    };
                    let sums = &mut sums[p * groups + group];
                    piece(x, w, blocks.len(), sums, stages, next, in_tiles);
                }
            }
        }
    }
    for t in 0..rows {
        let y = &mut y.row(first + t)[column..];
        for (sums, y) in sums.chunks(groups).zip(y.chunks_mut(PANEL_ROWS)) {
            let sums = &sums[t / ROWS][t % ROWS].0;
            match <&mut [f32; PANEL_ROWS]>::try_from(&mut *y).ok() {
                Some(y) => *y = *sums,
                None => y.copy_from_slice(&sums[..y.len()]),
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
fn gemm<const LINES: usize>(
    w: Packed<'_>,
    panels: Range<usize>,
    x: &Activations,
    mut y: ColsMut<'_>,
) {
    if x.rows() < FEWEST {
        return match LINES {
            4 => avx512::gemm_q4(w, panels, x, y),
            _ => avx512::gemm_q8(w, panels, x, y),
        };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: the table exists only where tiles are available.
        let tiles = unsafe { Tiles::take() };
        for first in (0..x.rows()).step_by(TOKENS) {
            for p in panels.clone().step_by(PANELS) {
                let some_panels = p..(p + PANELS).min(panels.end);
                let at = (first, (p - panels.start) * PANEL_ROWS);
                some::<LINES>(w, some_panels, x, at, &mut y, (scratch, &tiles));
            }
        }
    });
}

crate::cpu::packed::packed_gemm!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_as_large_as_the_table_says() {
        let scratch = Scratch::new();
        let bytes = size_of_val(&scratch)
            + size_of_val(&scratch.tokens[..])
            + size_of_val(&scratch.weights[..])
            + size_of_val(&scratch.sums[..]);
        assert_eq!(bytes, SCRATCH_BYTES);
        assert_eq!(SCRATCH_BYTES >> 10, 1301);
    }
}
