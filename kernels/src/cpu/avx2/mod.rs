//! Kernels for AVX2 with FMA and F16C: every x86-64 server and desktop since 2013.

use super::attention::{Block, Partial, PartialMut, StateMut};
use super::vector::{self, Load};
use super::{Isa, Kernels};
use crate::view::ColsMut;
use lanes::Ymm2;
use phidias_quant::activations::TileMut;
use phidias_quant::{bf16, f16};
use std::ops::Range;

mod lanes;
pub(super) mod packed;
pub(super) mod vnni;

/// Its functions, for the tables that take some of them over.
pub(super) const KERNELS: Kernels = Kernels {
    isa: Isa::Avx2,
    gemm_q4: packed::gemm_q4,
    gemm_q8: packed::gemm_q8,
    gemm_f32: gemm_dense::<f32>,
    gemm_f16: gemm_dense::<f16>,
    gemm_bf16: gemm_dense::<bf16>,
    quantize,
    rms_norm,
    rope,
    silu_mul,
    attend_f32: attend::<f32>,
    attend_f16: attend::<f16>,
    attend_bf16: attend::<bf16>,
    attend_i8: attend::<i8>,
    merge,
};

/// The table, if this CPU has the instructions.
pub(super) fn table() -> Option<&'static Kernels> {
    static TABLE: Kernels = KERNELS;
    let available = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
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

#[target_feature(enable = "avx2,fma,f16c")]
fn gemm_dense<T: Load>(w: &[T], cols: usize, x: &[f32], y: ColsMut<'_>) {
    // Four sums of two registers and the operands: 16 registers hold no more.
    vector::dense::gemm::<Ymm2, T, 2, 2>(w, cols, x, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize(x: &[f32], tile: &mut TileMut<'_>, row: usize) {
    vector::quantize::quantize::<Ymm2>(x, tile, row);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    vector::elementwise::rms_norm::<Ymm2>(x, weight, eps, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    vector::elementwise::rope::<Ymm2>(heads, cos, sin);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    vector::elementwise::silu_mul::<Ymm2>(gate, up, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn attend<T: Load>(
    block: Block<'_, T>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
) {
    // Tiles for 16 registers, two of which are sixteen floats.
    vector::attention::attend::<Ymm2, T, 8, 1, 2, 2, 2, 1>(block, queries, visible, state);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn merge(block: Partial<'_>, state: PartialMut<'_>) {
    vector::attention::merge::<Ymm2>(block, state);
}
