//! All matrix products.

/// The kernels of `linear.cu`.
pub(super) const KERNELS: &[&str] = &[];
