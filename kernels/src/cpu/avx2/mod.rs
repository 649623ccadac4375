//! Kernels for AVX2 with FMA and F16C: every x86-64 server and desktop since 2013.
//!
//! The GEMMs are written in intrinsics. What remains takes little of the time: it is the scalar
//! definition, compiled once more for these instructions.

use super::attention::StateMut;
use super::scalar::{self, Element};
use super::{Isa, Kernels};
use phidias_quant::activations::{self, RowMut};
use phidias_quant::{bf16, f16};
use std::ops::Range;

mod dense;
mod packed;

/// The table, if this CPU has the instructions.
pub(super) fn table() -> Option<&'static Kernels> {
    static KERNELS: Kernels = Kernels {
        isa: Isa::Avx2,
        gemm_q4: packed::gemm_q4,
        gemm_q8: packed::gemm_q8,
        gemm_f32: dense::gemm_f32,
        gemm_f16: dense::gemm_f16,
        gemm_bf16: dense::gemm_bf16,
        quantize,
        rms_norm,
        rope,
        silu_mul,
        attend_f32: attend::<f32>,
        attend_f16: attend::<f16>,
        attend_bf16: attend::<bf16>,
    };
    let available = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    available.then_some(&KERNELS)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize(x: &[f32], out: RowMut<'_>) {
    activations::quantize(x, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    scalar::norm::rms_norm(x, weight, eps, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    scalar::rope(heads, cos, sin);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    scalar::silu_mul(gate, up, y);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn attend<T: Element>(
    queries: &[f32],
    visible: &[Range<usize>],
    keys: &[T],
    values: &[T],
    scale: f32,
    state: StateMut<'_>,
) {
    scalar::attention::attend(queries, visible, keys, values, scale, state);
}
