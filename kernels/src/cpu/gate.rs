//! The gate of the MLP.
//!
//! ```text
//! Maths   y[i] = up[i] * silu(gate[i]),   silu(g) = g / (1 + exp(-g))      (Shazeer 2020, SwiGLU)
//! ```

use super::Kernels;

/// # Safety
/// The CPU has the features of the table; all three slices are equally long.
pub(super) type Gate = unsafe fn(gate: &[f32], up: &[f32], y: &mut [f32]);

impl Kernels {
    /// Multiplies `up` by the SiLU of `gate`.
    /// # Panics
    /// When the lengths differ.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], y: &mut [f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up");
        assert_eq!(gate.len(), y.len(), "gate and result");
        // SAFETY: the table exists only where the CPU has its features; lengths are checked above.
        unsafe { (self.silu_mul)(gate, up, y) }
    }
}
