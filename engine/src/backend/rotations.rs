//! Rotary embedding, as the operations take it.

use crate::tensor::Buffer;

/// Rows `[tokens, heads]` of rotations: cosine and sine of each position.
#[derive(Clone, Debug, Default)]
pub struct Rotations {
    /// `[positions, head_dim / 2]`
    pub cos: Buffer,
    /// `[positions, head_dim / 2]`
    pub sin: Buffer,
}
