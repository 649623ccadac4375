//! GEMM, int4 and int8 weights x int8 activations in 256-bit registers; maths in `gemm.rs`, layout
//! in [`phidias_quant::packed`], the scales of the activations in [`phidias_quant::activations`].
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
//! 3. AVX-VNNI does either in one instruction, `vpdpbusd`, as the AVX-512 table does.
//! 4. A panel meets up to four tokens at once, line by line: a broadcast serves both halves of a line, and
//!    the eight integer sums stay in registers. More tokens take the same panel again, from the
//!    second-level cache.
//! 5. Zero point and scale of the activations are in the number that the sums start from.
//! Work   q4: 8 vpmaddubsw and 8 vpaddw for 8 rows x 32 columns; q8 four instructions a product
//! Limit  one token: memory bandwidth; many: the ports of vpmaddubsw and of the broadcast loads
//! Exact  integers exactly; f32 with one fused multiply-add a block, where scalar rounds twice
//! ```

use phidias_quant::BLOCK;
use phidias_quant::packed::LINE;
use std::arch::x86_64::*;

/// Halves of a panel: a register has eight rows.
pub(in crate::cpu) const PARTS: usize = 2;
/// Rows of half a panel.
pub(in crate::cpu) const HALF: usize = PANEL_ROWS / PARTS;

/// Four bytes for a broadcast: four activations, a pair of 16-bit integers, or a number. Read through a pointer one by one, they
/// become loads that broadcast by themselves; from an array the compiler would load several and shuffle.
#[inline(always)]
pub(in crate::cpu) fn four<T: Four>(at: &T) -> i32 {
    // SAFETY: the types that are `Four`, all of them below, are four bytes; the load needs no alignment.
    unsafe { std::ptr::from_ref(at).cast::<i32>().read_unaligned() }
}

/// Four bytes without padding.
pub(in crate::cpu) trait Four {}
impl Four for [i8; 4] {}
impl Four for [i16; 2] {}
impl Four for i32 {}
impl Four for f32 {}

/// The four activations of group `g` of a block, in every row's place.
#[target_feature(enable = "avx2")]
#[inline]
fn broadcast(block: &[i8; BLOCK], g: usize) -> __m256i {
    let (fours, _) = block.as_chunks::<4>();
    _mm256_set1_epi32(four(&fours[g]))
}

/// Half `half` of a line: four columns of eight rows.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu) fn half_line(line: &[u8; LINE], half: usize) -> __m256i {
    let (halves, _) = line.as_chunks::<{ LINE / PARTS }>();
    // SAFETY: half a line is 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(halves[half].as_ptr().cast()) }
}

/// Half `half` of a line of nibbles: the columns of group `g`, and of `g + 4`.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu) fn nibbles(line: &[u8; LINE], half: usize) -> [__m256i; 2] {
    let (bytes, mask) = (half_line(line, half), _mm256_set1_epi8(15));
    let high = _mm256_srli_epi16::<4>(bytes);
    [_mm256_and_si256(bytes, mask), _mm256_and_si256(high, mask)]
}

/// What a line of a block is to four tokens, as text for `asm!`: `$product` with the registers `$w` of both halves of the
/// line, for the activations `$at` bytes from the start of the block. Sums are {s0} to {s7}, tokens {a} and 32 bytes
/// further on each.
macro_rules! four_tokens {
    ($product:ident, $at:literal, $($w:literal),+) => {
        concat!(
            $product!("0", $at, "{s0}", "{s1}", $($w),+),
            $product!("32", $at, "{s2}", "{s3}", $($w),+),
            $product!("64", $at, "{s4}", "{s5}", $($w),+),
            $product!("96", $at, "{s6}", "{s7}", $($w),+),
        )
    };
}
pub(in crate::cpu) use four_tokens;

/// Four of the activations of the token `$token` bytes from the first one, in every place of {x}.
macro_rules! activations_of {
    ($token:literal, $at:literal) => {
        concat!("vpbroadcastd {x}, [{a} + ", $token, " + ", $at, "]\n")
    };
}
pub(in crate::cpu) use activations_of;

/// A block of nibbles: of each line {w0} and {w1}, and of the group four further on {h0} and {h1}.
macro_rules! nibbles_of {
    ($product:ident) => {
        concat!(
            nibbles_of!($product, "0", "0", "16"),
            nibbles_of!($product, "64", "4", "20"),
            nibbles_of!($product, "128", "8", "24"),
            nibbles_of!($product, "192", "12", "28"),
        )
    };
    ($product:ident, $line:literal, $low:literal, $high:literal) => {
        concat!(
            "vmovdqu {w0}, [{lines} + ",
            $line,
            "]\n",
            "vmovdqu {w1}, [{lines} + ",
            $line,
            " + 32]\n",
            "vpsrlw {h0}, {w0}, 4\n",
            "vpsrlw {h1}, {w1}, 4\n",
            "vpand {w0}, {w0}, {mask}\n",
            "vpand {w1}, {w1}, {mask}\n",
            "vpand {h0}, {h0}, {mask}\n",
            "vpand {h1}, {h1}, {mask}\n",
            four_tokens!($product, $low, "{w0}", "{w1}"),
            four_tokens!($product, $high, "{h0}", "{h1}"),
        )
    };
}
pub(in crate::cpu) use nibbles_of;

/// A block of bytes: `$line` of where each line and its activations are.
macro_rules! bytes_of {
    ($line:ident) => {
        concat!(
            $line!("0", "0"),
            $line!("64", "4"),
            $line!("128", "8"),
            $line!("192", "12"),
            $line!("256", "16"),
            $line!("320", "20"),
            $line!("384", "24"),
            $line!("448", "28"),
        )
    };
}
pub(in crate::cpu) use bytes_of;

/// Adds the products of `$lines` with four tokens `$a` to `$sums`: `$text`, with the registers `$in` and `$out` that it
/// names.
///
/// Written out, since sixteen registers are what this needs: the compiler has all lines and activations in hand at
/// once, and two thirds of them on the stack. On a Golden Cove core 64 tokens ran at 139 G multiply-adds/s as a loop
/// that was kept one, 157 unrolled and 163 like this (q4, AVX-VNNI; 259 is the peak of `vpdpbusd`, and shifts and
/// the floats take a fifth of its ports).
macro_rules! add_products {
    (
        ($sums:expr, $lines:expr, $a:expr), $text:expr,
        in: $($in:ident = $value:expr),*; out: $($out:ident),+
    ) => {{
        let [[s0, s1], [s2, s3], [s4, s5], [s6, s7]] = $sums;
        // SAFETY: the instructions are those of the function this stands in. It reads four tokens of a block each and the
        // lines, both through references to all of it, and changes registers only.
        unsafe {
            std::arch::asm!(
                $text,
                lines = in(reg) $lines.as_ptr(),
                a = in(reg) $a.as_ptr(),
                $($in = in(ymm_reg) $value,)*
                s0 = inout(ymm_reg) *s0,
                s1 = inout(ymm_reg) *s1,
                s2 = inout(ymm_reg) *s2,
                s3 = inout(ymm_reg) *s3,
                s4 = inout(ymm_reg) *s4,
                s5 = inout(ymm_reg) *s5,
                s6 = inout(ymm_reg) *s6,
                s7 = inout(ymm_reg) *s7,
                $($out = out(ymm_reg) _,)+
                options(pure, readonly, nostack, preserves_flags),
            );
        }
    }};
}
pub(in crate::cpu) use add_products;

/// A sum for each half of a panel and token.
pub(in crate::cpu) type Sums<const T: usize> = [[__m256i; PARTS]; T];

/// Sums of 16 bits of a block of nibbles.
#[target_feature(enable = "avx2")]
#[inline]
fn four_q4(sums: &mut Sums<4>, lines: &[[u8; LINE]; 4], a: &[[i8; BLOCK]; 4]) {
    macro_rules! product {
        ($token:literal, $at:literal, $s0:literal, $s1:literal, $w0:literal, $w1:literal) => {
            concat!(
                activations_of!($token, $at),
                "vpmaddubsw {y}, ",
                $w0,
                ", {x}\n",
                "vpaddw ",
                $s0,
                ", ",
                $s0,
                ", {y}\n",
                "vpmaddubsw {y}, ",
                $w1,
                ", {x}\n",
                "vpaddw ",
                $s1,
                ", ",
                $s1,
                ", {y}\n",
            )
        };
    }
    add_products!(
        (sums, lines, a),
        nibbles_of!(product),
        in: mask = _mm256_set1_epi8(15); out: x, y, w0, w1, h0, h1
    );
}

/// Sums of 32 bits of a block of bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn four_q8(sums: &mut Sums<4>, lines: &[[u8; LINE]; 8], a: &[[i8; BLOCK]; 4]) {
    macro_rules! product {
        (
            $token:literal, $at:literal, $s0:literal, $s1:literal,
            $w0:literal, $w1:literal, $m0:literal, $m1:literal
        ) => {
            concat!(
                activations_of!($token, $at),
                "vpsignb {y}, {x}, ",
                $w0,
                "\n",
                "vpmaddubsw {y}, ",
                $m0,
                ", {y}\n",
                "vpmaddwd {y}, {y}, {one}\n",
                "vpaddd ",
                $s0,
                ", ",
                $s0,
                ", {y}\n",
                "vpsignb {y}, {x}, ",
                $w1,
                "\n",
                "vpmaddubsw {y}, ",
                $m1,
                ", {y}\n",
                "vpmaddwd {y}, {y}, {one}\n",
                "vpaddd ",
                $s1,
                ", ",
                $s1,
                ", {y}\n",
            )
        };
    }
    macro_rules! line {
        ($line:literal, $at:literal) => {
            concat!(
                "vpxor {w0}, {flip}, [{lines} + ",
                $line,
                "]\n",
                "vpxor {w1}, {flip}, [{lines} + ",
                $line,
                " + 32]\n",
                "vpabsb {m0}, {w0}\n",
                "vpabsb {m1}, {w1}\n",
                four_tokens!(product, $at, "{w0}", "{w1}", "{m0}", "{m1}"),
            )
        };
    }
    add_products!(
        (sums, lines, a),
        bytes_of!(line),
        in: flip = _mm256_set1_epi8(i8::MIN), one = _mm256_set1_epi16(1); out: x, y, w0, w1, m0, m1
    );
}

/// The products of a block of nibbles with `T` tokens, scaled by the activations.
#[target_feature(enable = "avx2")]
#[inline]
fn products_q4<const T: usize>(
    lines: &[[u8; LINE]; 4],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
    magics: &[f32; T],
) -> [[__m256; PARTS]; T] {
    let mut sums: Sums<T> = [[_mm256_setzero_si256(); PARTS]; T];
    if let (Ok(sums), Ok(a)) = ((&mut sums[..]).try_into(), a[..].try_into()) {
        four_q4(sums, lines, a);
    } else {
        for (g, line) in lines.iter().enumerate() {
            let w = [nibbles(line, 0), nibbles(line, 1)];
            for t in 0..T {
                for high in 0..2 {
                    let x = broadcast(&a[t], g + 4 * high);
                    for half in 0..PARTS {
                        let pairs = _mm256_maddubs_epi16(w[half][high], x);
                        sums[t][half] = _mm256_add_epi16(sums[t][half], pairs);
                    }
                }
            }
        }
    }
    let one = _mm256_set1_epi16(1);
    let mut out = [[_mm256_setzero_ps(); PARTS]; T];
    for t in 0..T {
        for half in 0..PARTS {
            let sum = _mm256_madd_epi16(sums[t][half], one);
            let sum = _mm256_add_epi32(sum, _mm256_set1_epi32(four(&starts[t])));
            out[t][half] = _mm256_sub_ps(_mm256_castsi256_ps(sum), _mm256_set1_ps(magics[t]));
        }
    }
    out
}

/// The products of a block of bytes with `T` tokens, scaled by the activations.
#[target_feature(enable = "avx2")]
#[inline]
fn products_q8<const T: usize>(
    lines: &[[u8; LINE]; 8],
    a: &[[i8; BLOCK]; T],
    _: &[i32; T],
    magics: &[f32; T],
) -> [[__m256; PARTS]; T] {
    let flip = _mm256_set1_epi8(i8::MIN);
    let one = _mm256_set1_epi16(1);
    let mut sums: Sums<T> = [[_mm256_setzero_si256(); PARTS]; T];
    for t in 0..T {
        sums[t] = [_mm256_castps_si256(_mm256_set1_ps(magics[t])); PARTS];
    }
    if let (Ok(sums), Ok(a)) = ((&mut sums[..]).try_into(), a[..].try_into()) {
        four_q8(sums, lines, a);
    } else {
        for (g, line) in lines.iter().enumerate() {
            for half in 0..PARTS {
                let signed = _mm256_xor_si256(half_line(line, half), flip);
                let magnitude = _mm256_abs_epi8(signed);
                for t in 0..T {
                    let x = _mm256_sign_epi8(broadcast(&a[t], g), signed);
                    let pairs = _mm256_maddubs_epi16(magnitude, x);
                    sums[t][half] = _mm256_add_epi32(sums[t][half], _mm256_madd_epi16(pairs, one));
                }
            }
        }
    }
    let mut out = [[_mm256_setzero_ps(); PARTS]; T];
    for t in 0..T {
        for half in 0..PARTS {
            let magic = _mm256_set1_ps(magics[t]);
            out[t][half] = _mm256_sub_ps(_mm256_castsi256_ps(sums[t][half]), magic);
        }
    }
    out
}

/// Everything around the products of one block, for the instructions in `$features`:
/// `$q4` and `$q8` multiply a block with some tokens.
macro_rules! packed_256 {
    ($features:literal, $q4:ident, $q8:ident) => {
        use crate::cpu::packed::{TOKENS, blocks_in_turn, by_tokens, packed_gemm, put, several};
        use crate::cpu::prefetch::{self, RUNS};
        use crate::view::ColsMut;
        use phidias_quant::activations::{Activations, TILE, Tile};
        use phidias_quant::packed::{PANEL_ROWS, Panel};
        use phidias_quant::{Packed, f16};
        use std::ops::Range;

        /// 8 scales as f32.
        #[target_feature(enable = $features)]
        #[inline]
        fn scales(scales: &[f16; PANEL_ROWS], half: usize) -> __m256 {
            let eight: &[f16; HALF] = &scales.as_chunks().0[half];
            // SAFETY: 8 scales are 16 bytes; the load needs no alignment.
            _mm256_cvtph_ps(unsafe { _mm_loadu_si128(eight.as_ptr().cast()) })
        }

        /// `R` panels, some blocks of each in turn, times the tokens `first .. first + T` of a tile.
        #[target_feature(enable = $features)]
        #[inline]
        pub(in crate::cpu) fn tokens<const T: usize, const LINES: usize, const R: usize>(
            panels: [Panel<'_>; R],
            x: Tile<'_>,
            first: usize,
        ) -> [[[f32; PANEL_ROWS]; T]; R] {
            let (quants, _) = x.quants.as_chunks::<BLOCK>();
            let mut sums = [[[_mm256_setzero_ps(); PARTS]; T]; R];
            let blocks = panels[0].blocks();
            let in_turn = blocks_in_turn::<LINES, R>(blocks);
            for from in (0..blocks).step_by(in_turn) {
                for p in 0..R {
                    for b in from..(from + in_turn).min(blocks) {
                        let block = panels[p].block::<LINES>(b);
                        prefetch::ahead::<T, LINES, R>(b, panels[p], block.quants);
                        let (at, inside) = (b * x.rows + first, "tokens of the tile");
                        let a = quants[at..].first_chunk().expect(inside);
                        let starts = x.starts[at..].first_chunk().expect(inside);
                        let magics = x.magics[at..].first_chunk().expect(inside);
                        let products: [[__m256; PARTS]; T] = match LINES {
                            4 => $q4(block.quants.first_chunk().expect("nibbles"), a, starts, magics),
                            _ => $q8(block.quants.first_chunk().expect("bytes"), a, starts, magics),
                        };
                        for t in 0..T {
                            for half in 0..PARTS {
                                let scales = scales(block.scales, half);
                                sums[p][t][half] =
                                    _mm256_fmadd_ps(products[t][half], scales, sums[p][t][half]);
                            }
                        }
                    }
                }
            }
            let mut out = [[[0.0; PANEL_ROWS]; T]; R];
            for p in 0..R {
                for t in 0..T {
                    let (halves, _) = out[p][t].as_chunks_mut::<HALF>();
                    for half in 0..PARTS {
                        // SAFETY: 8 floats; the store needs no alignment.
                        unsafe { _mm256_storeu_ps(halves[half].as_mut_ptr(), sums[p][t][half]) }
                    }
                }
            }
            out
        }

        by_tokens!($features, 1 2 3 4);
        packed_gemm!($features);
    };
}
pub(in crate::cpu) use packed_256;

packed_256!("avx2,fma,f16c", products_q4, products_q8);
