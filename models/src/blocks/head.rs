//! The head: from hidden states to logits.

use phidias_engine::backend::{Input, Ops};
use phidias_engine::tensor::{Buffer, Linear};
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
#[derive(Debug, Default)]
pub struct Scratch {
    rows: Buffer,
    input: Input,
    /// `[rows, vocab]`, the last result.
    pub logits: Buffer,
}

impl LmHead {
    /// The logits of some rows of the hidden states, in `s.logits`.
    pub fn forward(&self, ops: &Ops<'_>, hidden: &Buffer, rows: Range<usize>, s: &mut Scratch) {
        let cols = hidden.cols();
        s.rows.reshape(rows.len(), cols);
        let values = &hidden.data()[rows.start * cols..rows.end * cols];
        s.rows.data_mut().copy_from_slice(values);
        ops.input(&s.rows, &self.linear.weight, &mut s.input);
        ops.linear(&self.linear, &s.input, &mut s.logits);
        for t in 0..rows.len() {
            let logits = s.logits.row_mut(t);
            if self.divisor != 1.0 {
                logits.iter_mut().for_each(|v| *v /= self.divisor);
            }
            for ids in &self.unused {
                logits[ids.clone()].fill(f32::MIN);
            }
        }
    }
}
