//! Choosing tokens.

/// The kernels of `sample.cu`.
pub(super) const KERNELS: &[&str] = &[];
