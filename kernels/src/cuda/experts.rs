//! Tokens grouped by expert, and the experts' products.

/// The kernels of `experts.cu`.
pub(super) const KERNELS: &[&str] = &[];
