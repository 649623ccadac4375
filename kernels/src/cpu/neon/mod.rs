//! Kernels for AArch64: NEON, which every one of them has, and for the packed GEMM the 8-bit inner
//! products of the extensions dotprod (Cortex-A76, Neoverse N1, Apple M1) and i8mm (Cortex-A710, Neoverse
//! V1, Apple M2).

use std::arch::is_aarch64_feature_detected;

mod extended;
mod lanes;
mod packed;

// Sixteen floats are four registers of 32. Dense four sums, two tokens and a row: 28. Sixteen registers of
// sums in each tile of attention: scores 4 queries x 1 panel and 1 x 4, values 2 queries x 2 columns.
super::vector::vector_table!(
    Isa::Neon, "neon", lanes::Quad,
    packed: packed::plain::gemm_q4, packed::plain::gemm_q8,
    dense: 2 x 2,
    attention: 4, 1, 2, 2, 1; one query: lanes::Quad, 4, 2, 1
    attention of bytes: "neon", lanes::QuadSums, 4, 1, 2, 2, 1; one query: lanes::QuadSums, 4, 2, 1
);

/// The table, if this CPU has the instructions.
pub(super) fn table() -> Option<&'static Kernels> {
    static TABLE: Kernels = KERNELS;
    is_aarch64_feature_detected!("neon").then_some(&TABLE)
}

/// The table with dotprod, if this CPU has it.
pub(super) fn dotprod_table() -> Option<&'static Kernels> {
    static TABLE: Kernels = Kernels {
        isa: Isa::NeonDotprod,
        gemm_q4: extended::dotprod::gemm_q4,
        gemm_q8: extended::dotprod::gemm_q8,
        ..KERNELS
    };
    table().filter(|_| is_aarch64_feature_detected!("dotprod"))?;
    Some(&TABLE)
}

/// The table with dotprod and i8mm, if this CPU has both.
pub(super) fn i8mm_table() -> Option<&'static Kernels> {
    static TABLE: Kernels = Kernels {
        isa: Isa::NeonI8mm,
        gemm_q4: extended::i8mm::gemm_q4,
        gemm_q8: extended::i8mm::gemm_q8,
        ..KERNELS
    };
    dotprod_table().filter(|_| is_aarch64_feature_detected!("i8mm"))?;
    Some(&TABLE)
}
