//! The gates of the MLPs.
//!
//! ```text
//! Maths   silu_mul   y[i] = up[i] * silu(gate[i]),   silu(g) = g / (1 + exp(-g))      (Shazeer 2020, SwiGLU)
//!         gegelu     y[i] = quick_gelu(min(a, limit)) * (clamp(b, -limit, limit) + 1),
//!                    a = x[2 i], b = x[2 i + 1]; quick_gelu in `activation.rs`
//! Exact   f32. Infinities are not clamped: an overflow further up stays visible. Where a factor is
//!         zero and the other infinite (a gate of -inf) the result is a NaN, as in the reference
//! ```

use super::Kernels;

/// # Safety
/// The CPU has the features of the table; all three slices are equally long.
pub(super) type Gate = unsafe fn(gate: &[f32], up: &[f32], y: &mut [f32]);

/// # Safety
/// The CPU has the features of the table; `x.len() == 2 * y.len()`; `limit >= 0`.
pub(super) type Gegelu = unsafe fn(x: &[f32], limit: f32, y: &mut [f32]);

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

    /// The gate of Phi-3-small. `x` is `[2 n]`, gates at even places and what they are for at odd
    /// ones; `y` is `[n]`; an infinite `limit` is none.
    /// # Panics
    /// When `x` is not twice as long as `y`, or `limit` is negative or a NaN.
    pub fn gegelu(&self, x: &[f32], limit: f32, y: &mut [f32]) {
        assert_eq!(x.len(), 2 * y.len(), "pairs and result");
        assert!(limit >= 0.0, "limit {limit}");
        // SAFETY: the table exists only where the CPU has its features; the rest is checked above.
        unsafe { (self.gegelu)(x, limit, y) }
    }
}
