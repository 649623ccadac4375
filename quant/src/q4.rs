//! `q4`: 32 weights, one f16 scale, four bits a weight with the zero point at 8.
//!
//! Value: `(nibble - 8) * scale`. The scale may be negative: sixteen levels around zero are seven
//! on one side and eight on the other, and the sign puts the eighth where the largest weight is.
//!
//! The scale minimises the squared error. For fixed nibbles `q` the best scale is the projection
//! `d = <x, q> / <q, q>`, and it leaves the error `|x|^2 - <x, q>^2 / <q, q>`; so it is enough to
//! try the roundings that a small range of scales gives and keep the largest `<x, q>^2 / <q, q>`.

use crate::BLOCK;
use half::f16;
use wide::f32x8;

/// The nibble that stands for zero.
pub const ZERO: i32 = 8;

/// One block as it is quantized, before packing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockQ4 {
    /// Step between neighbouring values; negative when the eighth level serves the positive side.
    pub scale: f16,
    /// Byte `j` holds column `j` in its low nibble and column `j + 16` in its high one.
    pub nibbles: [u8; BLOCK / 2],
}

const _: () = assert!(size_of::<BlockQ4>() == 18);

/// Scales tried: the largest magnitude is put at level `LEVELS` of the side with eight levels.
/// Below 8 it is clipped, which pays when it is an outlier; above 8 the step is finer than needed.
const LEVELS: [f32; 16] = [
    6.4, 6.65, 6.9, 7.1, 7.25, 7.4, 7.55, 7.7, 7.85, 8.0, 8.15, 8.3, 8.5, 8.7, 9.0, 9.4,
];

/// Quantizes with the scale of least squared error among the tried ones.
///
/// `None` when a weight is not finite or the scale does not fit an f16.
#[must_use]
pub fn quantize(x: &[f32; BLOCK]) -> Option<BlockQ4> {
    let mut amax = 0.0f32;
    for v in x {
        if !v.is_finite() {
            return None;
        }
        amax = amax.max(v.abs());
    }
    let mut best = (0.0f32, 0.0f32); // (error removed, scale)
    if amax > 0.0 && amax < f32::MAX / 16.0 {
        // Unit magnitude keeps the sums clear of overflow and of subnormals.
        let unit = eights(&x.map(|v| v / amax));
        for level in LEVELS {
            for inverse in [level, -level] {
                let (xq, qq) = products(&unit, inverse);
                if qq > 0.0 && xq * xq > best.0 * qq {
                    best = (xq * xq / qq, xq / qq * amax);
                }
            }
        }
    }
    let scale = f16::from_f32(best.1);
    if !scale.is_finite() || (amax >= f32::MAX / 16.0) {
        return None;
    }
    let step = scale.to_f32();
    let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
    let levels = eights(x).map(|v| level(v * inverse).to_array());
    let nibble = |i: usize| (levels[i / 8][i % 8] + ZERO as f32) as u8;
    let nibbles = std::array::from_fn(|j| nibble(j) | nibble(j + BLOCK / 2) << 4);
    Some(BlockQ4 { scale, nibbles })
}

fn eights(x: &[f32; BLOCK]) -> [f32x8; BLOCK / 8] {
    let (eights, _) = x.as_chunks::<8>();
    std::array::from_fn(|i| f32x8::new(eights[i]))
}

/// The level of each weight in units of the scale.
///
/// Rounding as [`crate::round`]; minimum and maximum may lose NaN, which cannot come here.
#[inline(always)]
fn level(v: f32x8) -> f32x8 {
    let magic = f32x8::splat(12_582_912.0);
    let rounded = (v + magic) - magic;
    rounded
        .fast_max(f32x8::splat(-8.0))
        .fast_min(f32x8::splat(7.0))
}

/// `<x, q>` and `<q, q>` of the levels that `inverse`, one over the scale, gives.
#[inline(always)]
fn products(x: &[f32x8; BLOCK / 8], inverse: f32) -> (f32, f32) {
    let (mut xq, mut qq) = (f32x8::ZERO, f32x8::ZERO);
    for &x in x {
        let q = level(x * inverse);
        xq += x * q;
        qq += q * q;
    }
    // Lane by lane: every machine writes the same file.
    (xq.to_array().iter().sum(), qq.to_array().iter().sum())
}

/// The weights a block stands for.
#[must_use]
pub fn dequantize(block: &BlockQ4) -> [f32; BLOCK] {
    let step = block.scale.to_f32();
    std::array::from_fn(|i| {
        let byte = block.nibbles[i % (BLOCK / 2)];
        let nibble = if i < BLOCK / 2 { byte & 15 } else { byte >> 4 };
        (i32::from(nibble) - ZERO) as f32 * step
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::round;
    use proptest::prelude::*;

    fn squared_error(x: &[f32; BLOCK], block: &BlockQ4) -> f64 {
        let y = dequantize(block);
        x.iter().zip(y).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// The plain choice: the largest magnitude exactly at level -8.
    fn without_search(x: &[f32; BLOCK]) -> BlockQ4 {
        let extreme = x
            .iter()
            .fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
        let scale = f16::from_f32(extreme / -8.0);
        let inverse = if scale == f16::ZERO {
            0.0
        } else {
            1.0 / scale.to_f32()
        };
        let level = |v: f32| (round((v * inverse).clamp(-8.0, 7.0)) + 8.0) as u8;
        BlockQ4 {
            scale,
            nibbles: std::array::from_fn(|j| level(x[j]) | level(x[j + 16]) << 4),
        }
    }

    proptest! {
        #[test]
        fn unclipped_weights_are_within_half_a_step(x in prop::array::uniform32(-50.0f32..50.0)) {
            let block = quantize(&x).unwrap();
            let step = block.scale.to_f32();
            for (a, b) in x.iter().zip(dequantize(&block)) {
                let clipped = a / step > 7.0 || a / step < -8.0;
                prop_assert!(clipped || (a - b).abs() <= step.abs() / 2.0 * (1.0 + 1e-4));
            }
        }

        #[test]
        fn search_never_loses_to_the_plain_choice(x in prop::array::uniform32(-2.0f32..2.0)) {
            // The scale is rounded to f16 after the search: 2^-11 of each value.
            let slack: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() * 2f64.powi(-20);
            prop_assert!(squared_error(&x, &quantize(&x).unwrap()) <= squared_error(&x, &without_search(&x)) * 1.001 + slack);
        }
    }

    #[test]
    fn zeros_extremes_and_bad_values() {
        assert_eq!(dequantize(&quantize(&[0.0; BLOCK]).unwrap()), [0.0; BLOCK]);
        let mut x = [0.0; BLOCK];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, f32::MAX] {
            x[31] = bad;
            assert_eq!(quantize(&x), None, "{bad}");
        }
        x[31] = -3.5;
        assert!((dequantize(&quantize(&x).unwrap())[31] + 3.5).abs() < 3.5 * 2f32.powi(-10));
        assert!(
            dequantize(&quantize(&[1e-38; BLOCK]).unwrap())
                .iter()
                .all(|v| v.abs() < 1e-6)
        );
    }
}
