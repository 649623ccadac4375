//! Kernels for AArch64: NEON, which every one of them has, and for the packed GEMM the 8-bit inner
//! products of the extensions dotprod (Cortex-A76, Neoverse N1, Apple M1) and i8mm (Cortex-A710, Neoverse
//! V1, Apple M2).

use super::attention::{Block, Partial, PartialMut, StateMut};
use super::vector::{self, Load};
use super::{Isa, Kernels};
use crate::view::ColsMut;
use lanes::Quad;
use phidias_quant::activations::TileMut;
use phidias_quant::{bf16, f16};
use std::arch::is_aarch64_feature_detected;
use std::ops::Range;

mod extended;
mod lanes;
mod packed;

/// Its functions, for the tables that take some of them over.
const KERNELS: Kernels = Kernels {
    isa: Isa::Neon,
    gemm_q4: packed::plain::gemm_q4,
    gemm_q8: packed::plain::gemm_q8,
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

#[target_feature(enable = "neon")]
fn gemm_dense<T: Load>(w: &[T], cols: usize, x: &[f32], y: ColsMut<'_>) {
    // Four sums of four registers, two tokens and a row: 28 of 32 registers.
    vector::dense::gemm::<Quad, T, 2, 2>(w, cols, x, y);
}

#[target_feature(enable = "neon")]
fn quantize(x: &[f32], tile: &mut TileMut<'_>, row: usize) {
    vector::quantize::quantize::<Quad>(x, tile, row);
}

#[target_feature(enable = "neon")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    vector::elementwise::rms_norm::<Quad>(x, weight, eps, y);
}

#[target_feature(enable = "neon")]
fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    vector::elementwise::rope::<Quad>(heads, cos, sin);
}

#[target_feature(enable = "neon")]
fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    vector::elementwise::silu_mul::<Quad>(gate, up, y);
}

#[target_feature(enable = "neon")]
fn attend<T: Load>(
    block: Block<'_, T>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
) {
    // Sixteen sums in each tile: scores 4 x 1 and 1 x 4 panels, values 2 queries x 2 columns, four
    // registers each.
    vector::attention::attend::<Quad, T, 4, 1, 4, 2, 2, 1>(block, queries, visible, state);
}

#[target_feature(enable = "neon")]
fn merge(block: Partial<'_>, state: PartialMut<'_>) {
    vector::attention::merge::<Quad>(block, state);
}
