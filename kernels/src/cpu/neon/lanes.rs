//! Sixteen floats in four registers. Safety: see [`crate::cpu::vector`].

use crate::cpu::vector::{LANES, Lanes, Sums};
use phidias_quant::{bf16, f16};
use std::arch::aarch64::*;
use std::arch::asm;

/// Lanes 0-3, 4-7, 8-11 and 12-15.
#[derive(Clone, Copy)]
pub(super) struct Quad([float32x4_t; 4]);

/// An expression of NEON intrinsics, each load and store inside an array of sixteen.
macro_rules! neon {
    ($e:expr) => {
        // SAFETY: the contract of `crate::cpu::vector`: the features are there; what is read and
        // written lies inside the array that the reference is of, and needs no alignment.
        unsafe { $e }
    };
}

impl Quad {
    #[inline(always)]
    fn map(self, f: impl Fn(float32x4_t) -> float32x4_t) -> Self {
        Self(self.0.map(f))
    }
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
    #[inline(always)]
    fn zip3(
        self,
        b: Self,
        c: Self,
        f: impl Fn(float32x4_t, float32x4_t, float32x4_t) -> float32x4_t,
    ) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i], c.0[i])))
    }
}

/// Eight halves as floats, exactly.
///
/// The instructions are part of every AArch64; their intrinsics are younger than the compilers that
/// this project builds with.
#[inline(always)]
pub(super) fn widen(halves: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: NEON is there; registers in, registers out.
    unsafe {
        asm!("fcvtl {low:v}.4s, {halves:v}.4h", low = lateout(vreg) low, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {high:v}.4s, {halves:v}.8h", high = lateout(vreg) high, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    [low, high]
}

/// 2^n of each lane, `n` integral and that of a normal number.
#[inline(always)]
fn power(n: float32x4_t) -> float32x4_t {
    neon!(vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(
        vcvtq_s32_f32(n),
        vdupq_n_s32(127)
    ))))
}

impl Lanes for Quad {
    #[inline(always)]
    fn splat(v: f32) -> Self {
        Self(neon!([vdupq_n_f32(v); 4]))
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(std::array::from_fn(|i| {
            neon!(vld1q_f32(from.as_ptr().add(4 * i)))
        }))
    }
    #[inline(always)]
    fn load_f16(from: &[f16; LANES]) -> Self {
        let from = from.as_ptr().cast();
        let [a, b] = widen(neon!(vld1q_u16(from)));
        let [c, d] = widen(neon!(vld1q_u16(from.add(LANES / 2))));
        Self([a, b, c, d])
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        Self(std::array::from_fn(|i| {
            neon!({
                let four = vld1_u16(from.as_ptr().add(4 * i).cast());
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(four)))
            })
        }))
    }
    #[inline(always)]
    fn load_pairs(from: &[[f32; 2]; LANES]) -> [Self; 2] {
        let from = from.as_flattened();
        let fours = |i: usize| neon!(vld2q_f32(from.as_ptr().add(8 * i)));
        let (a, b, c, d) = (fours(0), fours(1), fours(2), fours(3));
        [Self([a.0, b.0, c.0, d.0]), Self([a.1, b.1, c.1, d.1])]
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        for i in 0..4 {
            neon!(vst1q_f32(to.as_mut_ptr().add(4 * i), self.0[i]));
        }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| neon!(vaddq_f32(a, b)))
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| neon!(vsubq_f32(a, b)))
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| neon!(vmulq_f32(a, b)))
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| neon!(vdivq_f32(a, b)))
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self.zip3(b, c, |a, b, c| neon!(vfmaq_f32(c, a, b)))
    }
    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        self.zip3(b, c, |a, b, c| neon!(vfmsq_f32(c, a, b)))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // A NaN on either side comes out.
        self.zip(b, |a, b| neon!(vmaxq_f32(a, b)))
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |a, b| neon!(vminq_f32(a, b)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        self.map(|a| neon!(vabsq_f32(a)))
    }
    #[inline(always)]
    fn infinite_or(self, other: Self) -> Self {
        let infinity = neon!(vdupq_n_f32(f32::INFINITY));
        self.zip(other, |a, other| {
            neon!(vbslq_f32(vceqq_f32(vabsq_f32(a), infinity), a, other))
        })
    }
    #[inline(always)]
    fn scale_by_power(self, n: Self) -> Self {
        // In two steps, since 2^n alone may be too large or too small; the first is exact but for a
        // result that is subnormal anyway.
        let first = n.map(|n| neon!(vrndmq_f32(vmulq_n_f32(n, 0.5))));
        let second = n.sub(first);
        self.mul(first.map(power)).mul(second.map(power))
    }
    #[inline(always)]
    fn scale_down(self, n: Self) -> Self {
        self.zip(n, |x, n| {
            neon!({
                // Not less, so that a NaN counts.
                let counts = vmvnq_u32(vcltq_f32(n, vdupq_n_f32(-125.0)));
                let scaled = vreinterpretq_u32_f32(vmulq_f32(x, power(n)));
                vreinterpretq_f32_u32(vandq_u32(scaled, counts))
            })
        })
    }
    #[inline(always)]
    fn keep(self, from: usize, to: usize, other: Self) -> Self {
        const LANE: [u32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        Self(std::array::from_fn(|i| {
            neon!({
                let lane = vld1q_u32(LANE.as_ptr().add(4 * i));
                let kept = vandq_u32(
                    vcgeq_u32(lane, vdupq_n_u32(from as u32)),
                    vcltq_u32(lane, vdupq_n_u32(to as u32)),
                );
                vbslq_f32(kept, self.0[i], other.0[i])
            })
        }))
    }
    #[inline(always)]
    fn store_i8(self, to: &mut [i8; LANES]) {
        neon!({
            // The low half of each integer, then the low half of those.
            let [a, b, c, d] = self.0.map(|v| vreinterpretq_s16_s32(vcvtq_s32_f32(v)));
            let (low, high) = (vuzp1q_s16(a, b), vuzp1q_s16(c, d));
            let bytes = vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
            vst1q_s8(to.as_mut_ptr(), bytes);
        });
    }
    #[inline(always)]
    fn store_i16(self, to: &mut [i16; LANES]) {
        for (i, v) in self.0.into_iter().enumerate() {
            neon!(vst1_s16(
                to.as_mut_ptr().add(4 * i),
                vmovn_s32(vcvtnq_s32_f32(v))
            ));
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        neon!({
            let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vpadds_f32(two)
        })
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        let [a, b, c, d] = self.0;
        neon!(vmaxvq_f32(vmaxq_f32(vmaxq_f32(a, b), vmaxq_f32(c, d))))
    }
}

/// Sums 0-3, 4-7, 8-11 and 12-15.
#[derive(Clone, Copy)]
pub(super) struct QuadSums([int32x4_t; 4]);

impl Sums for QuadSums {
    type Floats = Quad;
    /// The first of each pair, then the second: 0-7 and 8-15.
    type Pairs = [[int16x8_t; 2]; 2];
    /// In the first two lanes.
    type Pair = int16x4_t;

    #[inline(always)]
    fn zero() -> Self {
        Self(neon!([vdupq_n_s32(0); 4]))
    }
    #[inline(always)]
    fn load(from: &[[i8; 2]; LANES]) -> Self::Pairs {
        neon!({
            let bytes = vld2q_s8(from.as_ptr().cast());
            [
                [vmovl_s8(vget_low_s8(bytes.0)), vmovl_high_s8(bytes.0)],
                [vmovl_s8(vget_low_s8(bytes.1)), vmovl_high_s8(bytes.1)],
            ]
        })
    }
    #[inline(always)]
    fn splat(pair: &[i16; 2]) -> Self::Pair {
        let pair = std::ptr::from_ref(pair).cast::<i32>();
        neon!(vreinterpret_s16_s32(vdup_n_s32(pair.read_unaligned())))
    }
    #[inline(always)]
    fn add_products(self, [a, b]: Self::Pairs, pair: Self::Pair) -> Self {
        let mut sums = self.0;
        neon!({
            for i in 0..2 {
                let (low, high) = (sums[2 * i], sums[2 * i + 1]);
                let low = vmlal_lane_s16::<0>(low, vget_low_s16(a[i]), pair);
                let high = vmlal_high_lane_s16::<0>(high, a[i], pair);
                sums[2 * i] = vmlal_lane_s16::<1>(low, vget_low_s16(b[i]), pair);
                sums[2 * i + 1] = vmlal_high_lane_s16::<1>(high, b[i], pair);
            }
        });
        Self(sums)
    }
    #[inline(always)]
    fn floats(self) -> Quad {
        let [a, b, c, d] = self.0;
        neon!(Quad([
            vcvtq_f32_s32(a),
            vcvtq_f32_s32(b),
            vcvtq_f32_s32(c),
            vcvtq_f32_s32(d)
        ]))
    }
}
