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
//! 4. Weights stay, tokens pass: half a panel's block is unpacked once into 8 registers, then up to
//!    `TOKENS` tokens are multiplied with it, four at a time, their f32 sums in L1.
//! 5. Zero point and scale of the activations are in the number that the sums start from.
//! Work   q4: 8 vpmaddubsw and 8 vpaddw for 8 rows x 32 columns; q8 four instructions a product
//! Limit  one token: memory bandwidth; many: the ports of vpmaddubsw and of the broadcast loads
//! Exact  integers exactly; f32 with one fused multiply-add a block, where scalar rounds twice
//! ```

use phidias_quant::BLOCK;
use std::arch::x86_64::*;

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

/// The products of a block of nibbles with `T` tokens, scaled by the activations.
#[target_feature(enable = "avx2")]
#[inline]
fn products_q4<const T: usize>(
    w: &[__m256i; 8],
    a: &[[i8; BLOCK]; T],
    starts: &[i32; T],
    magics: &[f32; T],
) -> [__m256; T] {
    let mut sums = [_mm256_setzero_si256(); T];
    for g in 0..8 {
        for t in 0..T {
            sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(w[g], broadcast(&a[t], g)));
        }
    }
    let one = _mm256_set1_epi16(1);
    let mut out = [_mm256_setzero_ps(); T];
    for t in 0..T {
        let sum = _mm256_add_epi32(
            _mm256_madd_epi16(sums[t], one),
            _mm256_set1_epi32(four(&starts[t])),
        );
        out[t] = _mm256_sub_ps(_mm256_castsi256_ps(sum), _mm256_set1_ps(magics[t]));
    }
    out
}

/// The products of a block of bytes with `T` tokens, scaled by the activations.
#[target_feature(enable = "avx2")]
#[inline]
fn products_q8<const T: usize>(
    w: &[__m256i; 8],
    a: &[[i8; BLOCK]; T],
    _: &[i32; T],
    magics: &[f32; T],
) -> [__m256; T] {
    let flip = _mm256_set1_epi8(i8::MIN);
    let one = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_si256(); T];
    for t in 0..T {
        sums[t] = _mm256_castps_si256(_mm256_set1_ps(magics[t]));
    }
    for g in 0..8 {
        let signed = _mm256_xor_si256(w[g], flip);
        let magnitude = _mm256_abs_epi8(signed);
        for t in 0..T {
            let x = _mm256_sign_epi8(broadcast(&a[t], g), signed);
            let pairs = _mm256_maddubs_epi16(magnitude, x);
            sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, one));
        }
    }
    let mut out = [_mm256_setzero_ps(); T];
    for t in 0..T {
        out[t] = _mm256_sub_ps(_mm256_castsi256_ps(sums[t]), _mm256_set1_ps(magics[t]));
    }
    out
}

/// Everything around the products of one block, for the instructions in `$features`:
/// `$q4` and `$q8` multiply a block of half a panel with some tokens.
macro_rules! packed_256 {
    ($features:literal, $q4:ident, $q8:ident) => {
        use crate::cpu::packed::{GROUP, STREAMS};
        use crate::cpu::prefetch;
        use phidias_quant::activations::{TILE, Tile};
        use phidias_quant::f16;
        use phidias_quant::packed::{LINE, PANEL_ROWS, Panel};

        /// Halves of a panel: a register has eight rows.
        const PARTS: usize = 2;
        /// Rows of half a panel.
        const HALF: usize = PANEL_ROWS / PARTS;
        /// Sums of 16 rows, by halves.
        type Sums = [[f32; HALF]; PARTS];

        /// One block of half a panel, unpacked.
        struct Weights {
            quants: [__m256i; 8],
            scales: __m256,
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn weights<const LINES: usize>(
            lines: &[[u8; LINE]; LINES],
            of_rows: &[f16; PANEL_ROWS],
            half: usize,
        ) -> Weights {
            Weights {
                quants: unpack(lines, half),
                scales: scales(of_rows, half),
            }
        }

        /// The quants of one block of half a panel, four columns of 8 rows a register. `LINES` is 4
        /// for nibbles, 8 for bytes.
        #[target_feature(enable = $features)]
        #[inline]
        fn unpack<const LINES: usize>(lines: &[[u8; LINE]; LINES], half: usize) -> [__m256i; 8] {
            let load = |g: usize| {
                let bytes: &[u8; LINE / 2] = lines[g].as_chunks().0.get(half).expect("two halves");
                // SAFETY: half a line is 32 bytes; the load needs no alignment.
                unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
            };
            if LINES == 8 {
                return std::array::from_fn(load);
            }
            let mask = _mm256_set1_epi8(15);
            let mut w = [_mm256_setzero_si256(); 8];
            for g in 0..4 {
                let bytes = load(g);
                w[g] = _mm256_and_si256(bytes, mask);
                w[g + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
            }
            w
        }

        /// 8 scales as f32.
        #[target_feature(enable = $features)]
        #[inline]
        fn scales(scales: &[f16; PANEL_ROWS], half: usize) -> __m256 {
            let eight: &[f16; HALF] = scales.as_chunks().0.get(half).expect("two halves");
            // SAFETY: 8 scales are 16 bytes; the load needs no alignment.
            _mm256_cvtph_ps(unsafe { _mm_loadu_si128(eight.as_ptr().cast()) })
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn load(sums: &[f32; HALF]) -> __m256 {
            // SAFETY: 8 floats; the load needs no alignment.
            unsafe { _mm256_loadu_ps(sums.as_ptr()) }
        }

        #[target_feature(enable = $features)]
        #[inline]
        fn store(sums: &mut [f32; HALF], v: __m256) {
            // SAFETY: 8 floats; the store needs no alignment.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), v) }
        }

        /// The products of one block in the format of `LINES`.
        #[target_feature(enable = $features)]
        #[inline]
        fn products<const T: usize, const LINES: usize>(
            w: &[__m256i; 8],
            a: &[[i8; BLOCK]; T],
            starts: &[i32; T],
            magics: &[f32; T],
        ) -> [__m256; T] {
            if LINES == 8 {
                $q8(w, a, starts, magics)
            } else {
                $q4(w, a, starts, magics)
            }
        }

        /// One block of half `PART` of a panel with `T` tokens: the products are added to the sums in memory.
        #[target_feature(enable = $features)]
        #[inline]
        fn group<const T: usize, const PART: usize, const LINES: usize>(
            w: &Weights,
            a: &[[i8; BLOCK]; T],
            starts: &[i32; T],
            magics: &[f32; T],
            acc: &mut [Sums; T],
        ) {
            let products = products::<T, LINES>(&w.quants, a, starts, magics);
            for t in 0..T {
                let sums = &mut acc[t][PART];
                store(sums, _mm256_fmadd_ps(products[t], w.scales, load(sums)));
            }
        }

        /// Block `b` of half `PART` of a panel with all tokens of some tiles.
        ///
        /// A function of its own, so that the compiler has all registers for this loop.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn pass<const PART: usize, const LINES: usize>(
            w: &Weights,
            b: usize,
            x: &[Tile<'_>],
            acc: &mut [Sums],
        ) {
            for (x, acc) in x.iter().zip(acc.chunks_mut(TILE)) {
                let at = b * x.rows..(b + 1) * x.rows;
                let (a, a_rest) = x.quants.as_chunks().0[at.clone()].as_chunks::<GROUP>();
                let (starts, starts_rest) = x.starts[at.clone()].as_chunks::<GROUP>();
                let (magics, magics_rest) = x.magics[at].as_chunks::<GROUP>();
                let (acc, acc_rest) = acc.as_chunks_mut::<GROUP>();
                for (((a, starts), magics), acc) in a.iter().zip(starts).zip(magics).zip(acc) {
                    group::<GROUP, PART, LINES>(w, a, starts, magics, acc);
                }
                let rest = (a_rest.iter().zip(starts_rest)).zip(magics_rest.iter().zip(acc_rest));
                for ((a, start), (magic, acc)) in rest {
                    let acc = std::array::from_mut(acc);
                    group::<1, PART, LINES>(w, &[*a], &[*start], &[*magic], acc);
                }
            }
        }

        /// A panel times up to `TOKENS` tokens, which are added up in `acc`.
        #[target_feature(enable = $features)]
        #[inline]
        fn many<const LINES: usize>(panel: Panel<'_>, x: &[Tile<'_>], acc: &mut [Sums]) {
            acc.fill(ZERO);
            let (blocks, scales) = panel.blocks::<LINES>();
            for (b, lines) in blocks.iter().enumerate() {
                prefetch::ahead(lines);
                pass::<0, LINES>(&weights(lines, &scales[b], 0), b, x, acc);
                pass::<1, LINES>(&weights(lines, &scales[b], 1), b, x, acc);
            }
        }

        /// `P` panels at once times `T` tokens with the sums in registers.
        #[target_feature(enable = $features)]
        #[inline]
        fn few<const T: usize, const P: usize, const LINES: usize>(
            panels: [Panel<'_>; P],
            x: Tile<'_>,
            acc: &mut [[Sums; T]; P],
        ) {
            let quants = panels.map(|panel| panel.blocks::<LINES>().0);
            let scales_of = panels.map(|panel| panel.blocks::<LINES>().1);
            let ahead = prefetch::Streams::<P, LINES>::new(&panels[0]);
            // The tile has `T` rows, so its blocks are whole arrays.
            let (a, _) = x.quants.as_chunks::<BLOCK>().0.as_chunks::<T>();
            let (starts, _) = x.starts.as_chunks::<T>();
            let (magics, _) = x.magics.as_chunks::<T>();
            let mut sums = [[[_mm256_setzero_ps(); PARTS]; T]; P];
            for b in 0..quants[0].len() {
                let ahead = ahead.at(b);
                for p in 0..P {
                    let (lines, of_rows) = (&quants[p][b], &scales_of[p][b]);
                    ahead.of_quants(lines);
                    ahead.of_scales(of_rows);
                    for half in 0..PARTS {
                        let w = weights(lines, of_rows, half);
                        let products =
                            products::<T, LINES>(&w.quants, &a[b], &starts[b], &magics[b]);
                        for t in 0..T {
                            let sum = &mut sums[p][t][half];
                            *sum = _mm256_fmadd_ps(products[t], w.scales, *sum);
                        }
                    }
                }
            }
            for p in 0..P {
                for t in 0..T {
                    for half in 0..PARTS {
                        store(&mut acc[p][t][half], sums[p][t][half]);
                    }
                }
            }
        }

        crate::cpu::packed::packed_gemm!($features);
    };
}
pub(in crate::cpu) use packed_256;

packed_256!("avx2,fma,f16c", products_q4, products_q8);
