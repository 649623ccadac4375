//! GEMM, int4 and int8 weights x int8 activations; maths and layout in `gemm.rs` and
//! [`phidias_quant::packed`].
//!
//! ```text
//! A line of 64 bytes is two registers: rows 0-7 and 8-15 of the panel, four columns of each row.
//! The four activations that meet those columns are one 32-bit broadcast, so
//!     vpmaddubsw(weights u8, activations i8)     sums two neighbouring products into 16 bits
//!     vpmaddwd(.., 1)                            sums two of those into 32 bits: one sum a row.
//! 1. q4: a pair of products is at most 2 * 15 * 127 = 3810, so the eight groups of a block fit in
//!    16 bits (30480) and are widened once a block instead of eight times.
//! 2. q8: u - 128 is a signed byte; vpmaddubsw takes its magnitude and the activations with its sign
//!    (at most 2 * 128 * 127 = 32512). The zero point is then out already.
//! 3. Two tokens a pass over the weights: unpacking is shared, and both fit in the 16 registers.
//! Work   q4: 32 vpmaddubsw for 16 rows x 32 columns x 2 tokens; q8 twice that, and widening
//! Limit  one token: memory bandwidth; many: the two ports of vpmaddubsw
//! Exact  integers exactly; f32 with one fused multiply-add a block, where scalar rounds twice
//! ```

use crate::view::ColsMut;
use phidias_quant::activations::{Activations, Row};
use phidias_quant::packed::{LINE, PANEL_ROWS, Panel};
use phidias_quant::{BLOCK, Packed, f16, q4};
use std::arch::x86_64::*;
use std::ops::Range;

/// Distance of the prefetch, bytes: a page, which the hardware's own prefetcher does not cross.
const AHEAD: usize = 4096;

/// The halves of a line.
#[target_feature(enable = "avx2")]
#[inline]
fn load(line: &[u8; LINE]) -> [__m256i; 2] {
    // SAFETY: both loads are inside the 64 bytes; they need no alignment.
    unsafe {
        [
            _mm256_loadu_si256(line.as_ptr().cast()),
            _mm256_loadu_si256(line.as_ptr().add(32).cast()),
        ]
    }
}

/// Asks for the lines that are [`AHEAD`] bytes further on. They may belong to the next panel, or to
/// nothing at the end of the weights: a prefetch never faults.
#[target_feature(enable = "avx2")]
#[inline]
fn prefetch(lines: &[[u8; LINE]]) {
    for line in lines {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(AHEAD).cast());
    }
}

/// 16 scales as f32, rows 0-7 and 8-15.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load_scales(scales: &[f16; PANEL_ROWS]) -> [__m256; 2] {
    // SAFETY: 16 scales are 32 bytes; the loads need no alignment.
    let halves = unsafe {
        [
            _mm_loadu_si128(scales.as_ptr().cast()),
            _mm_loadu_si128(scales.as_ptr().add(8).cast()),
        ]
    };
    [_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])]
}

/// The four activations of group `g` of a block, in every row's place.
#[target_feature(enable = "avx2")]
#[inline]
fn broadcast(block: &[i8; BLOCK], g: usize) -> __m256i {
    let four = [
        block[4 * g],
        block[4 * g + 1],
        block[4 * g + 2],
        block[4 * g + 3],
    ];
    _mm256_set1_epi32(i32::from_le_bytes(four.map(|v| v as u8)))
}

/// Integer sums of one block, without the zero point: `[token][half]` of eight rows.
type Sums<const TOKENS: usize> = [[__m256i; 2]; TOKENS];

#[target_feature(enable = "avx2")]
#[inline]
fn block_q4<const TOKENS: usize>(
    lines: &[[u8; LINE]],
    a: [&[i8; BLOCK]; TOKENS],
    sums: [i32; TOKENS],
) -> Sums<TOKENS> {
    let mask = _mm256_set1_epi8(15);
    let mut acc = [[_mm256_setzero_si256(); 2]; TOKENS];
    for (g, line) in lines.iter().enumerate() {
        let bytes = load(line);
        let low = bytes.map(|v| _mm256_and_si256(v, mask));
        let high = bytes.map(|v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask));
        for t in 0..TOKENS {
            let (x, y) = (broadcast(a[t], g), broadcast(a[t], g + 4));
            for h in 0..2 {
                acc[t][h] = _mm256_add_epi16(acc[t][h], _mm256_maddubs_epi16(low[h], x));
                acc[t][h] = _mm256_add_epi16(acc[t][h], _mm256_maddubs_epi16(high[h], y));
            }
        }
    }
    let one = _mm256_set1_epi16(1);
    std::array::from_fn(|t| {
        let zero = _mm256_set1_epi32(q4::ZERO * sums[t]);
        acc[t].map(|v| _mm256_sub_epi32(_mm256_madd_epi16(v, one), zero))
    })
}

#[target_feature(enable = "avx2")]
#[inline]
fn block_q8<const TOKENS: usize>(
    lines: &[[u8; LINE]],
    a: [&[i8; BLOCK]; TOKENS],
    _: [i32; TOKENS],
) -> Sums<TOKENS> {
    let flip = _mm256_set1_epi8(i8::MIN);
    let one = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_si256(); 2]; TOKENS];
    for (g, line) in lines.iter().enumerate() {
        let w = load(line).map(|v| _mm256_xor_si256(v, flip));
        let magnitude = w.map(|w| _mm256_abs_epi8(w));
        for t in 0..TOKENS {
            let x = broadcast(a[t], g);
            for h in 0..2 {
                let pairs = _mm256_maddubs_epi16(magnitude[h], _mm256_sign_epi8(x, w[h]));
                acc[t][h] = _mm256_add_epi32(acc[t][h], _mm256_madd_epi16(pairs, one));
            }
        }
    }
    acc
}

macro_rules! gemm {
    ($name:ident, $panel:ident, $block:ident) => {
        #[target_feature(enable = "avx2,fma,f16c")]
        pub(super) fn $name(
            w: Packed<'_>,
            panels: Range<usize>,
            x: &Activations,
            mut y: ColsMut<'_>,
        ) {
            for (p, panel) in panels.map(|p| w.panel(p)).enumerate() {
                let first = p * PANEL_ROWS;
                let mut put = |t: usize, results: [f32; PANEL_ROWS]| {
                    let y = &mut y.row(t)[first..];
                    let cols = y.len().min(PANEL_ROWS);
                    y[..cols].copy_from_slice(&results[..cols]);
                };
                let mut t = 0;
                while t + 2 <= x.rows() {
                    let [a, b] = $panel(panel, [x.row(t), x.row(t + 1)]);
                    put(t, a);
                    put(t + 1, b);
                    t += 2;
                }
                if t < x.rows() {
                    let [a] = $panel(panel, [x.row(t)]);
                    put(t, a);
                }
            }
        }

        /// A panel times some tokens. The sum over the blocks of each token is its own, so tokens
        /// do not change each other's results.
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        fn $panel<const TOKENS: usize>(
            panel: Panel<'_>,
            x: [Row<'_>; TOKENS],
        ) -> [[f32; PANEL_ROWS]; TOKENS] {
            let (scales, _) = panel.scales.as_chunks::<PANEL_ROWS>();
            let (lines, _) = panel.quants.as_chunks::<LINE>();
            let per_block = lines.len() / scales.len();
            let quants = x.map(|row| row.quants.as_chunks::<BLOCK>().0);
            let mut acc = [[_mm256_setzero_ps(); 2]; TOKENS];
            for (b, (scales, lines)) in scales.iter().zip(lines.chunks_exact(per_block)).enumerate()
            {
                prefetch(lines);
                let sums = $block(
                    lines,
                    std::array::from_fn(|t| &quants[t][b]),
                    x.map(|row| row.sums[b]),
                );
                let scales = load_scales(scales);
                for t in 0..TOKENS {
                    let sx = _mm256_set1_ps(x[t].scales[b]);
                    for h in 0..2 {
                        let scale = _mm256_mul_ps(scales[h], sx);
                        acc[t][h] =
                            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][h]), scale, acc[t][h]);
                    }
                }
            }
            acc.map(|halves| {
                let mut out = [0.0; PANEL_ROWS];
                // SAFETY: the two stores fill the 16 floats; they need no alignment.
                unsafe {
                    _mm256_storeu_ps(out.as_mut_ptr(), halves[0]);
                    _mm256_storeu_ps(out.as_mut_ptr().add(8), halves[1]);
                }
                out
            })
        }
    };
}

gemm!(gemm_q4, panel_q4, block_q4);
gemm!(gemm_q8, panel_q8, block_q8);
