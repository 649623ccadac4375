//! Kernels for AVX-512 with VNNI: servers since Ice Lake (2019) and Zen 4 (2022), desktops since Zen 4.

pub(super) mod lanes;
pub(super) mod packed;
pub(super) mod pairs;

use crate::cpu::avx2::{Ymm2, Ymm2Sums};

// Dense sixteen sums, four rows, four tokens: 24 of 32 registers. Scores 8 queries x 2 panels, values 4
// queries x 6 or 4 columns: at most 29. One query in registers of 256 bits: 4 panels, 6 columns.
super::vector::vector_table!(
    Isa::Avx512, "avx512f,avx512vl", lanes::Zmm,
    packed: packed::gemm_q4, packed::gemm_q8,
    dense: 4 x 4,
    attention: 8, 2, 4, 6, 4; one query: Ymm2, 4, 6, 4
    attention of bytes: "avx512f,avx512bw,avx512vl,avx512vnni",
        lanes::ZmmSums, 8, 2, 4, 6, 4; one query: Ymm2Sums, 4, 6, 4
);

/// Where 512 bits are computed in two steps.
static IN_TWO_STEPS: Kernels = KERNELS;

/// Where they are computed at once.
static AT_ONCE: Kernels = Kernels {
    gemm_q4: pairs::gemm_q4,
    gemm_q8: pairs::gemm_q8,
    panels_a_call: pairs::PANELS,
    ..KERNELS
};

/// The table, if this CPU has the instructions.
pub(super) fn table() -> Option<&'static Kernels> {
    let available = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    // A few tokens go through kernels of AVX2's features and the 256-bit form of these.
    super::avx2::table().filter(|_| available)?;
    Some(if super::vendor::computes_512_bits_at_once() {
        &AT_ONCE
    } else {
        &IN_TWO_STEPS
    })
}

/// The one that this CPU does not use, for tests.
#[cfg(test)]
pub(super) fn other_table() -> Option<&'static Kernels> {
    let used = table()?;
    [&AT_ONCE, &IN_TWO_STEPS]
        .into_iter()
        .find(|other| !std::ptr::eq(*other, used))
}
