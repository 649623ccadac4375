//! Whole operations on whole buffers: the seam between models and devices.
//!
//! A model calls these one after the other and never sees a thread or an instruction set. Every
//! result depends on its own row only, never on how the work was divided.

use crate::kv_cache::{BLOCK, KvCache};
use crate::pool::Pool;
use crate::tensor::{Buffer, Matrix, MatrixView};
use phidias_kernels::cpu::{AttentionState, AttentionTask, Kernels};
use phidias_kernels::view::ColsMut;
use phidias_quant::activations::Activations;
use phidias_quant::packed::PANEL_ROWS;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// The CPU: a table of kernels and the threads to run them on.
#[derive(Debug)]
pub struct Cpu {
    kernels: &'static Kernels,
    pool: Arc<Pool>,
    /// Scratch of [`Cpu::linear`].
    quantized: Activations,
}

/// Rows `[tokens, heads]` of rotations: cosine and sine of each position.
#[derive(Clone, Debug, Default)]
pub struct Rotations {
    /// `[positions, head_dim / 2]`
    pub cos: Buffer,
    /// `[positions, head_dim / 2]`
    pub sin: Buffer,
}

/// Heads of an attention layer, as they lie in a row of the fused projection: all queries, all
/// keys, all values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Columns of the queries.
    #[must_use]
    pub fn queries(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Columns of the keys, or of the values.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Which keys a query sees: those at or before it, at most `window` of them (itself included).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Keys that each query sees at most.
    pub window: Option<usize>,
}

impl Mask {
    /// The positions that the query at `position` sees.
    #[must_use]
    pub fn visible(&self, position: usize) -> Range<usize> {
        let end = position + 1;
        end.saturating_sub(self.window.unwrap_or(end))..end
    }
}

/// Tokens whose queries are computed together by one thread.
const QUERY_ROWS: usize = 16;

impl Cpu {
    /// A device of these kernels and threads.
    #[must_use]
    pub fn new(kernels: &'static Kernels, pool: Arc<Pool>) -> Self {
        Self {
            kernels,
            pool,
            quantized: Activations::default(),
        }
    }

    /// Its threads.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Its kernels.
    #[must_use]
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// `x[t] = table[ids[t]]`
    /// # Panics
    /// When an id is not a row of the table: models check ids at their border.
    pub fn embed(&self, table: &Matrix, ids: &[u32], x: &mut Buffer) {
        x.reshape(ids.len(), table.cols());
        for (t, &id) in ids.iter().enumerate() {
            table.row(id as usize, x.row_mut(t));
        }
    }

    /// RMSNorm of each row.
    pub fn rms_norm(&self, x: &Buffer, weight: &[f32], eps: f32, y: &mut Buffer) {
        y.reshape(x.rows(), x.cols());
        let cols = x.cols();
        (y.data_mut().par_chunks_exact_mut(cols))
            .zip(x.data().par_chunks_exact(cols))
            .for_each(|(y, x)| self.kernels.rms_norm(x, weight, eps, y));
    }

    /// `y = x w^T`: `[tokens, cols]` to `[tokens, rows]`.
    /// # Panics
    /// When `x` has not as many columns as `w`.
    pub fn linear(&mut self, w: &Matrix, x: &Buffer, y: &mut Buffer) {
        assert_eq!(
            x.cols(),
            w.cols(),
            "columns of the activations and of the weights"
        );
        let (n, rows) = (x.rows(), w.rows());
        y.reshape(n, rows);
        let threads = self.pool.threads();
        let kernels = self.kernels;
        match w.view() {
            MatrixView::Packed(packed) => {
                self.quantized.reshape(n, x.cols());
                let out: Vec<_> = self.quantized.rows_mut().collect();
                (out.into_par_iter().zip(x.data().par_chunks_exact(x.cols())))
                    .for_each(|(out, x)| kernels.quantize(x, out));
                let quantized = &self.quantized;
                let panels = packed.layout().panels();
                let shares = (0..threads).map(|i| self.pool.share(panels, i));
                let parts = split(y, shares, |panel| (panel * PANEL_ROWS).min(rows));
                parts
                    .into_par_iter()
                    .with_max_len(1)
                    .for_each(|(panels, y)| kernels.gemm_packed(packed, panels, quantized, y));
            }
            MatrixView::Dense(dense) => {
                let parts = split(y, (0..threads).map(|i| self.pool.share(rows, i)), |row| row);
                parts
                    .into_par_iter()
                    .with_max_len(1)
                    .for_each(|(rows, y)| kernels.gemm_dense(dense, rows, x.data(), y));
            }
        }
    }

    /// `x += y`
    pub fn add(&self, x: &mut Buffer, y: &Buffer) {
        assert_eq!(
            (x.rows(), x.cols()),
            (y.rows(), y.cols()),
            "shapes of a sum"
        );
        x.data_mut()
            .iter_mut()
            .zip(y.data())
            .for_each(|(x, y)| *x += y);
    }

    /// `y = up * silu(gate)`, each row of `gate_up` being `gate` then `up`.
    pub fn silu_mul(&self, gate_up: &Buffer, y: &mut Buffer) {
        let cols = gate_up.cols() / 2;
        y.reshape(gate_up.rows(), cols);
        (y.data_mut().par_chunks_exact_mut(cols))
            .zip(gate_up.data().par_chunks_exact(2 * cols))
            .for_each(|(y, row)| {
                let (gate, up) = row.split_at(cols);
                self.kernels.silu_mul(gate, up, y);
            });
    }

    /// Rotates queries and keys of each row of `qkv` in place; row `t` by rotation `t`.
    pub fn rope(&self, qkv: &mut Buffer, heads: Heads, rotations: &Rotations) {
        let cols = qkv.cols();
        qkv.data_mut()
            .par_chunks_exact_mut(cols)
            .enumerate()
            .for_each(|(t, row)| {
                let rotated = &mut row[..heads.queries() + heads.keys()];
                self.kernels
                    .rope(rotated, rotations.cos.row(t), rotations.sin.row(t));
            });
    }

    /// Stores keys and values of `qkv` at positions `first ..` of a layer.
    pub fn store_kv(
        &self,
        qkv: &Buffer,
        heads: Heads,
        cache: &mut KvCache,
        layer: usize,
        first: usize,
    ) {
        for t in 0..qkv.rows() {
            let (keys, values) = qkv.row(t)[heads.queries()..].split_at(heads.keys());
            cache.write(layer, first + t, keys, values);
        }
    }

    /// Attention of the queries in `qkv`, the first at position `first`, over the cache of a layer
    /// that holds them already; `y` is `[tokens, heads * head_dim]`.
    #[allow(
        clippy::too_many_arguments,
        reason = "one operation, every argument of its own type"
    )]
    pub fn attention(
        &self,
        qkv: &Buffer,
        heads: Heads,
        cache: &KvCache,
        layer: usize,
        first: usize,
        mask: Mask,
        scale: f32,
        y: &mut Buffer,
    ) {
        let n = qkv.rows();
        y.reshape(n, heads.queries());
        let d = heads.head_dim;
        let group = heads.heads / heads.kv_heads;
        let mut tasks = Vec::new();
        for (chunk, rows) in y
            .data_mut()
            .chunks_mut(QUERY_ROWS * heads.queries())
            .enumerate()
        {
            let count = rows.len() / heads.queries();
            let mut rest = ColsMut::new(rows, count, heads.queries());
            for kv_head in 0..heads.kv_heads {
                let (part, right) = rest.split_at(group * d);
                rest = right;
                tasks.push((chunk * QUERY_ROWS, kv_head, part));
            }
        }
        tasks.into_par_iter().for_each_init(
            Scratch::default,
            |scratch, (from, kv_head, mut out)| {
                let positions = first + from..first + from + out.rows();
                // Queries of the group's heads, token by token: [tokens * group, d].
                scratch.queries.clear();
                for t in from..from + out.rows() {
                    scratch
                        .queries
                        .extend_from_slice(&qkv.row(t)[kv_head * group * d..][..group * d]);
                }
                scratch.state.reset(out.rows() * group, d);
                let start = mask.visible(positions.start).start;
                for block in start / BLOCK..positions.end.div_ceil(BLOCK) {
                    let base = block * BLOCK;
                    scratch.visible.clear();
                    for position in positions.clone() {
                        let seen = mask.visible(position);
                        let inside = |p: usize| p.clamp(base, base + BLOCK) - base;
                        scratch.visible.extend(std::iter::repeat_n(
                            inside(seen.start)..inside(seen.end),
                            group,
                        ));
                    }
                    let stored = (positions.end - base).min(BLOCK);
                    let (keys, values) = cache.block(layer, kv_head, block, stored);
                    let task = AttentionTask {
                        queries: &scratch.queries,
                        visible: &scratch.visible,
                        keys,
                        values,
                        scale,
                    };
                    self.kernels.attend(task, &mut scratch.state);
                }
                for t in 0..out.rows() {
                    for (g, head) in out.row(t).chunks_exact_mut(d).enumerate() {
                        scratch.state.finish(t * group + g, head);
                    }
                }
            },
        );
    }
}

/// What one attention task works with, kept from task to task.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    visible: Vec<Range<usize>>,
    state: AttentionState,
}

/// Divides the columns of `y` at the ends of the shares; `column` turns a share's end into a column.
fn split<'y>(
    y: &'y mut Buffer,
    shares: impl Iterator<Item = Range<usize>>,
    column: impl Fn(usize) -> usize,
) -> Vec<(Range<usize>, ColsMut<'y>)> {
    let (rows, cols) = (y.rows(), y.cols());
    let mut rest = ColsMut::new(y.data_mut(), rows, cols);
    let mut parts = Vec::new();
    for share in shares.filter(|s| !s.is_empty()) {
        let width = column(share.end) - column(share.start);
        let (part, right) = rest.split_at(width);
        rest = right;
        parts.push((share, part));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_counts_the_query_itself() {
        let mask = Mask { window: Some(3) };
        assert_eq!(
            [0, 1, 2, 3, 9].map(|p| mask.visible(p)),
            [0..1, 0..2, 0..3, 1..4, 7..10]
        );
        assert_eq!(Mask { window: None }.visible(5), 0..6);
    }
}
