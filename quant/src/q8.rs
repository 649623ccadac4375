//! `q8`: 32 weights, one f16 scale, one byte a weight with the zero point at 128.
//!
//! Value: `(u - 128) * scale`, `u` in 1..=255. Unsigned bytes are what the multiply of AVX-512
//! VNNI wants as its first operand; the 128 is taken out once a block, since
//! `sum (u - 128) a = sum u a - 128 sum a`.

use crate::{BLOCK, round};
use half::f16;

/// The byte that stands for zero.
pub const ZERO: i32 = 128;

/// One block as it is quantized, before packing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockQ8 {
    /// Step between neighbouring values.
    pub scale: f16,
    /// `u` of each weight, in column order.
    pub quants: [u8; BLOCK],
}

const _: () = assert!(size_of::<BlockQ8>() == 2 + BLOCK);

/// Rounds each weight to the nearest of 255 levels; the largest magnitude maps to the end.
///
/// `None` when a weight is not finite or the scale does not fit an f16 (magnitudes over 8.3e6).
#[must_use]
pub fn quantize(x: &[f32; BLOCK]) -> Option<BlockQ8> {
    let amax = x.iter().fold(0.0f32, |m, v| {
        if v.abs() > m || v.is_nan() {
            v.abs()
        } else {
            m
        }
    });
    // Rounded upwards to the next f16, so that the largest weight is not clipped by the rounding.
    let scale = f16_at_least(amax / 127.0)?;
    let step = scale.to_f32();
    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
    let mut quants = [0; BLOCK];
    for (q, &v) in quants.iter_mut().zip(x) {
        *q = (round(v * inverse).clamp(-127.0, 127.0) + ZERO as f32) as u8;
    }
    Some(BlockQ8 { scale, quants })
}

/// The weights a block stands for.
#[must_use]
pub fn dequantize(block: &BlockQ8) -> [f32; BLOCK] {
    let step = block.scale.to_f32();
    block.quants.map(|u| (i32::from(u) - ZERO) as f32 * step)
}

/// The smallest finite f16 that is not below `v >= 0`.
fn f16_at_least(v: f32) -> Option<f16> {
    if !v.is_finite() {
        return None;
    }
    let near = f16::from_f32(v);
    let up = if near.to_f32() < v {
        f16::from_bits(near.to_bits() + 1)
    } else {
        near
    };
    up.is_finite().then_some(up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip_is_within_half_a_step(x in prop::array::uniform32(-1000.0f32..1000.0)) {
            let block = quantize(&x).unwrap();
            let half_step = block.scale.to_f32() / 2.0;
            for (a, b) in x.iter().zip(dequantize(&block)) {
                // Two roundings in f32: of v/step and of q*step.
                prop_assert!((a - b).abs() <= half_step * (1.0 + 1e-4), "{a} {b} {half_step}");
            }
        }
    }

    #[test]
    fn zeros_extremes_and_bad_values() {
        let zero = quantize(&[0.0; BLOCK]).unwrap();
        assert_eq!(dequantize(&zero), [0.0; BLOCK]);
        let mut x = [0.0; BLOCK];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            x[7] = bad;
            assert_eq!(quantize(&x), None, "{bad}");
        }
        // The smallest subnormals vanish or survive, never blow up.
        x = [1e-30; BLOCK];
        assert!(
            dequantize(&quantize(&x).unwrap())
                .iter()
                .all(|v| v.abs() < 1e-6)
        );
    }
}
