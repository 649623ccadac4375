//! A mixture of experts in the place of the MLP.

use phidias_engine::backend::{Expert, ExpertScratch, Input, Ops, Routes};
use phidias_engine::tensor::{Buffer, Linear};

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
#[derive(Debug, Default)]
pub struct Scratch {
    input: Input,
    /// The router's scores of the last layer, `[tokens, experts]`.
    pub scores: Buffer,
    routes: Routes,
    experts: ExpertScratch,
}

impl Moe {
    /// `y = moe(x)`, both `[tokens, hidden]`.
    pub fn forward(
        &self,
        ops: &Ops<'_>,
        x: &Buffer,
        y: &mut Buffer,
        s: &mut Scratch,
        routing: &mut LayerRouting,
    ) {
        ops.input(x, &self.router.weight, &mut s.input);
        ops.linear(&self.router, &s.input, &mut s.scores);
        ops.route(&s.scores, self.jitter, &mut s.routes);
        routing.count(&s.routes);
        ops.experts(&self.experts, &s.routes, x, y, &mut s.experts);
    }
}

/// How the tokens of a layer were spread over its experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerRouting {
    /// Tokens that each expert was given; `PICKS` times the tokens in all.
    pub tokens: Vec<u64>,
    /// How often an expert was read: once for each pass in which it had a token.
    pub reads: u64,
}

impl LayerRouting {
    /// Of a layer with so many experts: none for one without a router.
    #[must_use]
    pub fn new(experts: usize) -> Self {
        Self {
            tokens: vec![0; experts],
            reads: 0,
        }
    }

    fn count(&mut self, routes: &Routes) {
        for (expert, tokens) in routes.loads() {
            self.tokens[expert] += tokens as u64;
            self.reads += 1;
        }
    }
}
