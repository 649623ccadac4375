//! AVX-VNNI: what AVX2 has, with `vpdpbusd` for the packed GEMM. Desktops and laptops since Alder Lake
//! (2021), and Zen 5.
//!
//! The same source is compiled for the 256-bit form of AVX-512 VNNI, which differs in the encoding
//! only: the AVX-512 table takes it for a few tokens, and the tests run it as a table of its own where a
//! CPU has it and not the other.

macro_rules! vnni {
    ($name:ident, $features:literal, $dot:ident) => {
        pub(in crate::cpu) mod $name {
            use crate::cpu::avx2::packed::four;
            use phidias_quant::BLOCK;
            use std::arch::x86_64::*;

            /// The products of a block with `T` tokens, scaled by the activations.
            #[target_feature(enable = $features)]
            #[inline]
            fn dots<const T: usize>(
                w: &[__m256i; 8],
                a: &[[i8; BLOCK]; T],
                starts: &[i32; T],
                magics: &[f32; T],
            ) -> [__m256; T] {
                let mut sums = [_mm256_setzero_si256(); T];
                for t in 0..T {
                    sums[t] = _mm256_set1_epi32(four(&starts[t]));
                }
                for g in 0..8 {
                    for t in 0..T {
                        let (fours, _) = a[t].as_chunks::<4>();
                        let four = four(&fours[g]);
                        sums[t] = $dot(sums[t], w[g], _mm256_set1_epi32(four));
                    }
                }
                let mut out = [_mm256_setzero_ps(); T];
                for t in 0..T {
                    let magic = _mm256_set1_ps(magics[t]);
                    out[t] = _mm256_sub_ps(_mm256_castsi256_ps(sums[t]), magic);
                }
                out
            }

            crate::cpu::avx2::packed::packed_256!($features, dots, dots);
        }
    };
}

vnni!(avx_vnni, "avx2,fma,f16c,avxvnni", _mm256_dpbusd_avx_epi32);
vnni!(
    avx512_vnni,
    "avx2,fma,f16c,avx512vnni,avx512vl",
    _mm256_dpbusd_epi32
);
