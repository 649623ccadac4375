//! Sixteen floats in one register. Safety: see [`crate::cpu::vector`].

use crate::cpu::avx2::fold;
use crate::cpu::avx2::packed::four;
use crate::cpu::vector::{LANES, Lanes, Sums};
use phidias_quant::{bf16, f16};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Zmm(pub(in crate::cpu) __m512);

/// An expression of AVX-512 F intrinsics, for sums also BW and VNNI, each load and store inside an array of sixteen.
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: the contract of `crate::cpu::vector`: the features are there; what is read and
        // written lies inside the array that the reference is of, and needs no alignment.
        unsafe { $e }
    };
}

impl Lanes for Zmm {
    #[inline(always)]
    fn splat(v: f32) -> Self {
        Self(avx512!(_mm512_set1_ps(v)))
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(avx512!(_mm512_loadu_ps(from.as_ptr())))
    }
    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        Self(avx512!(_mm512_cvtph_ps(_mm256_loadu_si256(
            from.as_ptr().cast()
        ))))
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        Self(avx512!({
            let upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))
        }))
    }
    #[inline(always)]
    fn load_pairs(from: &[[f32; 2]; LANES]) -> [Self; 2] {
        let from = from.as_flattened();
        avx512!({
            let low = _mm512_loadu_ps(from.as_ptr());
            let high = _mm512_loadu_ps(from.as_ptr().add(LANES));
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            [
                Self(_mm512_permutex2var_ps(low, even, high)),
                Self(_mm512_permutex2var_ps(low, odd, high)),
            ]
        })
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        avx512!(_mm512_storeu_ps(to.as_mut_ptr(), self.0));
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Self(avx512!(_mm512_add_ps(self.0, b.0)))
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        Self(avx512!(_mm512_sub_ps(self.0, b.0)))
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Self(avx512!(_mm512_mul_ps(self.0, b.0)))
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Self(avx512!(_mm512_div_ps(self.0, b.0)))
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(avx512!(_mm512_fmadd_ps(self.0, b.0, c.0)))
    }
    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        Self(avx512!(_mm512_fnmadd_ps(self.0, b.0, c.0)))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // The instruction gives its second operand where either is a NaN.
        Self(avx512!(_mm512_max_ps(b.0, self.0)))
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Self(avx512!(_mm512_min_ps(b.0, self.0)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self(avx512!(_mm512_abs_ps(self.0)))
    }
    #[inline(always)]
    fn infinite_or(self, other: Self) -> Self {
        Self(avx512!({
            let infinity = _mm512_set1_ps(f32::INFINITY);
            let infinite = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(_mm512_abs_ps(self.0), infinity);
            _mm512_mask_blend_ps(infinite, other.0, self.0)
        }))
    }
    #[inline(always)]
    fn scale_by_power(self, n: Self) -> Self {
        Self(avx512!(_mm512_scalef_ps(self.0, n.0)))
    }
    #[inline(always)]
    fn scale_down(self, n: Self) -> Self {
        Self(avx512!({
            let counts = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(n.0, _mm512_set1_ps(-125.0));
            _mm512_maskz_scalef_ps(counts, self.0, n.0)
        }))
    }
    #[inline(always)]
    fn keep(self, from: usize, to: usize, other: Self) -> Self {
        let mask = ((1u32 << to) - (1u32 << from)) as u16;
        Self(avx512!(_mm512_mask_blend_ps(mask, other.0, self.0)))
    }
    #[inline(always)]
    fn store_i8(self, to: &mut [i8; LANES]) {
        avx512!({
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        });
    }
    #[inline(always)]
    fn store_i16(self, to: &mut [i16; LANES]) {
        avx512!({
            let words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self.0));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), words);
        });
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let high = avx512!(_mm512_castps_si512(self.0));
        fold(avx512!({
            let high = _mm512_castsi512_ps(_mm512_shuffle_i64x2::<0b11_10>(high, high));
            _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_castps512_ps256(high))
        }))
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        avx512!(_mm512_reduce_max_ps(self.0))
    }
}

#[derive(Clone, Copy)]
pub(super) struct ZmmSums(__m512i);

impl Sums for ZmmSums {
    type Floats = Zmm;
    type Pairs = __m512i;
    type Pair = __m512i;

    #[inline(always)]
    fn zero() -> Self {
        Self(avx512!(_mm512_setzero_si512()))
    }
    #[inline(always)]
    fn load(from: &[[i8; 2]; LANES]) -> Self::Pairs {
        avx512!(_mm512_cvtepi8_epi16(_mm256_loadu_si256(
            from.as_ptr().cast()
        )))
    }
    #[inline(always)]
    fn splat(pair: &[i16; 2]) -> Self::Pair {
        avx512!(_mm512_set1_epi32(four(pair)))
    }
    #[inline(always)]
    fn add_products(self, a: Self::Pairs, b: Self::Pair) -> Self {
        Self(avx512!(_mm512_dpwssd_epi32(self.0, a, b)))
    }
    #[inline(always)]
    fn floats(self) -> Zmm {
        Zmm(avx512!(_mm512_cvtepi32_ps(self.0)))
    }
}
