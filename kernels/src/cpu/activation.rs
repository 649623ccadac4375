//! Activations that are no gates, in place.
//!
//! ```text
//! Maths   quick_gelu   x / (1 + exp(-1.702 x))                        (Hendrycks & Gimpel 2016)
//!         gelu         x Phi(x),   Phi(x) = (1 + erf(x / sqrt 2)) / 2 the normal distribution
//! Exact   f32. Of minus infinity both give a NaN, 0 times infinity, as the formulas say
//! ```
//!
//! # How `gelu` is computed
//! `1 + erf` as written has no digits left for x below -5. By symmetry, with `t = |x|` and the tail
//! `Q(t) = Phi(-t)`,
//!
//! ```text
//! x Phi(x) = max(x, 0) - t Q(t),   Q(t) = exp(-t^2 / 2) R(t)
//! ```
//!
//! holds on both sides of zero, and the difference cancels at most half of `x`. `R` falls smoothly
//! from 1/2 as `1 / (t sqrt(2 pi))` does: [`NUMERATOR`] over [`DENOMINATOR`], fitted to the least relative
//! error on `0..=15` (Remez) and rounded to f32, is within 4.3e-8 of it. From 14.5 on the
//! exponential is zero in f32.
//!
//! All coefficients are positive, so Horner's rule loses at most two roundings a step, 8 and 10;
//! quotient and products round three times more, the exponential is off by two units. Its argument is
//! rounded once, which counts `t^2 / 2` times: with `u = 2^-24` the tail is off by less than
//! `(26 + t^2 / 2) u` of itself, and the result by one rounding more.

use super::Kernels;

/// `1.702 x` in the logistic function stands for `x` in the normal distribution.
pub(super) const QUICK_GELU: f32 = 1.702;

/// Coefficients of `1, t, t^2, ...` above the line.
pub(super) const NUMERATOR: [f32; 5] = [0.5, 0.439_283, 0.183_968_84, 0.040_881_03, 0.004_153_216];
/// Below it.
pub(super) const DENOMINATOR: [f32; 6] = [
    1.0,
    1.676_451_1,
    1.205_547_1,
    0.471_407_92,
    0.102_479_66,
    0.010_410_456,
];
/// The quotient's largest relative error, in exact arithmetic on those coefficients.
#[cfg(test)]
pub(super) const RATIO_ERROR: f64 = 4.3e-8;
/// Where the quotient ends: further out the tail is zero.
pub(super) const TAIL_END: f32 = 15.0;

/// # Safety
/// The CPU has the features of the table.
pub(super) type Activation = unsafe fn(x: &mut [f32]);

impl Kernels {
    /// The GELU of CLIP: each `x` becomes `x sigmoid(1.702 x)`.
    pub fn quick_gelu(&self, x: &mut [f32]) {
        // SAFETY: the table exists only where the CPU has its features.
        unsafe { (self.quick_gelu)(x) }
    }

    /// The exact GELU: each `x` becomes `x` times the share of a normal distribution below it.
    pub fn gelu(&self, x: &mut [f32]) {
        // SAFETY: the table exists only where the CPU has its features.
        unsafe { (self.gelu)(x) }
    }
}
