//! Rotary embedding, the cache, attention.

/// The kernels of `attention.cu`.
pub(super) const KERNELS: &[&str] = &[];
