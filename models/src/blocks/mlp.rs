//! The MLP: `down(gated(x))`.

use phidias_engine::backend::{Backend, GateUp, Ops};
use phidias_engine::tensor::{Linear, Matrix};

/// An MLP with a gate.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[hidden]` to `[intermediate]`
    pub gate_up: GateUp,
    /// `[hidden, intermediate]`
    pub down_proj: Linear,
}

/// What the MLP works with, kept from layer to layer.
#[derive(Debug)]
pub struct Scratch<B: Backend> {
    gated: B::Buffer,
    input: B::Input,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            gated: B::Buffer::default(),
            input: B::Input::default(),
        }
    }
}

impl Mlp {
    /// Its matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.gate_up.matrices().chain([&self.down_proj.weight])
    }

    /// `y = mlp(x)`, both `[tokens, hidden]`.
    pub fn forward<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        x: &B::Input,
        y: &mut B::Buffer,
        s: &mut Scratch<B>,
    ) {
        let next = &self.down_proj.weight;
        ops.gated_input(&self.gate_up, x, next, &mut s.gated, &mut s.input);
        ops.linear(&self.down_proj, &s.input, y);
    }
}
