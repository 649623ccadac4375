//! Rotary position embedding, half-split as the Phi-3 family has it.
//!
//! ```text
//! Maths   with h = head_dim / 2, for i < h:      (Su et al. 2021; pairing of GPT-NeoX)
//!         y[i]     = x[i]     * cos[i] - x[i + h] * sin[i]
//!         y[i + h] = x[i + h] * cos[i] + x[i]     * sin[i]
//! ```

use super::Kernels;

/// # Safety
/// The CPU has the features of the table; `cos` and `sin` are equally long, and `heads` is a whole
/// number of heads of twice that length.
pub(super) type Rope = unsafe fn(heads: &mut [f32], cos: &[f32], sin: &[f32]);

impl Kernels {
    /// Rotates every head of one token in place; `heads` is `[n, head_dim]`, `cos` and `sin` are
    /// `[head_dim / 2]` of that token's position.
    /// # Panics
    /// When the lengths do not fit.
    pub fn rope(&self, heads: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert_eq!(cos.len(), sin.len(), "cos and sin");
        assert!(
            !cos.is_empty() && heads.len().is_multiple_of(2 * cos.len()),
            "{} values in heads of {}",
            heads.len(),
            2 * cos.len()
        );
        // SAFETY: the table exists only where the CPU has its features; lengths are checked above.
        unsafe { (self.rope)(heads, cos, sin) }
    }
}
