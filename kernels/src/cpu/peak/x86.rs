//! The loops for x86-64, one an instruction set.
//!
//! ```text
//! 1. Twelve accumulators: two instructions a cycle of five cycles' latency need ten.
//! 2. Operands and accumulators stay in registers. An empty `asm!` makes a value opaque there, which
//!    costs no instruction: twelve equal accumulators are not computed as one, and a product of two
//!    constants is not taken out of the loop.
//! ```

use super::{Isa, MultiplyLoop, Number, OPERANDS, Operands, Run};
use crate::cpu::amx::tile::{self, ROWS, Tiles};
use std::arch::asm;
use std::arch::x86_64::*;

/// Accumulators of a round.
const ACCUMULATORS: usize = 12;
/// Products of nibbles that sixteen-bit lanes hold before widening: 8 * 2 * 15 * 127 = 30480. Six
/// accumulators then, for as many partial sums.
const BEFORE_WIDENING: usize = 8;
const WIDENING_ACCUMULATORS: usize = 6;

/// Tiles of sums, of 16 cycles' instructions of 52 cycles' latency, each sum a product of all lanes.
const TILES: usize = 4;
const TILE_PRODUCTS: usize = TILES * ROWS * 16;

pub(super) fn available(number: Number) -> Vec<MultiplyLoop> {
    let mut loops = Vec::new();
    let mut add = |has: bool, isa, instruction, lanes, repeats, run: Run| {
        if has {
            loops.push(MultiplyLoop {
                number,
                isa,
                instruction,
                lanes,
                repeats,
                run,
            });
        }
    };
    let tiles = tile::available();
    let avx512 = is_x86_feature_detected!("avx512f");
    let avx2 = is_x86_feature_detected!("avx2");
    match number {
        Number::Int8 => {
            let (isa, products) = (Isa::Amx, TILE_PRODUCTS);
            add(tiles, isa, "tdpbusd tmm", 64, products, tdpbusd);
            let (isa, products) = (Isa::Avx512, ACCUMULATORS);
            let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
            add(vnni, isa, "vpdpbusd zmm", 64, products, vpdpbusd_512);
            let isa = Isa::AvxVnni;
            // One instruction in two encodings, as fast in the one as in the other.
            if vnni && is_x86_feature_detected!("avx512vl") {
                add(true, isa, "vpdpbusd ymm", 32, products, vpdpbusd_256);
            } else {
                let has = is_x86_feature_detected!("avxvnni");
                add(has, isa, "vpdpbusd ymm", 32, products, vpdpbusd_vex);
            }
            let (isa, products) = (Isa::Avx2, WIDENING_ACCUMULATORS * BEFORE_WIDENING);
            add(avx2, isa, "vpmaddubsw ymm", 32, products, vpmaddubsw);
        }
        Number::Bf16 => {
            let (isa, products) = (Isa::Amx, TILE_PRODUCTS);
            add(tiles, isa, "tdpbf16ps tmm", 32, products, tdpbf16ps);
            let (isa, products) = (Isa::Avx512, ACCUMULATORS);
            let has = avx512 && is_x86_feature_detected!("avx512bf16");
            add(has, isa, "vdpbf16ps zmm", 32, products, vdpbf16ps);
        }
        Number::F32 => {
            let products = ACCUMULATORS;
            let isa = Isa::Avx512;
            add(avx512, isa, "vfmadd231ps zmm", 16, products, fma_512);
            let (isa, has) = (Isa::Avx2, avx2 && is_x86_feature_detected!("fma"));
            add(has, isa, "vfmadd231ps ymm", 8, products, fma_256);
        }
    }
    loops
}

/// The same value, of which the compiler knows nothing any more.
macro_rules! opaque {
    ($class:ident, $value:expr) => {{
        let mut value = $value;
        // SAFETY: no instructions at all.
        unsafe {
            asm!("/* {0} */", inout($class) value, options(nomem, nostack, preserves_flags));
        }
        value
    }};
}

#[target_feature(enable = "avx512f")]
fn sum_512(acc: [__m512i; ACCUMULATORS]) -> f64 {
    // Lanes may have wrapped around in a long run; then nobody looks at the sum.
    let lanes = acc.map(|v| i64::from(_mm512_reduce_add_epi32(v)));
    lanes.iter().sum::<i64>() as f64
}

#[target_feature(enable = "avx2")]
fn sum_256<const N: usize>(acc: [__m256i; N]) -> f64 {
    let lanes = acc.map(|v| {
        let half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let pair = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
        i64::from(_mm_cvtsi128_si32(pair).wrapping_add(_mm_extract_epi32::<1>(pair)))
    });
    lanes.iter().sum::<i64>() as f64
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn vpdpbusd_512(o: &Operands, rounds: u64) -> f64 {
    // SAFETY: both arrays are 64 bytes; the loads need no alignment.
    let (a, b) = unsafe {
        (
            _mm512_loadu_si512(o.a.as_ptr().cast()),
            _mm512_loadu_si512(o.b.as_ptr().cast()),
        )
    };
    let mut acc = [(); ACCUMULATORS].map(|()| opaque!(zmm_reg, _mm512_setzero_si512()));
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm512_dpbusd_epi32(*acc, a, b);
        }
    }
    sum_512(acc)
}

/// The first 32 operands.
#[target_feature(enable = "avx2")]
fn load_256(o: &Operands) -> [__m256i; 2] {
    // SAFETY: both arrays are 64 bytes; the loads need no alignment.
    unsafe {
        [
            _mm256_loadu_si256(o.a.as_ptr().cast()),
            _mm256_loadu_si256(o.b.as_ptr().cast()),
        ]
    }
}

#[target_feature(enable = "avx2,avx512f,avx512vl,avx512vnni")]
fn vpdpbusd_256(o: &Operands, rounds: u64) -> f64 {
    let [a, b] = load_256(o);
    let mut acc = [(); ACCUMULATORS].map(|()| opaque!(ymm_reg, _mm256_setzero_si256()));
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm256_dpbusd_epi32(*acc, a, b);
        }
    }
    sum_256(acc)
}

#[target_feature(enable = "avx2,avxvnni")]
fn vpdpbusd_vex(o: &Operands, rounds: u64) -> f64 {
    let [a, b] = load_256(o);
    let mut acc = [(); ACCUMULATORS].map(|()| opaque!(ymm_reg, _mm256_setzero_si256()));
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm256_dpbusd_avx_epi32(*acc, a, b);
        }
    }
    sum_256(acc)
}

/// As the q4 kernel of the AVX2 table can do it at best: eight products a sixteen-bit lane, then
/// widened once.
#[target_feature(enable = "avx2")]
fn vpmaddubsw(o: &Operands, rounds: u64) -> f64 {
    let [mut a, b] = load_256(o);
    let one = opaque!(ymm_reg, _mm256_set1_epi16(1));
    let mut acc = [_mm256_setzero_si256(); WIDENING_ACCUMULATORS];
    for _ in 0..rounds {
        for acc in &mut acc {
            let mut lanes = _mm256_setzero_si256();
            for _ in 0..BEFORE_WIDENING {
                a = opaque!(ymm_reg, a);
                lanes = _mm256_add_epi16(lanes, _mm256_maddubs_epi16(a, b));
            }
            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(lanes, one));
        }
    }
    sum_256(acc)
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn vdpbf16ps(o: &Operands, rounds: u64) -> f64 {
    /// 16 floats as the low halves of the result, 16 more as the high ones.
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn narrow(values: [f32; 32]) -> __m512bh {
        // SAFETY: 32 floats are two registers; the loads need no alignment.
        let [low, high] = unsafe {
            [
                _mm512_loadu_ps(values.as_ptr()),
                _mm512_loadu_ps(values.as_ptr().add(16)),
            ]
        };
        _mm512_cvtne2ps_pbh(high, low)
    }
    let (a, b) = (narrow(o.a_f32()), narrow(o.b_f32()));
    let mut acc = [(); ACCUMULATORS].map(|()| opaque!(zmm_reg, _mm512_setzero_ps()));
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm512_dpbf16_ps(*acc, a, b);
        }
    }
    let lanes = acc.map(|v| f64::from(_mm512_reduce_add_ps(v)));
    lanes.iter().sum()
}

#[target_feature(enable = "avx512f")]
fn fma_512(o: &Operands, rounds: u64) -> f64 {
    let (a, b) = (o.a_f32::<16>(), o.b_f32::<16>());
    // SAFETY: 16 floats are one register; the loads need no alignment.
    let (a, b) = unsafe { (_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr())) };
    let mut acc = [(); ACCUMULATORS].map(|()| opaque!(zmm_reg, _mm512_setzero_ps()));
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm512_fmadd_ps(a, b, *acc);
        }
    }
    let lanes = acc.map(|v| f64::from(_mm512_reduce_add_ps(v)));
    lanes.iter().sum()
}

#[target_feature(enable = "avx2,fma")]
fn fma_256(o: &Operands, rounds: u64) -> f64 {
    let (a, b) = (o.a_f32::<8>(), o.b_f32::<8>());
    // SAFETY: 8 floats are one register; the loads need no alignment.
    let (a, b) = unsafe { (_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(b.as_ptr())) };
    let mut acc = [(); ACCUMULATORS].map(|()| opaque!(ymm_reg, _mm256_setzero_ps()));
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm256_fmadd_ps(a, b, *acc);
        }
    }
    let mut lanes = [0.0f32; 8 * ACCUMULATORS];
    for (out, v) in lanes.as_chunks_mut::<8>().0.iter_mut().zip(acc) {
        // SAFETY: 8 floats are one register; the store needs no alignment.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) };
    }
    lanes.iter().map(|v| f64::from(*v)).sum()
}

/// The loop of a tile instruction, on 16 rows of `$a` and 16 columns of what `$b` has; the sums, `[[$sum; 256]; TILES]`.
macro_rules! tiles {
    ($instruction:literal, $a:expr, $b:expr, $sum:ty, $rounds:expr) => {{
        let mut sums = [[<$sum>::default(); ROWS * 16]; TILES];
        // SAFETY: the loop exists only where tiles are available.
        let _tiles = unsafe { Tiles::take() };
        // SAFETY: a tile is 16 lines of 64 bytes: 16 times the one of `a`, all of `b`, and `sums` has four. Tiles
        // are this thread's while `_tiles` lives, and used in `asm!` only.
        unsafe {
            asm!(
                "tileloadd tmm4, [{a} + {same}]",
                "tileloadd tmm5, [{b} + {line}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "test {rounds}, {rounds}",
                "jz 3f",
                "2:",
                concat!($instruction, " tmm0, tmm4, tmm5"),
                concat!($instruction, " tmm1, tmm4, tmm5"),
                concat!($instruction, " tmm2, tmm4, tmm5"),
                concat!($instruction, " tmm3, tmm4, tmm5"),
                "dec {rounds}",
                "jnz 2b",
                "3:",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                "tilestored [{sums} + {line} + 3072], tmm3",
                a = in(reg) $a.as_ptr(),
                b = in(reg) $b.as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                same = in(reg) 0usize,
                line = in(reg) 64usize,
                rounds = inout(reg) $rounds => _,
                options(nostack),
            );
        }
        sums
    }};
}

fn tdpbusd(o: &Operands, rounds: u64) -> f64 {
    let b: [[i8; OPERANDS]; ROWS] =
        std::array::from_fn(|k| std::array::from_fn(|i| o.b[4 * k + i % 4]));
    let sums = tiles!("tdpbusd", o.a, b, i32, rounds);
    sums.as_flattened()
        .iter()
        .map(|v| i64::from(*v))
        .sum::<i64>() as f64
}

fn tdpbf16ps(o: &Operands, rounds: u64) -> f64 {
    // Small integers are bf16 in the upper halves of their floats.
    let half = |v: f32| (v.to_bits() >> 16) as u16;
    let a = o.a_f32::<32>().map(half);
    let columns = o.b_f32::<32>().map(half);
    let b: [[u16; 32]; ROWS] =
        std::array::from_fn(|k| std::array::from_fn(|i| columns[2 * k + i % 2]));
    let sums = tiles!("tdpbf16ps", a, b, f32, rounds);
    sums.as_flattened().iter().map(|v| f64::from(*v)).sum()
}
