//! Kernels for AVX2 with FMA and F16C: every x86-64 server and desktop since 2013.

mod lanes;
pub(super) mod packed;
pub(super) mod vnni;

pub(super) use lanes::{Ymm2, Ymm2Sums, fold};

// Tiles for 16 registers, two of which are sixteen floats: dense four sums and the operands, scores
// 8 queries x 1 panel and 1 x 4, values 2 queries x 2 columns and 1 x 6.
super::vector::vector_table!(
    Isa::Avx2, "avx2,fma,f16c", Ymm2,
    packed: packed::gemm_q4, packed::gemm_q8,
    dense: 2 x 2,
    attention: 8, 1, 2, 2, 1; one query: Ymm2, 4, 6, 4
    attention of bytes: "avx2,fma,f16c", Ymm2Sums, 4, 1, 2, 2, 1; one query: Ymm2Sums, 4, 6, 4
);

/// The table, if this CPU has the instructions.
pub(super) fn table() -> Option<&'static Kernels> {
    static TABLE: Kernels = KERNELS;
    let available = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    super::prefetch::ask_the_vendor();
    available.then_some(&TABLE)
}

/// The table of AVX-VNNI, if this CPU has the instructions.
pub(super) fn vnni_table() -> Option<&'static Kernels> {
    static TABLE: Kernels = Kernels {
        isa: Isa::AvxVnni,
        gemm_q4: vnni::avx_vnni::gemm_q4,
        gemm_q8: vnni::avx_vnni::gemm_q8,
        ..KERNELS
    };
    table().filter(|_| is_x86_feature_detected!("avxvnni"))?;
    Some(&TABLE)
}

/// The same in the encoding of AVX-512, for tests.
#[cfg(test)]
pub(super) fn vnni_twin() -> Option<&'static Kernels> {
    static TABLE: Kernels = Kernels {
        isa: Isa::AvxVnni,
        gemm_q4: vnni::avx512_vnni::gemm_q4,
        gemm_q8: vnni::avx512_vnni::gemm_q8,
        ..KERNELS
    };
    let available = is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl");
    table().filter(|_| available)?;
    Some(&TABLE)
}
