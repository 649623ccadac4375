//! The MLP: `down(gated(x))`.

use phidias_engine::backend::{GateUp, Input, Ops};
use phidias_engine::tensor::{Buffer, Linear, Matrix};

/// An MLP with a gate.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[hidden]` to `[intermediate]`
    pub gate_up: GateUp,
    /// `[hidden, intermediate]`
    pub down_proj: Linear,
}

/// What the MLP works with, kept from layer to layer.
#[derive(Debug, Default)]
pub struct Scratch {
    gated: Buffer,
    input: Input,
}

impl Mlp {
    /// Its matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.gate_up.matrices().chain([&self.down_proj.weight])
    }

    /// `y = mlp(x)`, both `[tokens, hidden]`.
    pub fn forward(&self, ops: &Ops<'_>, x: &Input, y: &mut Buffer, s: &mut Scratch) {
        ops.gated_linear(&self.gate_up, x, &mut s.gated);
        ops.input(&s.gated, &self.down_proj.weight, &mut s.input);
        ops.linear(&self.down_proj, &s.input, y);
    }
}
