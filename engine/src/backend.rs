//! Whole operations on whole buffers: the seam between models and devices.
//!
//! A model calls these one after the other and never sees a thread or an instruction set. Every
//! result depends on its own row only, never on how the work was divided.

use crate::kv_cache::{BLOCK, KvCache};
use crate::pool::{Pool, Team};
use crate::tensor::{Buffer, Matrix, MatrixView};
use phidias_kernels::cpu::{AttentionState, AttentionTask, Kernels};
use phidias_kernels::view::ColsMut;
use phidias_quant::activations::{Activations, TILE};
use phidias_quant::packed::PANEL_ROWS;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

/// The CPU: a table of kernels and the threads to run them on.
#[derive(Debug)]
pub struct Cpu {
    kernels: &'static Kernels,
    pool: Arc<Pool>,
}

/// The operations, on a pool that was entered.
pub struct Ops<'t> {
    kernels: &'static Kernels,
    team: &'t Team<'t>,
}

/// Rows of activations as matrices of some format take them.
#[derive(Debug, Default)]
pub struct Input {
    cols: usize,
    kind: InputKind,
}

#[derive(Debug)]
enum InputKind {
    /// For matrices stored as floats.
    Floats(Buffer),
    /// For packed ones.
    Quantized(Activations),
}

impl Default for InputKind {
    fn default() -> Self {
        Self::Floats(Buffer::default())
    }
}

impl Input {
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        match &self.kind {
            InputKind::Floats(buffer) => buffer.rows(),
            InputKind::Quantized(quantized) => quantized.rows(),
        }
    }

    /// Makes room for `rows` rows as `w` takes them.
    fn reshape(&mut self, w: &Matrix, rows: usize) {
        self.cols = w.cols();
        match (w.view(), &mut self.kind) {
            (MatrixView::Dense(_), InputKind::Floats(buffer)) => buffer.reshape(rows, w.cols()),
            (MatrixView::Packed(packed), InputKind::Quantized(quantized)) => {
                quantized.reshape(rows, w.cols(), packed.layout().format().zero());
            }
            (MatrixView::Dense(_), kind) => {
                *kind = InputKind::Floats(Buffer::default());
                self.reshape(w, rows);
            }
            (MatrixView::Packed(_), kind) => {
                *kind = InputKind::Quantized(Activations::default());
                self.reshape(w, rows);
            }
        }
    }
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
const QUERY_ROWS: usize = 64;

/// Weight rows of a gated projection that are computed before the gate is applied.
const GATE_ROWS: usize = 2 * PANEL_ROWS;

impl Cpu {
    /// A device of these kernels and threads.
    #[must_use]
    pub fn new(kernels: &'static Kernels, pool: Arc<Pool>) -> Self {
        Self { kernels, pool }
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

    /// Enters the pool for some operations.
    pub fn enter<R: Send>(&self, work: impl FnOnce(&Ops<'_>) -> R + Send) -> R {
        self.pool.enter(|team| {
            work(&Ops {
                kernels: self.kernels,
                team,
            })
        })
    }
}

impl Ops<'_> {
    /// `x[t] = table[ids[t]]`
    /// # Panics
    /// When an id is not a row of the table: models check ids at their border.
    pub fn embed(&self, table: &Matrix, ids: &[u32], x: &mut Buffer) {
        x.reshape(ids.len(), table.cols());
        let parts = ids.iter().zip(x.data_mut().chunks_exact_mut(table.cols()));
        self.team
            .each_part(parts.collect(), |(&id, x)| table.row(id as usize, x));
    }

    /// RMSNorm of each row.
    pub fn rms_norm(&self, x: &Buffer, weight: &[f32], eps: f32, y: &mut Buffer) {
        let kernels = self.kernels;
        y.reshape(x.rows(), x.cols());
        let cols = x.cols();
        let parts = (y.data_mut().chunks_exact_mut(cols)).zip(x.data().chunks_exact(cols));
        self.team.each_part(parts.collect(), |(y, x)| {
            kernels.rms_norm(x, weight, eps, y);
        });
    }

    /// RMSNorm of each row, as `w` takes it.
    /// # Panics
    /// When `x` has not as many columns as `w`.
    pub fn norm_input(&self, x: &Buffer, weight: &[f32], eps: f32, w: &Matrix, out: &mut Input) {
        let kernels = self.kernels;
        self.input_with(x, w, out, |x, y| kernels.rms_norm(x, weight, eps, y));
    }

    /// Rows as `w` takes them.
    /// # Panics
    /// When `x` has not as many columns as `w`.
    pub fn input(&self, x: &Buffer, w: &Matrix, out: &mut Input) {
        let kernels = self.kernels;
        assert_columns(x.cols(), w);
        out.reshape(w, x.rows());
        match &mut out.kind {
            InputKind::Floats(buffer) => buffer.data_mut().copy_from_slice(x.data()),
            InputKind::Quantized(quantized) => {
                let parts = quantized.tiles_mut().zip(x.data().chunks(TILE * x.cols()));
                self.team.each_part(parts.collect(), |(mut tile, x_rows)| {
                    for (r, x) in x_rows.chunks_exact(x.cols()).enumerate() {
                        kernels.quantize(x, &mut tile, r);
                    }
                });
            }
        }
    }

    /// Rows changed by `change(x, y)`, as `w` takes them; a changed row never leaves the first cache.
    fn input_with(
        &self,
        x: &Buffer,
        w: &Matrix,
        out: &mut Input,
        change: impl Fn(&[f32], &mut [f32]) + Sync,
    ) {
        let kernels = self.kernels;
        let cols = x.cols();
        assert_columns(cols, w);
        out.reshape(w, x.rows());
        match &mut out.kind {
            InputKind::Floats(buffer) => {
                let parts =
                    (buffer.data_mut().chunks_exact_mut(cols)).zip(x.data().chunks_exact(cols));
                self.team.each_part(parts.collect(), |(y, x)| change(x, y));
            }
            InputKind::Quantized(quantized) => {
                let parts = quantized.tiles_mut().zip(x.data().chunks(TILE * cols));
                self.team.each_part(parts.collect(), |(mut tile, x)| {
                    let mut row = vec![0.0; cols];
                    for (r, x) in x.chunks_exact(cols).enumerate() {
                        change(x, &mut row);
                        kernels.quantize(&row, &mut tile, r);
                    }
                });
            }
        }
    }

    /// `y = x w^T`: `[tokens, cols]` to `[tokens, rows]`.
    /// # Panics
    /// When `x` was not made for a matrix like `w`.
    pub fn linear(&self, w: &Matrix, x: &Input, y: &mut Buffer) {
        let kernels = self.kernels;
        assert_columns(x.cols, w);
        y.reshape(x.rows(), w.rows());
        let unit = unit(w);
        let parts = self.split(y, w.rows(), unit);
        self.team
            .each_part(parts, |(rows, y)| multiply(kernels, w, rows, x, y));
    }

    /// `y = up * silu(gate)` with `gate` and `up` the products of the first and of the second half of
    /// the rows of `w`: `[tokens, cols]` to `[tokens, rows / 2]`. The products stay in the cache.
    /// # Panics
    /// When `x` was not made for a matrix like `w`, or `w` has an odd number of rows.
    pub fn gated_linear(&self, w: &Matrix, x: &Input, y: &mut Buffer) {
        let kernels = self.kernels;
        assert_columns(x.cols, w);
        assert!(
            w.rows().is_multiple_of(2),
            "{} rows of gate and up",
            w.rows()
        );
        let (n, inner) = (x.rows(), w.rows() / 2);
        y.reshape(n, inner);
        if !inner.is_multiple_of(unit(w)) {
            // The rows of `up` do not begin with a panel: both at once, then the gate.
            let mut both = Buffer::default();
            self.linear(w, x, &mut both);
            let parts =
                (y.data_mut().chunks_exact_mut(inner)).zip(both.data().chunks_exact(2 * inner));
            self.team.each_part(parts.collect(), |(y, row)| {
                let (gate, up) = row.split_at(inner);
                kernels.silu_mul(gate, up, y);
            });
            return;
        }
        let parts = self.split(y, inner, GATE_ROWS);
        self.team.each_part(parts, |(rows, mut y)| {
            let width = rows.len().min(GATE_ROWS);
            let (mut gate, mut up) = (vec![0.0; n * width], vec![0.0; n * width]);
            for first in rows.clone().step_by(GATE_ROWS) {
                let width = GATE_ROWS.min(rows.end - first);
                let (gate, up) = (&mut gate[..n * width], &mut up[..n * width]);
                let of = |first: usize| first..first + width;
                multiply(kernels, w, of(first), x, ColsMut::new(gate, n, width));
                multiply(kernels, w, of(inner + first), x, ColsMut::new(up, n, width));
                for (t, (gate, up)) in gate
                    .chunks_exact(width)
                    .zip(up.chunks_exact(width))
                    .enumerate()
                {
                    let y = &mut y.row(t)[first - rows.start..][..width];
                    kernels.silu_mul(gate, up, y);
                }
            }
        });
    }

    /// `x += y`
    pub fn add(&self, x: &mut Buffer, y: &Buffer) {
        assert_eq!(
            (x.rows(), x.cols()),
            (y.rows(), y.cols()),
            "shapes of a sum"
        );
        let cols = x.cols();
        let parts = x
            .data_mut()
            .chunks_mut(cols * TILE)
            .zip(y.data().chunks(cols * TILE));
        self.team.each_part(parts.collect(), |(x, y)| {
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        });
    }

    /// Rotates queries and keys of each row of `qkv` in place, row `t` by rotation `t`, and stores keys
    /// and values at positions `first ..` of a layer.
    #[allow(
        clippy::too_many_arguments,
        reason = "one operation, every argument of its own type"
    )]
    pub fn rope_and_store(
        &self,
        qkv: &mut Buffer,
        heads: Heads,
        rotations: &Rotations,
        cache: &mut KvCache,
        layer: usize,
        first: usize,
    ) {
        let kernels = self.kernels;
        let (n, d) = (qkv.rows(), heads.head_dim);
        let group = heads.heads / heads.kv_heads;
        let cols = qkv.cols();
        let whole = ColsMut::new(qkv.data_mut(), n, cols);
        let (queries, rest) = whole.split_at(heads.queries());
        let (keys, values) = rest.split_at(heads.keys());
        let parts = (queries.chunks(group * d).into_iter())
            .zip(keys.chunks(d))
            .zip(values.chunks(d))
            .zip(cache.heads_mut(layer, first..first + n));
        self.team.each_part(
            parts.collect(),
            |(((mut queries, mut keys), mut values), mut head)| {
                for t in 0..n {
                    let (cos, sin) = (rotations.cos.row(t), rotations.sin.row(t));
                    kernels.rope(queries.row(t), cos, sin);
                    kernels.rope(keys.row(t), cos, sin);
                    head.write(first + t, keys.row(t), values.row(t));
                }
            },
        );
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
        let kernels = self.kernels;
        let n = qkv.rows();
        y.reshape(n, heads.queries());
        let group = heads.heads / heads.kv_heads;
        let rows = (QUERY_ROWS / group).max(1);
        let (mut tiles, mut outs) = (Vec::new(), Vec::new());
        for (chunk, y) in y.data_mut().chunks_mut(rows * heads.queries()).enumerate() {
            let count = y.len() / heads.queries();
            let columns = ColsMut::new(y, count, heads.queries()).chunks(group * heads.head_dim);
            for (kv_head, part) in columns.into_iter().enumerate() {
                let from = first + chunk * rows;
                let tile = QueryTile {
                    kv_head,
                    positions: from..from + count,
                };
                tiles.push(tile);
                outs.push(part);
            }
        }
        let layer = LayerCache {
            heads,
            cache,
            layer,
            first,
            mask,
            scale,
        };
        let blocks = |tile: &QueryTile| layer.blocks(tile);
        let longest = tiles.iter().map(|tile| blocks(tile).len()).max();
        if tiles.len() >= 4 * self.team.threads() || longest.unwrap_or(0) < 2 {
            // Long tiles first: the threads end together.
            let parts = tiles.iter().zip(outs).rev().collect();
            self.team.each_part(parts, |(tile, mut out)| {
                SCRATCH.with_borrow_mut(|scratch| {
                    layer.attend(kernels, qkv, tile, blocks(tile), scratch);
                    layer.finish(&scratch.state, &mut out);
                });
            });
            return;
        }
        // Few heads, many threads, a long cache: each block on its own, then merged in their order,
        // which is bit for bit what one thread does with them.
        let mut states = Vec::new();
        for tile in &tiles {
            states.extend(blocks(tile).map(|block| (tile, block, AttentionState::default())));
        }
        let parts = states.iter_mut().collect();
        self.team.each_part(parts, |(tile, block, state)| {
            SCRATCH.with_borrow_mut(|scratch| {
                layer.attend(kernels, qkv, tile, *block..*block + 1, scratch);
                std::mem::swap(&mut scratch.state, state);
            });
        });
        let mut states = states.into_iter();
        for (tile, mut out) in tiles.iter().zip(outs) {
            let of_tile: Vec<_> = states.by_ref().take(blocks(tile).len()).collect();
            let mut merged: Option<AttentionState> = None;
            for (_, _, state) in of_tile {
                match &mut merged {
                    None => merged = Some(state),
                    Some(merged) => merged.merge(kernels, &state),
                }
            }
            if let Some(state) = merged {
                layer.finish(&state, &mut out);
            }
        }
    }

    /// Divides `rows` weight rows, the columns of `y`, in pieces of whole `unit`s.
    fn split<'y>(
        &self,
        y: &'y mut Buffer,
        rows: usize,
        unit: usize,
    ) -> Vec<(Range<usize>, ColsMut<'y>)> {
        let units = rows.div_ceil(unit);
        let pieces = self.team.pieces(units);
        let (n, cols) = (y.rows(), y.cols());
        let mut rest = ColsMut::new(y.data_mut(), n, cols);
        let mut parts = Vec::with_capacity(pieces);
        for i in 0..pieces {
            let at = |i: usize| (units * i / pieces * unit).min(rows);
            let range = at(i)..at(i + 1);
            let (part, right) = rest.split_at(range.len());
            rest = right;
            parts.push((range, part));
        }
        parts
    }
}

/// `y = x w^T` for some rows of `w`, which begin with a panel if it is packed.
fn multiply(kernels: &Kernels, w: &Matrix, rows: Range<usize>, x: &Input, y: ColsMut<'_>) {
    match (w.view(), &x.kind) {
        (MatrixView::Packed(packed), InputKind::Quantized(x)) => {
            let panels = rows.start / PANEL_ROWS..rows.end.div_ceil(PANEL_ROWS);
            kernels.gemm_packed(packed, panels, x, y);
        }
        (MatrixView::Dense(dense), InputKind::Floats(x)) => {
            kernels.gemm_dense(dense, rows, x.data(), y);
        }
        _ => panic!("activations made for a matrix of another kind"),
    }
}

/// Weight rows that must stay together: two panels, which the kernels take at a time.
fn unit(w: &Matrix) -> usize {
    match w.view() {
        MatrixView::Packed(_) => 2 * PANEL_ROWS,
        MatrixView::Dense(_) => PANEL_ROWS,
    }
}

fn assert_columns(cols: usize, w: &Matrix) {
    assert_eq!(
        cols,
        w.cols(),
        "columns of the activations and of the weights"
    );
}

/// Neighbouring tokens whose queries of one KV head are computed together.
struct QueryTile {
    kv_head: usize,
    positions: Range<usize>,
}

/// One layer of the cache, and how it is looked at.
struct LayerCache<'a> {
    heads: Heads,
    cache: &'a KvCache,
    layer: usize,
    /// Position of row 0 of the queries.
    first: usize,
    mask: Mask,
    scale: f32,
}

impl LayerCache<'_> {
    /// The blocks that some query of the tile sees.
    fn blocks(&self, tile: &QueryTile) -> Range<usize> {
        let start = self.mask.visible(tile.positions.start).start;
        start / BLOCK..tile.positions.end.div_ceil(BLOCK)
    }

    /// The state of the tile's queries after `blocks`, in `scratch.state`.
    fn attend(
        &self,
        kernels: &Kernels,
        qkv: &Buffer,
        tile: &QueryTile,
        blocks: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let d = self.heads.head_dim;
        let group = self.heads.heads / self.heads.kv_heads;
        // Queries of the group's heads, token by token: [tokens * group, d].
        scratch.queries.clear();
        for position in tile.positions.clone() {
            let row = qkv.row(position - self.first);
            let queries = &row[tile.kv_head * group * d..][..group * d];
            scratch.queries.extend_from_slice(queries);
        }
        scratch.state.reset(tile.positions.len() * group, d);
        for block in blocks {
            let base = block * BLOCK;
            scratch.visible.clear();
            for position in tile.positions.clone() {
                let seen = self.mask.visible(position);
                let inside = |p: usize| p.clamp(base, base + BLOCK) - base;
                let seen = inside(seen.start)..inside(seen.end);
                scratch.visible.extend(std::iter::repeat_n(seen, group));
            }
            let stored = (tile.positions.end - base).min(BLOCK);
            let (keys, values) = self.cache.block(self.layer, tile.kv_head, block, stored);
            let task = AttentionTask {
                queries: &scratch.queries,
                visible: &scratch.visible,
                keys,
                values,
                scale: self.scale,
            };
            kernels.attend(task, &mut scratch.state);
        }
    }

    /// Writes the attention of a tile's queries.
    fn finish(&self, state: &AttentionState, out: &mut ColsMut<'_>) {
        let d = self.heads.head_dim;
        let group = self.heads.heads / self.heads.kv_heads;
        for t in 0..out.rows() {
            for (g, head) in out.row(t).chunks_exact_mut(d).enumerate() {
                state.finish(t * group + g, head);
            }
        }
    }
}

/// What one attention task works with, kept from task to task.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    visible: Vec<Range<usize>>,
    state: AttentionState,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
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
