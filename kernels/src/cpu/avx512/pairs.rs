//! GEMM, int4 and int8 weights x int8 activations, of many tokens on cores that compute 512 bits at once; maths in
//! `gemm.rs`, layout in [`phidias_quant::packed`] and [`phidias_quant::activations`].
//!
//! ```text
//! Such a core starts two products of 512 bits a cycle, and two loads. In the loop of `packed.rs` each product has a load of its
//! own, the broadcast of its activations, and sums and zero points come on top: 88 loads a block of eight tokens, for
//! two ports that are also busy 44 cycles of 46. So here a broadcast serves two panels:
//! 1. A block of two panels is unpacked into 16 registers, and all tokens pass it, four at a time: 8 registers have
//!    their integer sums, 4 their activations, 2 the scales of the weights.
//! 2. What a token has summed up before is read and written once a block, in the first-level cache: 128 tokens
//!    and two panels are 16 KiB.
//! 3. A row of the result is on a page of its own, and waiting for it to be written to took an eighth of the time. Some
//!    are asked for with each block.
//! 4. In a last tile of fewer tokens, four or eight are computed, some of which are not there.
//! Work   a block of two panels and four tokens: 64 vpdpbusd, 8 subtractions and 8 multiply-adds for two ports, 52 loads
//!        for two others; unpacking takes 28 instructions a block of two panels
//! Limit  64/80 of the vpdpbusd rate. Measured on a Golden Cove core, 0.70 where `packed.rs` has 0.52
//! Exact  what `packed.rs` computes, instruction for instruction, so the same bits
//! ```
//!
//! Up to eight tokens wait for memory, which is better read by more than two runs: they are left to `packed.rs` (5 tokens
//! of the model 1.15 times as fast there, 8 tokens 1.08).

use super::packed::{self, scales, unpack};
use crate::cpu::packed::{TOKENS, packed_gemm};
use crate::cpu::prefetch;
use crate::view::ColsMut;
use phidias_quant::activations::{Activations, Rest, TILE};
use phidias_quant::packed::{LINE, PANEL_ROWS, Panel};
use phidias_quant::{BLOCK, Packed};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Panels that meet tokens together.
const PAIR: usize = 2;
/// Panels that a call had better have: the tokens stay in the second-level cache meanwhile.
pub(super) const PANELS: usize = 16;
/// Fewer tokens are left to `packed.rs`.
const FEWEST: usize = TILE + 1;

/// What the tokens of a tile have summed up, `[tokens][panels][rows]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; PAIR * PANEL_ROWS]; TILE]);

/// Token `$t` of a tile and group `$g` of columns, of which the panels have registers `$w0` and `$w1`.
macro_rules! product {
    ($t:literal, $g:literal, $x:literal, $s0:literal, $s1:literal, $w0:literal, $w1:literal) => {
        concat!(
            "vpbroadcastd zmm",
            $x,
            ", [{x} + 32 * ",
            $t,
            " + 4 * ",
            $g,
            "]\n",
            "vpdpbusd zmm",
            $s0,
            ", zmm",
            $w0,
            ", zmm",
            $x,
            "\n",
            "vpdpbusd zmm",
            $s1,
            ", zmm",
            $w1,
            ", zmm",
            $x,
            "\n",
        )
    };
}

/// The same for four tokens.
macro_rules! products {
    ([$t0:literal, $t1:literal, $t2:literal, $t3:literal], $g:literal, $w0:literal, $w1:literal) => {
        concat!(
            product!($t0, $g, "8", "0", "1", $w0, $w1),
            product!($t1, $g, "9", "2", "3", $w0, $w1),
            product!($t2, $g, "10", "4", "5", $w0, $w1),
            product!($t3, $g, "11", "6", "7", $w0, $w1),
        )
    };
}

/// Where the integer sums of a token start, for both panels.
macro_rules! start {
    ($t:literal, $s0:literal, $s1:literal) => {
        concat!(
            "vpbroadcastd zmm",
            $s0,
            ", [{starts} + 4 * ",
            $t,
            "]\n",
            "vmovdqa64 zmm",
            $s1,
            ", zmm",
            $s0,
            "\n",
        )
    };
}

/// The sum of a block as a float, times the scales of a panel, to what was there.
macro_rules! add {
    ($t:literal, $sum:literal, $scales:literal, $at:literal) => {
        concat!(
            "vsubps zmm",
            $sum,
            ", zmm",
            $sum,
            ", dword ptr [{magics} + 4 * ",
            $t,
            "]{{1to16}}\n",
            "vfmadd213ps zmm",
            $sum,
            ", zmm",
            $scales,
            ", [{sums} + 128 * ",
            $t,
            " + ",
            $at,
            "]\n",
            "vmovaps [{sums} + 128 * ",
            $t,
            " + ",
            $at,
            "], zmm",
            $sum,
            "\n",
        )
    };
}

/// A block of both panels and four tokens.
macro_rules! four_tokens {
    ($t0:literal, $t1:literal, $t2:literal, $t3:literal) => {
        concat!(
            start!($t0, "0", "1"),
            start!($t1, "2", "3"),
            start!($t2, "4", "5"),
            start!($t3, "6", "7"),
            products!([$t0, $t1, $t2, $t3], "0", "16", "24"),
            products!([$t0, $t1, $t2, $t3], "1", "17", "25"),
            products!([$t0, $t1, $t2, $t3], "2", "18", "26"),
            products!([$t0, $t1, $t2, $t3], "3", "19", "27"),
            products!([$t0, $t1, $t2, $t3], "4", "20", "28"),
            products!([$t0, $t1, $t2, $t3], "5", "21", "29"),
            products!([$t0, $t1, $t2, $t3], "6", "22", "30"),
            products!([$t0, $t1, $t2, $t3], "7", "23", "31"),
            add!($t0, "0", "12", "0"),
            add!($t0, "1", "13", "64"),
            add!($t1, "2", "12", "0"),
            add!($t1, "3", "13", "64"),
            add!($t2, "4", "12", "0"),
            add!($t2, "5", "13", "64"),
            add!($t3, "6", "12", "0"),
            add!($t3, "7", "13", "64"),
        )
    };
}

/// Adds a block of two panels times some tokens to what they have summed up: `TOKENS`, four or eight, in each of as many
/// tiles as there are `sums`. Those of the first tile stand at `at` in `x`, those of another `next` behind the one before.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn pass<const TOKENS: usize>(
    [w0, w1]: &[[__m512i; 8]; PAIR],
    [scales0, scales1]: &[__m512; PAIR],
    x: Rest<'_>,
    at: usize,
    next: usize,
    sums: &mut [Sums],
) {
    let end = at + sums.len().saturating_sub(1) * next + TOKENS;
    assert!(
        !sums.is_empty() && end <= x.quants.len() && end <= x.starts.len() && end <= x.magics.len()
    );
    macro_rules! tiles {
        ($text:expr) => {
            asm!(
                "2:",
                "prefetcht0 [{x} + {next_x}]",
                "prefetcht0 [{x} + {next_x} + 64]",
                "prefetcht0 [{x} + {next_x} + 128]",
                "prefetcht0 [{x} + {next_x} + 192]",
                $text,
                "add {x}, {next_x}",
                "add {starts}, {next}",
                "add {magics}, {next}",
                "add {sums}, 1024",
                "dec {tiles}",
                "jnz 2b",
                x = inout(reg) x.quants[at..].as_ptr() => _,
                starts = inout(reg) x.starts[at..].as_ptr() => _,
                magics = inout(reg) x.magics[at..].as_ptr() => _,
                sums = inout(reg) sums.as_mut_ptr() => _,
                tiles = inout(reg) sums.len() => _,
                next_x = in(reg) next * BLOCK,
                next = in(reg) next * size_of::<f32>(),
                in("zmm16") w0[0],
                in("zmm17") w0[1],
                in("zmm18") w0[2],
                in("zmm19") w0[3],
                in("zmm20") w0[4],
                in("zmm21") w0[5],
                in("zmm22") w0[6],
                in("zmm23") w0[7],
                in("zmm24") w1[0],
                in("zmm25") w1[1],
                in("zmm26") w1[2],
                in("zmm27") w1[3],
                in("zmm28") w1[4],
                in("zmm29") w1[5],
                in("zmm30") w1[6],
                in("zmm31") w1[7],
                in("zmm12") *scales0,
                in("zmm13") *scales1,
                out("zmm0") _,
                out("zmm1") _,
                out("zmm2") _,
                out("zmm3") _,
                out("zmm4") _,
                out("zmm5") _,
                out("zmm6") _,
                out("zmm7") _,
                out("zmm8") _,
                out("zmm9") _,
                out("zmm10") _,
                out("zmm11") _,
                options(nostack),
            )
        };
    }
    // SAFETY: the instructions are those of the function this stands in. Four or eight blocks of activations are read at
    // each of the places, of which the last one ends within all three slices, as just asserted; what is asked for a
    // tile ahead is not read. `sums` is borrowed exclusively and aligned, and every register that changes is named.
    unsafe {
        match TOKENS {
            4 => tiles!(four_tokens!("0", "1", "2", "3")),
            8 => tiles!(concat!(
                four_tokens!("0", "1", "2", "3"),
                four_tokens!("4", "5", "6", "7")
            )),
            _ => unreachable!("four tokens or eight"),
        }
    }
}

const _: () = assert!(TILE == 8 && size_of::<Sums>() == 1024 && size_of::<[i8; BLOCK]>() == 32);

/// Asks for a place to write to, at most two lines long.
#[inline(always)]
fn ask_to_write(to: &mut [f32]) {
    const LINE_FLOATS: usize = LINE / size_of::<f32>();
    let last = to.len() - 1;
    for at in [0, LINE_FLOATS.min(last), last] {
        let at = &raw mut to[at];
        // SAFETY: every CPU with AVX-512 has the instruction; it changes nothing but caches, and never faults.
        unsafe { asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags)) };
    }
}

/// Two panels times the tokens of some tiles, up to [`TOKENS`], from column `column` of `y` on.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn pair<const LINES: usize>(
    panels: [Panel<'_>; PAIR],
    x: &Activations,
    tiles: Range<usize>,
    column: usize,
    y: &mut ColsMut<'_>,
) {
    let mut sums = [Sums([[0.0; PAIR * PANEL_ROWS]; TILE]); TOKENS / TILE];
    let sums = &mut sums[..tiles.len()];
    let rows = tiles.start * TILE..x.rows().min(tiles.end * TILE);
    let whole = rows.len() / TILE;
    // The rows of a last tile that has fewer.
    let few = rows.len() % TILE;
    let width = (y.cols() - column).min(PAIR * PANEL_ROWS);
    // So many rows of the result are asked for with each block.
    let asked = rows.len().div_ceil(x.blocks());
    for b in 0..x.blocks() {
        let (first, second) = (panels[0].block::<LINES>(b), panels[1].block::<LINES>(b));
        prefetch::ahead::<TILE, LINES, PAIR>(b, panels[0], first.quants);
        prefetch::ahead::<TILE, LINES, PAIR>(b, panels[1], second.quants);
        for row in (rows.start + b * asked..rows.end).take(asked) {
            ask_to_write(&mut y.row(row)[column..][..width]);
        }
        let w = [unpack(first.quants), unpack(second.quants)];
        let scales = [scales(first.scales), scales(second.scales)];
        let next = x.blocks() * TILE;
        let (full, last) = sums.split_at_mut(whole);
        if whole > 0 {
            pass::<TILE>(&w, &scales, x.rest(tiles.start), b * TILE, next, full);
        }
        // What is computed of tokens that are not there is not looked at.
        let rest = x.rest(tiles.end - 1);
        match few {
            0 => {}
            1..=4 => pass::<4>(&w, &scales, rest, b * few, next, last),
            _ => pass::<TILE>(&w, &scales, rest, b * few, next, last),
        }
    }
    for (row, sums) in rows.zip(sums.iter().flat_map(|tile| &tile.0)) {
        let to = &mut y.row(row)[column..];
        match to.first_chunk_mut() {
            Some(to) => *to = *sums,
            None => to.copy_from_slice(&sums[..width]),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn gemm<const LINES: usize>(
    w: Packed<'_>,
    panels: Range<usize>,
    x: &Activations,
    mut y: ColsMut<'_>,
) {
    if x.rows() < FEWEST {
        return packed::gemm::<LINES>(w, panels, x, y);
    }
    let pairs = panels.start..panels.end - panels.len() % PAIR;
    for first in (0..x.tiles()).step_by(TOKENS / TILE) {
        let tiles = first..(first + TOKENS / TILE).min(x.tiles());
        for p in pairs.clone().step_by(PAIR) {
            let both = [w.panel(p), w.panel(p + 1)];
            let column = (p - panels.start) * PANEL_ROWS;
            pair::<LINES>(both, x, tiles.clone(), column, &mut y);
        }
    }
    // A panel without another.
    let columns = (pairs.len() * PANEL_ROWS).min(y.cols());
    packed::gemm::<LINES>(w, pairs.end..panels.end, x, y.split_at(columns).1);
}

packed_gemm!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni");
