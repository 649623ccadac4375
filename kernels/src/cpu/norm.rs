//! RMSNorm.
//!
//! ```text
//! Maths   y[i] = x[i] / sqrt(mean over j of x[j]^2 + eps) * w[i]      (Zhang & Sennrich 2019)
//! Exact   f32; the sum of squares in 16 partial sums, as in gemm
//! ```

use super::Kernels;

/// # Safety
/// The CPU has the features of the table; all three slices are equally long.
pub(super) type RmsNorm = unsafe fn(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);

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
}
