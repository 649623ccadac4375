//! The MLP: `down(up(x) * silu(gate(x)))`, gate and up in one matrix.

use phidias_engine::backend::Cpu;
use phidias_engine::tensor::{Buffer, Matrix};

/// SwiGLU with a fused input projection.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[2 * intermediate, hidden]`: the gate's rows, then up's.
    pub gate_up_proj: Matrix,
    /// `[hidden, intermediate]`
    pub down_proj: Matrix,
}

/// What the MLP works with, kept from layer to layer.
#[derive(Debug, Default)]
pub struct Scratch {
    gate_up: Buffer,
    gated: Buffer,
}

impl Mlp {
    /// `y = mlp(x)`, both `[tokens, hidden]`.
    pub fn forward(&self, cpu: &mut Cpu, x: &Buffer, y: &mut Buffer, s: &mut Scratch) {
        cpu.linear(&self.gate_up_proj, x, &mut s.gate_up);
        cpu.silu_mul(&s.gate_up, &mut s.gated);
        cpu.linear(&self.down_proj, &s.gated, y);
    }
}
