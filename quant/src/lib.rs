//! Block formats for weights and activations, and the packed order the kernels read.
//!
//! A *block* is 32 consecutive weights of one row that share one f16 scale. A *panel* is 16 rows
//! of a matrix, stored block by block in the order a vector register wants them; see [`packed`].
//!
//! | format | a weight is | bits a weight | worst error, nothing clipped |
//! |---|---|---|---|
//! | [`q8`] | `(u8 - 128) * scale` | 8.5 | half a step, `scale / 2` |
//! | [`q4`] | `(nibble - 8) * scale` | 4.5 | half a step, `scale / 2` |
//!
//! Activations are quantized to signed bytes by [`activations`]: they live for one multiplication
//! only and never reach a file.
//!
//! This crate knows no threads and no files.
#![forbid(unsafe_code)]

pub mod activations;
pub mod aligned;
pub mod packed;
pub mod q4;
pub mod q8;

pub use aligned::{ALIGN, AlignedBytes, Line};
pub use half::{bf16, f16};
pub use packed::{Format, PackError, Packed, PackedLayout};

/// Weights in a block: consecutive columns of one row sharing one scale.
pub const BLOCK: usize = 32;

/// Rounds to the nearest integer, ties to even, for `|v| < 2^22`.
///
/// `f32::round` is a library call on baseline x86-64 and keeps a loop from being vectorised; adding
/// and subtracting 1.5 * 2^23 leaves the rounding to the adder (Muller et al., *Handbook of
/// Floating-Point Arithmetic*, 2nd ed., section 4.2).
#[inline(always)]
#[must_use]
pub fn round(v: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (v + MAGIC) - MAGIC
}

#[cfg(test)]
mod tests {
    #[test]
    fn round_is_to_nearest_even() {
        for (v, want) in [
            (0.5, 0.0),
            (1.5, 2.0),
            (-0.5, 0.0),
            (-1.5, -2.0),
            (2.49, 2.0),
            (-127.4, -127.0),
        ] {
            assert_eq!(super::round(v), want, "{v}");
        }
    }
}
