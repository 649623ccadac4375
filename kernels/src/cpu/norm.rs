//! RMSNorm and LayerNorm.
//!
//! ```text
//! Maths   rms_norm     y[i] = x[i] / sqrt(mean over j of x[j]^2 + eps) * w[i]      (Zhang & Sennrich 2019)
//!         layer_norm   y[i] = (x[i] - m) / sqrt(mean over j of (x[j] - m)^2 + eps) * w[i] + b[i],
//!                      m the mean of x      (Ba, Kiros & Hinton 2016)
//! Exact   f32; every sum in 16 partial sums, as in gemm. The variance is of the differences, not
//!         mean of squares minus square of mean, which loses all digits where the mean is large
//! ```

use super::Kernels;

/// # Safety
/// The CPU has the features of the table; all three slices are equally long.
pub(super) type RmsNorm = unsafe fn(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);

/// # Safety
/// The CPU has the features of the table; all four slices are equally long.
pub(super) type LayerNorm =
    unsafe fn(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]);

impl Kernels {
    /// Normalises one row by its root mean square and scales it by `weight`.
    /// # Panics
    /// When the lengths differ.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        assert_eq!(x.len(), weight.len(), "row and weight");
        assert_eq!(x.len(), y.len(), "row and result");
        // SAFETY: the table exists only where the CPU has its features; lengths are checked above.
        unsafe { (self.rms_norm)(x, weight, eps, y) }
    }

    /// Normalises one row to mean 0 and variance 1, scales it by `weight` and adds `bias`.
    /// # Panics
    /// When the lengths differ.
    pub fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
        assert_eq!(x.len(), weight.len(), "row and weight");
        assert_eq!(x.len(), bias.len(), "row and bias");
        assert_eq!(x.len(), y.len(), "row and result");
        // SAFETY: the table exists only where the CPU has its features; lengths are checked above.
        unsafe { (self.layer_norm)(x, weight, bias, eps, y) }
    }
}
