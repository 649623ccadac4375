//! Kernels for AMX: Xeons since Sapphire Rapids (2023). The table of AVX-512, with the packed GEMMs of many
//! tokens, and the attention of many queries over a cache of bytes, in tiles.

mod attention;
mod packed;
pub(super) mod tile;

use super::{Isa, Kernels};

/// The table, if this CPU has the instructions and the system lets this process use the tiles.
pub(super) fn table() -> Option<&'static Kernels> {
    static TABLE: Kernels = Kernels {
        isa: Isa::Amx,
        gemm_q4: packed::gemm_q4,
        gemm_q8: packed::gemm_q8,
        panels_a_call: packed::PANELS,
        few_tokens: Some((packed::fewest, Isa::Avx512)),
        scratch_bytes: packed::SCRATCH_BYTES + attention::SCRATCH_BYTES,
        attend_i8: attention::attend,
        ..super::avx512::KERNELS
    };
    let available = is_x86_feature_detected!("avx512vbmi") && tile::available();
    super::avx512::table().filter(|_| available)?;
    Some(&TABLE)
}
