//! The head: from hidden states to logits.

use phidias_engine::backend::{Backend, Norm, Ops};
use phidias_engine::tensor::Linear;
use std::ops::Range;

/// `logits = norm(hidden) weight^T / divisor`
#[derive(Clone, Debug)]
pub struct LmHead {
    /// `[vocab, hidden]`
    pub linear: Linear,
    /// 1 in most families.
    pub divisor: f32,
    /// Ids that are no tokens: their logit is the lowest float, whatever the weights say.
    pub unused: Vec<Range<usize>>,
}

/// What the head works with, kept from pass to pass.
#[derive(Debug)]
pub struct Scratch<B: Backend> {
    input: B::Input,
    /// `[rows, vocab]`, the last result.
    pub logits: B::Buffer,
    /// The likeliest tokens of each of its rows, where they were asked for.
    pub found: B::Candidates,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            input: B::Input::default(),
            logits: B::Buffer::default(),
            found: B::Candidates::default(),
        }
    }
}

impl LmHead {
    /// The logits of some rows of the hidden states, `x + branch`, in `s.logits`. Only those rows meet the norm.
    pub fn forward<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        (x, branch): (&B::Buffer, &B::Buffer),
        norm: &Norm,
        rows: Range<usize>,
        s: &mut Scratch<B>,
    ) {
        ops.sum_norm_input(x, branch, rows, norm, &self.linear.weight, &mut s.input);
        ops.linear(&self.linear, &s.input, &mut s.logits);
        ops.finish_logits(self.divisor, &self.unused, &mut s.logits);
    }
}
