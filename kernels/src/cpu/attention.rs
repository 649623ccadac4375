//! Attention with an online softmax, one block of keys at a time.
//!
//! ```text
//! Maths   o = sum over j of softmax_j(scale * <q, k_j>) v_j over the keys j that q may see
//!
//!         A block of keys gives        m_b = max of its scores
//!                                      l_b = sum over j of exp(s_j - m_b)
//!                                      a_b = sum over j of exp(s_j - m_b) v_j
//!         and is merged into the state M  = max(m, m_b)
//!                                      l <- l * exp(m - M) + l_b * exp(m_b - M)
//!                                      a <- a * exp(m - M) + a_b * exp(m_b - M)
//!         after the last block         o  = a / l          (Milakov & Gimelshein 2018; Dao 2022)
//! Order   blocks are fixed ranges of absolute positions, merged from the first to the last, and
//!         scores and sums inside a block run in the order of the keys. So a result depends on the
//!         query and its keys only: not on how many queries are computed beside it.
//! Exact   f32 throughout; keys and values are widened from what the cache stores
//! ```

use super::Kernels;
use crate::view::Elements;
use std::ops::Range;

/// One block of keys and values of one KV head, and the queries that look at it.
#[derive(Clone, Copy, Debug)]
pub struct AttentionTask<'a> {
    /// `[queries, head_dim]`, rotated.
    pub queries: &'a [f32],
    /// The keys of the block that each query may see, as a range within the block; `[queries]`.
    pub visible: &'a [Range<usize>],
    /// `[keys, head_dim]`, rotated.
    pub keys: Elements<'a>,
    /// `[keys, head_dim]`
    pub values: Elements<'a>,
    /// Factor on every score.
    pub scale: f32,
}

/// The running softmax of some queries.
#[derive(Clone, Debug, Default)]
pub struct AttentionState {
    head_dim: usize,
    /// `[queries]`, the largest score so far
    max: Vec<f32>,
    /// `[queries]`, the sum of exponentials relative to `max`
    sum: Vec<f32>,
    /// `[queries, head_dim]`, the values weighted alike
    acc: Vec<f32>,
    /// scores of one query on one block; then the block's own weighted values
    scratch: Vec<f32>,
}

/// The state of the queries, borrowed for one block.
#[derive(Debug)]
pub(super) struct StateMut<'a> {
    /// `[queries]`
    pub max: &'a mut [f32],
    /// `[queries]`
    pub sum: &'a mut [f32],
    /// `[queries, head_dim]`
    pub acc: &'a mut [f32],
    /// `[keys]`
    pub scores: &'a mut [f32],
    /// `[head_dim]`
    pub block: &'a mut [f32],
}

/// Merges one block into the state of each query.
/// # Safety
/// The CPU has the features of the table; `queries` is `[visible.len(), d]` with `d = block.len()`;
/// `keys` and `values` are `[scores.len(), d]`; every visible range is inside `0..scores.len()`;
/// the state is of those queries.
pub(super) type Attend<T> = unsafe fn(
    queries: &[f32],
    visible: &[Range<usize>],
    keys: &[T],
    values: &[T],
    scale: f32,
    state: StateMut<'_>,
);

impl AttentionState {
    /// Starts anew for `queries` queries.
    pub fn reset(&mut self, queries: usize, head_dim: usize) {
        self.head_dim = head_dim;
        for (v, len, start) in [
            (&mut self.max, queries, f32::NEG_INFINITY),
            (&mut self.sum, queries, 0.0),
            (&mut self.acc, queries * head_dim, 0.0),
        ] {
            v.clear();
            v.resize(len, start);
        }
    }

    /// The attention of query `i`, `[head_dim]`; zeros when it saw no key.
    pub fn finish(&self, i: usize, out: &mut [f32]) {
        let inverse = if self.sum[i] > 0.0 || self.sum[i].is_nan() {
            1.0 / self.sum[i]
        } else {
            0.0
        };
        for (o, a) in out
            .iter_mut()
            .zip(&self.acc[i * self.head_dim..][..self.head_dim])
        {
            *o = a * inverse;
        }
    }
}

impl Kernels {
    /// Merges one block of keys and values into the state of its queries.
    /// # Panics
    /// When the shapes do not fit.
    pub fn attend(&self, task: AttentionTask<'_>, state: &mut AttentionState) {
        let d = state.head_dim;
        let n = task.visible.len();
        assert!(
            d > 0 && task.keys.len().is_multiple_of(d),
            "{} key elements in heads of {d}",
            task.keys.len()
        );
        let keys = task.keys.len() / d;
        assert_eq!(task.values.len(), task.keys.len(), "keys and values");
        assert_eq!(task.queries.len(), n * d, "{n} queries of {d}");
        assert_eq!(state.max.len(), n, "queries of the state and of the task");
        for r in task.visible {
            assert!(
                r.start <= r.end && r.end <= keys,
                "visible {r:?} of {keys} keys"
            );
        }
        state.scratch.resize(keys + d, 0.0);
        let (scores, block) = state.scratch.split_at_mut(keys);
        let s = StateMut {
            max: &mut state.max,
            sum: &mut state.sum,
            acc: &mut state.acc,
            scores,
            block,
        };
        // SAFETY: the table exists only where the CPU has its features; shapes are checked above.
        unsafe {
            match (task.keys, task.values) {
                (Elements::F32(k), Elements::F32(v)) => {
                    (self.attend_f32)(task.queries, task.visible, k, v, task.scale, s)
                }
                (Elements::F16(k), Elements::F16(v)) => {
                    (self.attend_f16)(task.queries, task.visible, k, v, task.scale, s)
                }
                (Elements::Bf16(k), Elements::Bf16(v)) => {
                    (self.attend_bf16)(task.queries, task.visible, k, v, task.scale, s)
                }
                (k, v) => panic!("keys {k:?} and values {v:?} are stored differently"),
            }
        }
    }
}
