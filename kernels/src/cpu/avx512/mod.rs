//! Kernels for AVX-512 with VNNI: servers since Ice Lake (2019) and Zen 4 (2022), desktops since Zen 4.

use super::attention::{Block, Partial, PartialMut, StateMut};
use super::vector::{self, Load};
use super::{Isa, Kernels};
use crate::view::ColsMut;
use lanes::Zmm;
use phidias_quant::activations::TileMut;
use phidias_quant::{bf16, f16};
use std::ops::Range;

mod lanes;
mod packed;

/// The table, if this CPU has the instructions.
pub(super) fn table() -> Option<&'static Kernels> {
    static TABLE: Kernels = Kernels {
        isa: Isa::Avx512,
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
    let available = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    available.then_some(&TABLE)
}

#[target_feature(enable = "avx512f")]
fn gemm_dense<T: Load>(w: &[T], cols: usize, x: &[f32], y: ColsMut<'_>) {
    // Sixteen sums, four rows, four tokens: 24 of 32 registers.
    vector::dense::gemm::<Zmm, T, 4, 4>(w, cols, x, y);
}

#[target_feature(enable = "avx512f")]
fn quantize(x: &[f32], tile: &mut TileMut<'_>, row: usize) {
    vector::quantize::quantize::<Zmm>(x, tile, row);
}

#[target_feature(enable = "avx512f")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    vector::elementwise::rms_norm::<Zmm>(x, weight, eps, y);
}

#[target_feature(enable = "avx512f")]
fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    vector::elementwise::rope::<Zmm>(heads, cos, sin);
}

#[target_feature(enable = "avx512f")]
fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    vector::elementwise::silu_mul::<Zmm>(gate, up, y);
}

#[target_feature(enable = "avx512f")]
fn attend<T: Load>(
    block: Block<'_, T>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
) {
    // Scores 8 x 2 and 1 x 4 panels, values 4 queries x 6 or 4 columns: at most 29 registers.
    vector::attention::attend::<Zmm, T, 2, 4, 4, 6, 4>(block, queries, visible, state);
}

#[target_feature(enable = "avx512f")]
fn merge(block: Partial<'_>, state: PartialMut<'_>) {
    vector::attention::merge::<Zmm>(block, state);
}
