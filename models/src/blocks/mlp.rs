//! The MLP: `down(up(x) * silu(gate(x)))`, gate and up in one matrix.

use phidias_engine::backend::{Input, Ops};
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
    gated: Buffer,
    input: Input,
}

impl Mlp {
    /// `y = mlp(x)`, both `[tokens, hidden]`.
    pub fn forward(&self, ops: &Ops<'_>, x: &Input, y: &mut Buffer, s: &mut Scratch) {
        ops.gated_linear(&self.gate_up_proj, x, &mut s.gated);
        ops.input(&s.gated, &self.down_proj, &mut s.input);
        ops.linear(&self.down_proj, &s.input, y);
    }
}
