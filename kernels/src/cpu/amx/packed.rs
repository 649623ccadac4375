//! GEMM, int4 and int8 weights x int8 activations, in tiles; maths in `gemm.rs`, layout in
//! [`phidias_quant::packed`], the scales of the activations in [`phidias_quant::activations`].
//!
//! ```text
//! Maths   P[t, r] = sum over the 32 columns of a block of (sx[t] * a[t, i]) * (u[r, i] - zero)
//!         y[t, r] += sw[r] * P[t, r], block after block, fused
//! Layout  of tiles, 16 lines of 64 bytes:
//!         16 tokens, one block   line t   | a[t, 0] a[t, 16] a[t, 1] a[t, 17] ... a[t, 31] |   bf16, scaled
//!         16 rows, one block     line k   | w[0, k] w[0, k + 16] w[1, k] ... w[15, k + 16] |   bf16
//!         products               line t   | P[t, 0] ... P[t, 15] |                             f32
//!
//! `tdpbf16ps` multiplies two tiles of bf16 and sums in f32. Scales change with every block of 32 columns, so one
//! instruction is all that can be summed in a tile. Its products go through memory, where one fused
//! multiply-add a token takes them up, as the kernel of AVX-512 does.
//! 1. Bytes have `tdpbssd`, which needs no conversion of activations, but then a token takes three vector
//!    instructions instead of one: 18 ns a tile instead of 11.
//! 2. Steps overlap: while the product of block b is made, the sums take up block b - 3, and block b - 2 is
//!    stored, from one piece to the next without a gap. A store that waits for its product holds up those behind it.
//! 3. A piece of 8 blocks of two panels (16 KiB), of 16 tokens (8 KiB) and four products on their way (4 KiB)
//!    are in the first-level cache together.
//! 4. Weights are converted once for 512 tokens, activations once for 32 panels. Columns 16 apart stand together,
//!    as nibbles do: a table gives both.
//! 5. While a panel is converted, its successor two further on is asked for.
//! 6. Few tokens are not worth the conversion and go the way of AVX-512.
//! Work    16 x 16 x 32 multiply-adds a `tdpbf16ps`, 16 cycles
//! Limit   `tdpbf16ps` and `tilestored` take 16 cycles each and hardly overlap: half of the rate of the former.
//!         Measured, 512 tokens: 0.24 of it; the rest is tokens and sums from the second-level cache, and conversions
//! Exact   weights (8 bits) and scaled activations (7 bits times 2^-120 to 2^103) are bf16 exactly; products and their
//!         sums are less than 2^24 times sx and never subnormal: exact in any order, and P is what AVX-512
//!         multiplies with the weights' scales. All results are its results, bit for bit
//! ```

use super::tile::{Line, ROWS, Tiles};
use crate::cpu::avx512::{packed as avx512, pairs};
use crate::view::ColsMut;
use phidias_quant::activations::{Activations, TILE, Tile};
use phidias_quant::packed::{PANEL_ROWS, Panel};
use phidias_quant::{BLOCK, Format, Packed, q4, q8};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Fewer tokens go the way of AVX-512; no table converts bytes.
pub(super) const fn fewest(format: Format) -> usize {
    match format {
        Format::Q4 => 16,
        Format::Q8 => 32,
    }
}
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

/// A tile of bf16, as bits, `[tokens][32]` or `[16][rows][2]`.
type Halves = [Line<[u16; BLOCK]>; ROWS];
/// Sums or products of 16 tokens and a panel, `[tokens][rows]`.
type Floats = [Line<[f32; PANEL_ROWS]>; ROWS];

const _: () = assert!(ROWS == PANEL_ROWS && ROWS == 2 * TILE);
const _: () = assert!(size_of::<Halves>() == 1024 && size_of::<Floats>() == 1024);

/// A piece of a panel.
#[derive(Clone, Copy)]
#[repr(C)]
struct Weights {
    tiles: [Halves; PIECE],
    scales: [Line<[f32; PANEL_ROWS]>; PIECE],
}

/// What a thread converts to and sums in: 1.3 MiB.
struct Scratch {
    /// `[groups of 16 tokens][blocks of a piece]`
    tokens: Vec<[Halves; PIECE]>,
    /// `[panels side by side]`
    weights: Vec<Weights>,
    /// Panels that are side by side after those before them, each time `[groups of 16 tokens][panels]`
    sums: Vec<Floats>,
    stages: [Floats; STAGES],
    /// Of one panel, of two...: `[groups of 16 tokens][panels]`
    jobs: [Vec<Job>; SIDE_BY_SIDE],
}

/// Bytes of that.
pub(super) const SCRATCH_BYTES: usize = TOKENS / ROWS * size_of::<[Halves; PIECE]>()
    + SIDE_BY_SIDE * size_of::<Weights>()
    + PANELS * (TOKENS / ROWS) * size_of::<Floats>()
    + SIDE_BY_SIDE * (SIDE_BY_SIDE + 1) / 2 * (TOKENS / ROWS) * size_of::<Job>()
    + size_of::<Scratch>();

const NO_HALVES: Halves = [Line([0; BLOCK]); ROWS];
const NO_FLOATS: Floats = [Line([0.0; PANEL_ROWS]); ROWS];
/// Where new sums begin.
static ZERO: Floats = NO_FLOATS;

impl Scratch {
    fn new() -> Self {
        let weights = Weights {
            tiles: [NO_HALVES; PIECE],
            scales: [Line([0.0; PANEL_ROWS]); PIECE],
        };
        let jobs = |panels: usize| {
            let all = (0..TOKENS / ROWS).flat_map(|x| (0..panels).map(move |w| Job { x, w }));
            all.collect()
        };
        Self {
            tokens: vec![[NO_HALVES; PIECE]; TOKENS / ROWS],
            weights: vec![weights; SIDE_BY_SIDE],
            sums: vec![NO_FLOATS; PANELS * (TOKENS / ROWS)],
            stages: [NO_FLOATS; STAGES],
            jobs: std::array::from_fn(|i| jobs(i + 1)),
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
        concat!("vmovaps zmm", $sum, ", [{from} + 64 * ", $t, "]\n")
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

/// 16 tokens times a panel.
#[derive(Clone, Copy)]
#[repr(C)]
struct Job {
    /// Which tokens.
    x: usize,
    /// Which panel.
    w: usize,
}

/// The products of a piece for every job, added to the sums of that number, or to nothing where they are `new`,
/// block after block. While the first three blocks of a job are multiplied, the last three of the one before are
/// added.
#[target_feature(enable = "avx512f")]
fn multiply(
    jobs: &[Job],
    tokens: &[[Halves; PIECE]],
    weights: &[Weights],
    sums: &mut [Floats],
    new: bool,
    stages: &mut [Floats; STAGES],
    _: &Tiles,
) {
    let inside = |job: &Job| job.x < tokens.len() && job.w < weights.len();
    assert!(!jobs.is_empty() && jobs.len() == sums.len() && jobs.iter().all(inside));
    // Before the first job there is none: its sums are not looked at.
    let mut nobody = NO_FLOATS;
    let scales = [Line([0.0f32; PANEL_ROWS]); PIECE];
    let (from, step) = if new {
        (&raw const ZERO, 0)
    } else {
        (sums.as_ptr(), size_of::<Floats>())
    };
    // SAFETY: a `Tiles` proves that there are tiles and that they are this thread's, 16 lines of 64 bytes each.
    // Jobs name tokens and weights that are there, as just asserted, and have as many sums. Blocks 0 to 7 are inside of a
    // piece, tokens 0 to 15 inside sums, stages 0 to 3 inside `stages`; all lines are aligned. What is written is borrowed
    // exclusively, and every register that changes is named; tiles are used in `asm!` only.
    unsafe {
        asm!(
            each_token!(load_sum!()),
            "2:",
            "imul {x}, [{job}], {bytes_x}",
            "imul {w}, [{job} + 8], {bytes_w}",
            "add {x}, {tokens}",
            "add {w}, {weights}",
            multiply!(0, 0, 4, 5), store!(2), add!(5, 1),
            multiply!(1, 1, 6, 7), store!(3), add!(6, 2),
            multiply!(2, 2, 4, 5), store!(0), add!(7, 3),
            each_token!(store_sum!()),
            "lea {scales}, [{w} + {tiles}]",
            each_token!(load_sum!()),
            "add {from}, {step}",
            "mov {sums}, {next}",
            "add {next}, 1024",
            multiply!(3, 3, 6, 7), store!(1), add!(0, 0),
            multiply!(4, 0, 4, 5), store!(2), add!(1, 1),
            multiply!(5, 1, 6, 7), store!(3), add!(2, 2),
            multiply!(6, 2, 4, 5), store!(0), add!(3, 3),
            multiply!(7, 3, 6, 7), store!(1), add!(4, 0),
            "add {job}, 16",
            "dec {n}",
            "jnz 2b",
            store!(2), add!(5, 1),
            store!(3), add!(6, 2),
            add!(7, 3),
            each_token!(store_sum!()),
            job = inout(reg) jobs.as_ptr() => _,
            n = inout(reg) jobs.len() => _,
            scales = inout(reg) scales.as_ptr() => _,
            sums = inout(reg) &raw mut nobody => _,
            next = inout(reg) sums.as_mut_ptr() => _,
            from = inout(reg) from => _,
            step = in(reg) step,
            x = out(reg) _,
            w = out(reg) _,
            tokens = in(reg) tokens.as_ptr(),
            weights = in(reg) weights.as_ptr(),
            stages = in(reg) stages.as_mut_ptr(),
            line = in(reg) 64usize,
            bytes_x = const size_of::<[Halves; PIECE]>(),
            bytes_w = const size_of::<Weights>(),
            tiles = const std::mem::offset_of!(Weights, scales),
            out("zmm0") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nostack),
        );
    }
}

/// `a & b | c`
const AND_OR: i32 = 0xEA;

/// Pairs of bf16 from floats that are bf16 exactly: `low` to the lower halves, `high` to the upper.
#[target_feature(enable = "avx512f")]
#[inline]
fn pairs(low: __m512, high: __m512) -> __m512i {
    let upper = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
    let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low));
    _mm512_ternarylogic_epi32::<AND_OR>(_mm512_castps_si512(high), upper, low)
}

/// Blocks of up to eight tokens as bf16, scaled, from line `first` of the tiles on; what a piece has more is zero.
#[target_feature(enable = "avx512f")]
fn widen(x: Tile<'_>, blocks: Range<usize>, first: usize, to: &mut [Halves; PIECE]) {
    for to in &mut to[blocks.len()..] {
        to[first..first + x.rows].fill(NO_HALVES[0]);
    }
    let quants = x.quants.as_chunks::<BLOCK>().0;
    for (b, to) in blocks.zip(to) {
        let at = b * x.rows..(b + 1) * x.rows;
        let lines = &mut to[first..first + x.rows];
        for ((a, magic), line) in quants[at.clone()].iter().zip(&x.magics[at]).zip(lines) {
            let magic = _mm512_set1_ps(*magic);
            let half = |i: usize| {
                // SAFETY: 16 of 32 bytes; the load needs no alignment.
                let bytes = unsafe { _mm_loadu_si128(a.as_ptr().add(16 * i).cast()) };
                let units =
                    _mm512_add_epi32(_mm512_castps_si512(magic), _mm512_cvtepi8_epi32(bytes));
                _mm512_sub_ps(_mm512_castsi512_ps(units), magic)
            };
            // SAFETY: 64 bytes; the store needs no alignment.
            unsafe { _mm512_storeu_si512(line.0.as_mut_ptr().cast(), pairs(half(0), half(1))) };
        }
    }
}

/// Blocks of a panel as bf16; what a piece has more adds -0, which changes no sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn unpack<const LINES: usize>(
    panel: Panel<'_>,
    blocks: Range<usize>,
    ahead: usize,
    to: &mut Weights,
) {
    to.tiles[blocks.len()..].fill(NO_HALVES);
    to.scales[blocks.len()..].fill(Line([-0.0; PANEL_ROWS]));
    for ((b, tile), scales) in blocks.zip(&mut to.tiles).zip(&mut to.scales) {
        let block = panel.block::<LINES>(b);
        for line in block.quants {
            let line = line.as_ptr().cast::<i8>().wrapping_add(ahead);
            _mm_prefetch::<_MM_HINT_T1>(line);
        }
        for (g, lines) in tile.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: a line is 64 bytes; the load needs no alignment.
            let load = |g: usize| unsafe { _mm512_loadu_si512(block.quants[g].as_ptr().cast()) };
            let quads = match LINES {
                4 => nibbles(load(g)),
                _ => bytes(load(g), load(g + 4)),
            };
            for (line, quads) in lines.iter_mut().zip(quads) {
                // SAFETY: 64 bytes; the store needs no alignment.
                unsafe { _mm512_storeu_si512(line.0.as_mut_ptr().cast(), quads) };
            }
        }
        // SAFETY: 16 floats; the store needs no alignment.
        unsafe { _mm512_storeu_ps(scales.0.as_mut_ptr(), avx512::scales(block.scales)) };
    }
}

/// A line of nibbles, four columns and the four 16 further on, as lines of a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn nibbles(line: __m512i) -> [__m512i; 4] {
    /// The weights as bf16, twice: an index has five bits, of which the nibble is four.
    const WEIGHTS: [u16; 32] = {
        let mut weights = [0; 32];
        let mut i = 0;
        while i < 32 {
            let weight = (i % 16) as i32 - q4::ZERO;
            weights[i] = ((weight as f32).to_bits() >> 16) as u16;
            i += 1;
        }
        weights
    };
    // SAFETY: 64 bytes; the load needs no alignment.
    let weights = unsafe { _mm512_loadu_si512(WEIGHTS.as_ptr().cast()) };
    std::array::from_fn(|j| {
        // Of byte j of each row, the bits from 0 on to its lower half and those from 4 on to its upper.
        let row = ((8 * j) | ((8 * j + 4) << 16)) as i64;
        let from = _mm512_set1_epi64(row | ((row + 0x20_0020) << 32));
        _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(from, line), weights)
    })
}

/// Two lines of bytes, 16 columns apart, as lines of a tile.
#[target_feature(enable = "avx512f")]
#[inline]
fn bytes(low: __m512i, high: __m512i) -> [__m512i; 4] {
    /// 2^23: the float of these bits and a small integer is their sum.
    const MAGIC: u32 = 0x4B00_0000;
    let magic = _mm512_set1_epi32(MAGIC as i32);
    let bias = _mm512_set1_ps(f32::from_bits(MAGIC) + q8::ZERO as f32);
    let byte = _mm512_set1_epi32(0xFF);
    std::array::from_fn(|j| {
        let float = |line: __m512i| {
            let byte_j = _mm512_srlv_epi32(line, _mm512_set1_epi32(8 * j as i32));
            let bits = _mm512_ternarylogic_epi32::<AND_OR>(byte_j, byte, magic);
            _mm512_sub_ps(_mm512_castsi512_ps(bits), bias)
        };
        pairs(float(low), float(high))
    })
}

/// Up to [`PANELS`] panels, from column `column` of `y` on, times the tokens from `first` on, up to [`TOKENS`].
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
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
        jobs,
    } = scratch;
    let rows = (x.rows() - first).min(TOKENS);
    let groups = rows.div_ceil(ROWS);
    let next_panels = SIDE_BY_SIDE * w.layout().panel_bytes();
    let sums = &mut sums[..panels.len() * groups];
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
                unpack::<LINES>(w.panel(p), blocks.clone(), next_panels, weights);
            }
            let jobs = &jobs[sums.len() / groups - 1][..sums.len()];
            let new = blocks.start == 0;
            multiply(jobs, tokens, weights, sums, new, stages, in_tiles);
        }
    }
    for t in 0..rows {
        let y = &mut y.row(first + t)[column..];
        let columns = y.chunks_mut(SIDE_BY_SIDE * PANEL_ROWS);
        for (sums, y) in sums.chunks(SIDE_BY_SIDE * groups).zip(columns) {
            let sums = &sums[t / ROWS * (sums.len() / groups)..];
            for (sums, y) in sums.iter().zip(y.chunks_mut(PANEL_ROWS)) {
                let Line(sums) = &sums[t % ROWS];
                match y.first_chunk_mut() {
                    Some(y) => *y = *sums,
                    None => y.copy_from_slice(&sums[..y.len()]),
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn gemm<const LINES: usize>(
    w: Packed<'_>,
    panels: Range<usize>,
    x: &Activations,
    mut y: ColsMut<'_>,
) {
    if x.rows() < fewest(w.layout().format()) {
        return match LINES {
            4 => pairs::gemm_q4(w, panels, x, y),
            _ => pairs::gemm_q8(w, panels, x, y),
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

crate::cpu::packed::packed_gemm!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_as_large_as_the_table_says() {
        let scratch = Scratch::new();
        let bytes = size_of_val(&scratch)
            + size_of_val(&scratch.tokens[..])
            + size_of_val(&scratch.weights[..])
            + size_of_val(&scratch.sums[..])
            + (scratch.jobs.iter().map(|jobs| size_of_val(&jobs[..]))).sum::<usize>();
        assert_eq!(bytes, SCRATCH_BYTES);
        assert_eq!(SCRATCH_BYTES >> 10, 1302);
    }
}
