//! The definition of the activations; what `gelu` does is explained in `cpu/activation.rs`.

use crate::cpu::activation::{DENOMINATOR, NUMERATOR, QUICK_GELU, TAIL_END};

pub(super) fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + (-QUICK_GELU * x).exp())
}

fn gelu(x: f32) -> f32 {
    let t = x.abs().clamp(0.0, TAIL_END);
    let tail = t * (horner(&NUMERATOR, t) / horner(&DENOMINATOR, t)) * (-0.5 * (t * t)).exp();
    // max(x, 0), but for a NaN, and for minus infinity.
    (0.5 * x + 0.5 * x.abs()) - tail
}

fn horner(coefficients: &[f32], t: f32) -> f32 {
    coefficients.iter().rev().fold(0.0, |sum, c| sum * t + c)
}

pub(super) fn quick_gelu_all(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = quick_gelu(*x));
}

pub(super) fn gelu_all(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = gelu(*x));
}
