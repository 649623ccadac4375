//! The head: from hidden states to logits.

use phidias_engine::backend::{Backend, Ops};
use phidias_engine::tensor::Linear;
use std::ops::Range;

/// `logits = hidden weight^T / divisor`
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
    rows: B::Buffer,
    input: B::Input,
    /// `[rows, vocab]`, the last result.
    pub logits: B::Buffer,
    /// The likeliest tokens of each of its rows, where they were asked for.
    pub found: B::Candidates,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            rows: B::Buffer::default(),
            input: B::Input::default(),
            logits: B::Buffer::default(),
            found: B::Candidates::default(),
        }
    }
}

impl LmHead {
    /// The logits of some rows of the hidden states, in `s.logits`.
    pub fn forward<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        hidden: &B::Buffer,
        rows: Range<usize>,
        s: &mut Scratch<B>,
    ) {
        ops.reshape(rows.len(), self.linear.weight.cols(), &mut s.rows);
        ops.copy_rows(hidden, rows, &mut s.rows, 0);
        ops.input(&s.rows, &self.linear.weight, &mut s.input);
        ops.linear(&self.linear, &s.input, &mut s.logits);
        ops.finish_logits(self.divisor, &self.unused, &mut s.logits);
    }
}
