//! AVX-VNNI: what AVX2 has, with `vpdpbusd` for the packed GEMM. Desktops and laptops since Alder Lake
//! (2021), and Zen 5.
//!
//! The same source is compiled for the 256-bit form of AVX-512 VNNI, which differs in the encoding
//! only. The AVX-512 table multiplies bytes with one token so, and the tests run it as a table of its own
//! where a CPU has that and not the other.

macro_rules! vnni {
    ($(#[$attribute:meta])* $name:ident, $features:literal, $dot:ident, $encoding:literal) => {
        $(#[$attribute])*
        pub(in crate::cpu) mod $name {
            use crate::cpu::avx2::packed::{
                HALF, PARTS, Sums, activations_of, add_products, bytes_of, four, four_tokens, half_line, nibbles, nibbles_of,
            };
            use phidias_quant::BLOCK;
            use phidias_quant::packed::LINE;
            use std::arch::x86_64::*;

            #[target_feature(enable = $features)]
            #[inline]
            fn start<const T: usize>(starts: &[i32; T]) -> Sums<T> {
                let mut sums = [[_mm256_setzero_si256(); PARTS]; T];
                for t in 0..T {
                    sums[t] = [_mm256_set1_epi32(four(&starts[t])); PARTS];
                }
                sums
            }

            /// Adds the products of group `g`, a register for each half of the panel.
            #[target_feature(enable = $features)]
            #[inline]
            fn add<const T: usize>(
                sums: &mut Sums<T>,
                w: [__m256i; PARTS],
                a: &[[i8; BLOCK]; T],
                g: usize,
            ) {
                for t in 0..T {
                    let (fours, _) = a[t].as_chunks::<4>();
                    let x = _mm256_set1_epi32(four(&fours[g]));
                    for half in 0..PARTS {
                        sums[t][half] = $dot(sums[t][half], w[half], x);
                    }
                }
            }

            /// The products of both halves of a panel with a token.
            macro_rules! product {
                ($token:literal, $at:literal, $s0:literal, $s1:literal, $w0:literal, $w1:literal) => {
                    concat!(
                        activations_of!($token, $at),
                        $encoding, " vpdpbusd ", $s0, ", ", $w0, ", {x}\n",
                        $encoding, " vpdpbusd ", $s1, ", ", $w1, ", {x}\n",
                    )
                };
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn four_q4(sums: &mut Sums<4>, lines: &[[u8; LINE]; 4], a: &[[i8; BLOCK]; 4]) {
                add_products!(
                    (sums, lines, a),
                    nibbles_of!(product),
                    in: mask = _mm256_set1_epi8(15); out: x, w0, w1, h0, h1
                );
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn four_q8(sums: &mut Sums<4>, lines: &[[u8; LINE]; 8], a: &[[i8; BLOCK]; 4]) {
                macro_rules! line {
                    ($line:literal, $at:literal) => {
                        concat!(
                            "vmovdqu {w0}, [{lines} + ", $line, "]\n",
                            "vmovdqu {w1}, [{lines} + ", $line, " + 32]\n",
                            four_tokens!(product, $at, "{w0}", "{w1}"),
                        )
                    };
                }
                add_products!(
                    (sums, lines, a),
                    bytes_of!(line),
                    in: ; out: x, w0, w1
                );
            }

            /// The sums as products scaled by the activations.
            #[target_feature(enable = $features)]
            #[inline]
            fn scaled<const T: usize>(sums: &Sums<T>, magics: &[f32; T]) -> [[__m256; PARTS]; T] {
                let mut out = [[_mm256_setzero_ps(); PARTS]; T];
                for t in 0..T {
                    let magic = _mm256_set1_ps(magics[t]);
                    for half in 0..PARTS {
                        out[t][half] = _mm256_sub_ps(_mm256_castsi256_ps(sums[t][half]), magic);
                    }
                }
                out
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn products_q4<const T: usize>(
                lines: &[[u8; LINE]; 4],
                a: &[[i8; BLOCK]; T],
                starts: &[i32; T],
                magics: &[f32; T],
            ) -> [[__m256; PARTS]; T] {
                let mut sums = start(starts);
                if let (Ok(sums), Ok(a)) = ((&mut sums[..]).try_into(), a[..].try_into()) {
                    four_q4(sums, lines, a);
                } else {
                    for (g, line) in lines.iter().enumerate() {
                        let [first, second] = [nibbles(line, 0), nibbles(line, 1)];
                        add(&mut sums, [first[0], second[0]], a, g);
                        add(&mut sums, [first[1], second[1]], a, g + 4);
                    }
                }
                scaled(&sums, magics)
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn products_q8<const T: usize>(
                lines: &[[u8; LINE]; 8],
                a: &[[i8; BLOCK]; T],
                starts: &[i32; T],
                magics: &[f32; T],
            ) -> [[__m256; PARTS]; T] {
                let mut sums = start(starts);
                if let (Ok(sums), Ok(a)) = ((&mut sums[..]).try_into(), a[..].try_into()) {
                    four_q8(sums, lines, a);
                } else {
                    for (g, line) in lines.iter().enumerate() {
                        add(&mut sums, [half_line(line, 0), half_line(line, 1)], a, g);
                    }
                }
                scaled(&sums, magics)
            }

            crate::cpu::avx2::packed::packed_256!($features, products_q4, products_q8);
        }
    };
}

vnni!(
    avx_vnni,
    "avx2,fma,f16c,avxvnni",
    _mm256_dpbusd_avx_epi32,
    "{{vex}}"
);
vnni!(
    #[cfg_attr(
        not(test),
        allow(dead_code, reason = "all of it is a table in the tests only")
    )]
    avx512_vnni,
    "avx2,fma,f16c,avx512vnni,avx512vl",
    _mm256_dpbusd_epi32,
    "{{evex}}"
);
