//! Rotation, the KV cache and attention.

use super::Ops;
use crate::kv_cache::{BLOCK, KvCache};
use crate::tensor::Buffer;
use phidias_kernels::cpu::{AttentionState, AttentionTask, Kernels};
use phidias_kernels::view::ColsMut;
use std::cell::RefCell;
use std::ops::Range;

/// Rows `[tokens, heads]` of rotations: cosine and sine of each position.
#[derive(Clone, Debug, Default)]
pub struct Rotations {
    /// `[positions, head_dim / 2]`
    pub cos: Buffer,
    /// `[positions, head_dim / 2]`
    pub sin: Buffer,
}

/// How the heads lie in a row of the projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadOrder {
    /// All queries, all keys, all values.
    Parts,
    /// For each KV head its queries, its key, its value.
    Groups,
}

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How they lie in a row of the projection.
    pub order: HeadOrder,
}

impl Heads {
    /// Query heads of one KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    /// Columns of the projection: queries, keys and values.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.queries() + 2 * self.keys()
    }
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
    /// Queries, key and value of each KV head in rows of the projection.
    fn divide<'a>(&self, rows: ColsMut<'a>) -> Vec<[ColsMut<'a>; 3]> {
        let (d, group) = (self.head_dim, self.group());
        match self.order {
            HeadOrder::Parts => {
                let (queries, rest) = rows.split_at(self.queries());
                let (keys, values) = rest.split_at(self.keys());
                let parts = (queries.chunks(group * d).into_iter())
                    .zip(keys.chunks(d))
                    .zip(values.chunks(d));
                parts.map(|((q, k), v)| [q, k, v]).collect()
            }
            HeadOrder::Groups => (rows.chunks((group + 2) * d).into_iter())
                .map(|part| {
                    let (queries, rest) = part.split_at(group * d);
                    let (key, value) = rest.split_at(d);
                    [queries, key, value]
                })
                .collect(),
        }
    }

    /// The queries of a KV head in a row of the projection.
    fn queries_of<'a>(&self, kv_head: usize, row: &'a [f32]) -> &'a [f32] {
        let (d, group) = (self.head_dim, self.group());
        let stride = match self.order {
            HeadOrder::Parts => group * d,
            HeadOrder::Groups => (group + 2) * d,
        };
        &row[kv_head * stride..][..group * d]
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

impl Ops<'_> {
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
        let n = qkv.rows();
        let parts = (heads.divide(qkv.columns_mut()).into_iter())
            .zip(cache.heads_mut(layer, first..first + n));
        self.team.each_part(
            parts.collect(),
            |([mut queries, mut keys, mut values], mut head)| {
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
        let group = heads.group();
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
        let group = self.heads.group();
        // Queries of the group's heads, token by token: [tokens * group, d].
        scratch.queries.clear();
        for position in tile.positions.clone() {
            let row = qkv.row(position - self.first);
            let queries = self.heads.queries_of(tile.kv_head, row);
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
        let group = self.heads.group();
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
