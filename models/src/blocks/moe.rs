//! A mixture of experts in the place of the MLP.

pub use phidias_engine::backend::LayerRouting;
use phidias_engine::backend::{Backend, Expert, Ops};
use phidias_engine::tensor::Linear;

/// A router and its experts, of which a token uses [`PICKS`](phidias_engine::backend::PICKS).
#[derive(Clone, Debug)]
pub struct Moe {
    /// `[experts, hidden]`
    pub router: Linear,
    /// Alike in shape.
    pub experts: Vec<Expert>,
    /// How near a score must come to the best one to lower its weight, as a share of it.
    pub jitter: f32,
}

/// What a mixture works with, kept from layer to layer.
#[derive(Debug)]
pub struct Scratch<B: Backend> {
    input: B::Input,
    /// The router's scores of the last layer, `[tokens, experts]`.
    pub scores: B::Buffer,
    routes: B::Routes,
    experts: B::ExpertScratch,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            input: B::Input::default(),
            scores: B::Buffer::default(),
            routes: B::Routes::default(),
            experts: B::ExpertScratch::default(),
        }
    }
}

impl Moe {
    /// `y = moe(x)`, both `[tokens, hidden]`.
    pub fn forward<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        x: &B::Buffer,
        y: &mut B::Buffer,
        s: &mut Scratch<B>,
        loads: &mut B::Loads,
    ) {
        ops.input(x, &self.router.weight, &mut s.input);
        ops.linear(&self.router, &s.input, &mut s.scores);
        ops.route(&s.scores, self.jitter, &mut s.routes, loads);
        ops.experts(&self.experts, &s.routes, x, y, &mut s.experts);
    }
}
