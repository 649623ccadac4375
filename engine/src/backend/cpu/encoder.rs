//! What an encoder needs beside a decoder's operations: an activation, and attention without a mask.

use super::linear::multiply;
use super::{Activation, CpuOps, Heads, Input, assert_columns};
use crate::tensor::{Buffer, Linear};
use phidias_kernels::cpu::{AttentionState, AttentionTask, Cached, KEY_PANEL, Kernels};
use phidias_kernels::view::{ColsMut, Elements};
use std::cell::RefCell;
use std::ops::Range;

impl Activation {
    fn apply(self, kernels: &Kernels, x: &mut [f32]) {
        match self {
            Self::QuickGelu => kernels.quick_gelu(x),
            Self::Gelu => kernels.gelu(x),
        }
    }
}

/// Queries whose scores are computed together by one thread.
const QUERY_ROWS: usize = 64;

/// Keys that are merged together: those of a picture's 577 patches at once.
const KEY_ROWS: usize = 640;

impl CpuOps<'_> {
    /// `y = activation(x w^T + bias)`, applied while the products are in the cache.
    /// # Panics
    /// When `x` was not made for a matrix like `w`.
    pub fn activated_linear(&self, w: &Linear, activation: Activation, x: &Input, y: &mut Buffer) {
        let kernels = self.kernels;
        assert_columns(x.cols, &w.weight);
        y.reshape(x.rows(), w.weight.rows());
        let widths = [w.weight.rows()];
        let unit = self.unit(x.rows(), w.weight.rows());
        let cut = self.cut(x.rows(), &widths, unit);
        self.team.columns(y.columns_mut(), cut, |_, rows, mut y| {
            multiply(kernels, w, rows, x, y.reborrow());
            (0..y.rows()).for_each(|t| activation.apply(kernels, y.row(t)));
        });
    }

    /// Attention of every token with every token of its sequence. `qkv` holds sequences of `tokens`
    /// rows one after the other; `y` is `[rows, heads * head_dim]`.
    /// # Panics
    /// When the rows are not whole sequences of projected heads.
    pub fn full_attention(
        &self,
        qkv: &Buffer,
        heads: Heads,
        tokens: usize,
        scale: f32,
        y: &mut Buffer,
    ) {
        let kernels = self.kernels;
        assert_eq!(qkv.cols(), heads.columns(), "columns of the projections");
        assert_eq!(qkv.rows() % tokens, 0, "{} rows of {tokens}", qkv.rows());
        let (cols, width) = (heads.queries(), heads.group() * heads.head_dim);
        y.reshape(qkv.rows(), cols);
        let mut parts = Vec::new();
        for (sequence, y) in y.data_mut().chunks_mut(tokens * cols).enumerate() {
            let rows = sequence * tokens..(sequence + 1) * tokens;
            let columns = ColsMut::new(y, tokens, cols).chunks(width);
            let parts_of = columns.into_iter().enumerate();
            parts.extend(parts_of.map(|(kv_head, y)| (rows.clone(), kv_head, y)));
        }
        self.team.each_part(parts, |(rows, kv_head, mut y)| {
            SCRATCH.with_borrow_mut(|s| {
                s.gather(qkv, heads, rows.clone(), kv_head);
                for first in (0..tokens).step_by(QUERY_ROWS) {
                    let queries = first..tokens.min(first + QUERY_ROWS);
                    s.queries.clear();
                    for t in queries.clone() {
                        let [own, _, _] = heads.of(kv_head, qkv.row(rows.start + t));
                        s.queries.extend_from_slice(own);
                    }
                    s.attend(kernels, heads.head_dim, scale);
                    let states = (0..).step_by(heads.group());
                    for (t, state) in queries.zip(states) {
                        let outs = y.row(t).chunks_exact_mut(heads.head_dim);
                        outs.zip(state..)
                            .for_each(|(out, i)| s.state.finish(i, out));
                    }
                }
            });
        });
    }
}

/// Keys and values of one head of one sequence, and some queries.
#[derive(Default)]
struct Scratch {
    /// `[panels][head_dim][16]`
    keys: Vec<f32>,
    /// `[tokens][head_dim]`
    values: Vec<f32>,
    /// `[tokens * group][head_dim]`
    queries: Vec<f32>,
    visible: Vec<Range<usize>>,
    state: AttentionState,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    /// Copies keys and values of a head into the order of the kernels.
    fn gather(&mut self, qkv: &Buffer, heads: Heads, rows: Range<usize>, kv_head: usize) {
        let d = heads.head_dim;
        self.keys.clear();
        self.keys
            .resize(rows.len().next_multiple_of(KEY_PANEL) * d, 0.0);
        self.values.clear();
        for (t, row) in rows.enumerate() {
            let [_, key, value] = heads.of(kv_head, qkv.row(row));
            let panel = &mut self.keys[t / KEY_PANEL * KEY_PANEL * d..];
            for (e, k) in key.iter().enumerate() {
                panel[e * KEY_PANEL + t % KEY_PANEL] = *k;
            }
            self.values.extend_from_slice(value);
        }
    }

    /// Attention of the queries with all keys, in `state`.
    fn attend(&mut self, kernels: &Kernels, d: usize, scale: f32) {
        let n = self.queries.len() / d;
        self.state.reset(n, d);
        let keys = self.keys.chunks(KEY_ROWS * d);
        for (keys, values) in keys.zip(self.values.chunks(KEY_ROWS * d)) {
            self.visible.clear();
            self.visible.resize(n, 0..values.len() / d);
            let task = AttentionTask {
                first: 0,
                queries: &self.queries,
                visible: &self.visible,
                keys: Cached::Floats(Elements::F32(keys)),
                values: Cached::Floats(Elements::F32(values)),
                scale,
                then: Default::default(),
            };
            kernels.attend(task, &mut self.state);
        }
    }
}
