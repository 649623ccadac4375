//! Sixteen floats in two registers. Safety: see [`crate::cpu::vector`].

use super::packed::four;
use crate::cpu::vector::{LANES, Lanes, Sums};
use phidias_quant::{bf16, f16};
use std::arch::x86_64::*;

/// Lanes 0-7 and 8-15.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Ymm2([__m256; 2]);

/// Lanes of a register.
const HALF: usize = LANES / 2;

/// An expression of AVX2, FMA and F16C intrinsics, each load and store inside an array of sixteen.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: the contract of `crate::cpu::vector`: the features are there; what is read and
        // written lies inside the array that the reference is of, and needs no alignment.
        unsafe { $e }
    };
}

impl Ymm2 {
    #[inline(always)]
    fn map(self, f: impl Fn(__m256) -> __m256) -> Self {
        Self([f(self.0[0]), f(self.0[1])])
    }
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(__m256, __m256) -> __m256) -> Self {
        Self([f(self.0[0], b.0[0]), f(self.0[1], b.0[1])])
    }
    #[inline(always)]
    fn zip3(self, b: Self, c: Self, f: impl Fn(__m256, __m256, __m256) -> __m256) -> Self {
        Self([f(self.0[0], b.0[0], c.0[0]), f(self.0[1], b.0[1], c.0[1])])
    }
}

/// 2^n of each lane, `n` integral and that of a normal number.
#[inline(always)]
fn power(n: __m256) -> __m256 {
    avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(
        _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127))
    )))
}

/// The first and the second of each of eight pairs.
#[inline(always)]
fn apart(pairs: &[f32; LANES]) -> [__m256; 2] {
    avx2!({
        let low = _mm256_loadu_ps(pairs.as_ptr());
        let high = _mm256_loadu_ps(pairs.as_ptr().add(LANES / 2));
        // Shuffles work within half a register: these leave lanes 0-1, 4-5, 2-3, 6-7.
        let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(low, high));
        let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(low, high));
        [
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(even)),
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(odd)),
        ]
    })
}

/// The sum of eight lanes: 8 -> 4 -> 2 -> 1, lane `l` plus lane `l + half` each time.
#[inline(always)]
pub(in crate::cpu) fn fold(eight: __m256) -> f32 {
    avx2!({
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    })
}

impl Lanes for Ymm2 {
    #[inline(always)]
    fn splat(v: f32) -> Self {
        Self(avx2!([_mm256_set1_ps(v); 2]))
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(avx2!([
            _mm256_loadu_ps(from.as_ptr()),
            _mm256_loadu_ps(from.as_ptr().add(HALF)),
        ]))
    }
    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        let (low, high) = (from.as_ptr().cast(), from[HALF..].as_ptr().cast());
        Self(avx2!([
            _mm256_cvtph_ps(_mm_loadu_si128(low)),
            _mm256_cvtph_ps(_mm_loadu_si128(high)),
        ]))
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        let (low, high) = (from.as_ptr().cast(), from[HALF..].as_ptr().cast());
        avx2!({
            let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(low)));
            let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(high)));
            Self([_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)])
        })
    }
    #[inline(always)]
    fn load_pairs(from: &[[f32; 2]; LANES]) -> [Self; 2] {
        let (halves, _) = from.as_flattened().as_chunks();
        let (a, b) = (apart(&halves[0]), apart(&halves[1]));
        [Self([a[0], b[0]]), Self([a[1], b[1]])]
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        avx2!({
            _mm256_storeu_ps(to.as_mut_ptr(), self.0[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(LANES / 2), self.0[1]);
        });
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| avx2!(_mm256_add_ps(a, b)))
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| avx2!(_mm256_sub_ps(a, b)))
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| avx2!(_mm256_mul_ps(a, b)))
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| avx2!(_mm256_div_ps(a, b)))
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self.zip3(b, c, |a, b, c| avx2!(_mm256_fmadd_ps(a, b, c)))
    }
    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        self.zip3(b, c, |a, b, c| avx2!(_mm256_fnmadd_ps(a, b, c)))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // The instruction gives its second operand where either is a NaN.
        self.zip(b, |a, b| avx2!(_mm256_max_ps(b, a)))
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |a, b| avx2!(_mm256_min_ps(b, a)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        self.map(|a| avx2!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a)))
    }
    #[inline(always)]
    fn infinite_or(self, other: Self) -> Self {
        let infinity = avx2!(_mm256_set1_ps(f32::INFINITY));
        self.zip3(self.abs(), other, |a, size, other| {
            avx2!({
                let infinite = _mm256_cmp_ps::<_CMP_EQ_OQ>(size, infinity);
                _mm256_blendv_ps(other, a, infinite)
            })
        })
    }
    #[inline(always)]
    fn scale_by_power(self, n: Self) -> Self {
        // In two steps, since 2^n alone may be too large or too small; the first is exact but for a
        // result that is subnormal anyway.
        let half = n.mul(Self::splat(0.5));
        let first = half.map(|n| avx2!(_mm256_floor_ps(n)));
        let second = n.sub(first);
        let powers = |n: Self| Self([power(n.0[0]), power(n.0[1])]);
        self.mul(powers(first)).mul(powers(second))
    }
    #[inline(always)]
    fn scale_down(self, n: Self) -> Self {
        self.zip(n, |x, n| {
            avx2!({
                let counts = _mm256_cmp_ps::<_CMP_NLT_UQ>(n, _mm256_set1_ps(-125.0));
                _mm256_and_ps(_mm256_mul_ps(x, power(n)), counts)
            })
        })
    }
    #[inline(always)]
    fn keep(self, from: usize, to: usize, other: Self) -> Self {
        // Compared in registers: a mask that goes through memory is read before it is written.
        let (before, end) = (from as i32 - 1, to as i32);
        avx2!({
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let kept = |lanes| {
                _mm256_castsi256_ps(_mm256_and_si256(
                    _mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(before)),
                    _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lanes),
                ))
            };
            let upper = _mm256_add_epi32(lanes, _mm256_set1_epi32(HALF as i32));
            Self([
                _mm256_blendv_ps(other.0[0], self.0[0], kept(lanes)),
                _mm256_blendv_ps(other.0[1], self.0[1], kept(upper)),
            ])
        })
    }
    #[inline(always)]
    fn store_i8(self, to: &mut [i8; LANES]) {
        avx2!({
            let words =
                _mm256_packs_epi32(_mm256_cvtps_epi32(self.0[0]), _mm256_cvtps_epi32(self.0[1]));
            // 0-3, 8-11, 4-7, 12-15 as 64-bit words.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        });
    }
    #[inline(always)]
    fn store_i16(self, to: &mut [i16; LANES]) {
        avx2!({
            let words =
                _mm256_packs_epi32(_mm256_cvtps_epi32(self.0[0]), _mm256_cvtps_epi32(self.0[1]));
            // 0-3, 8-11, 4-7, 12-15 as 64-bit words.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), words);
        });
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        fold(avx2!(_mm256_add_ps(self.0[0], self.0[1])))
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        avx2!({
            let eight = _mm256_max_ps(self.0[0], self.0[1]);
            let four = _mm_max_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
}

/// Sums 0-7 and 8-15.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Ymm2Sums([__m256i; 2]);

impl Sums for Ymm2Sums {
    type Floats = Ymm2;
    type Pairs = [__m256i; 2];
    type Pair = __m256i;

    #[inline(always)]
    fn zero() -> Self {
        Self(avx2!([_mm256_setzero_si256(); 2]))
    }
    #[inline(always)]
    fn load(from: &[[i8; 2]; LANES]) -> Self::Pairs {
        let (low, high) = (from.as_ptr().cast(), from[HALF..].as_ptr().cast());
        avx2!([
            _mm256_cvtepi8_epi16(_mm_loadu_si128(low)),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(high)),
        ])
    }
    #[inline(always)]
    fn splat(pair: &[i16; 2]) -> Self::Pair {
        avx2!(_mm256_set1_epi32(four(pair)))
    }
    #[inline(always)]
    fn add_products(self, a: Self::Pairs, b: Self::Pair) -> Self {
        Self(avx2!([
            _mm256_add_epi32(self.0[0], _mm256_madd_epi16(a[0], b)),
            _mm256_add_epi32(self.0[1], _mm256_madd_epi16(a[1], b)),
        ]))
    }
    #[inline(always)]
    fn floats(self) -> Ymm2 {
        Ymm2(avx2!([
            _mm256_cvtepi32_ps(self.0[0]),
            _mm256_cvtepi32_ps(self.0[1]),
        ]))
    }
}
