//! Rotation, the KV cache and attention.

use super::super::{Heads, Mask, Rotations, Seen, Tokens};
use super::{CpuOps, Input, InputKind, assert_columns};
use crate::kv_cache::{Blocks, HeadMut, KvCache};
use crate::mask::BLOCK;
use crate::tensor::{Buffer, Matrix};
use phidias_kernels::cpu::{AttentionState, AttentionTask, Cached, Kernels, THEN};
use phidias_kernels::view::ColsMut;
use phidias_quant::BLOCK as QUANTIZED;
use phidias_quant::activations::{TILE, TileMut};
use std::cell::RefCell;
use std::ops::Range;

/// Queries that are computed together by one thread, at most: their state stays in the second cache.
const QUERY_ROWS: usize = 64;
/// The same where each head sees other blocks: of its queries alone, as many read a block together.
const HEAD_ROWS: usize = 32;

impl CpuOps<'_> {
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
        let (_, stores) = cache.open(layer, first..first + qkv.rows());
        let parts = heads.divide(qkv.columns_mut()).into_iter().zip(stores);
        self.team
            .each_part(parts.collect(), |(mut columns, mut store)| {
                rotate_and_store(kernels, rotations, first, &mut columns, &mut store);
            });
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
        let layer = LayerCache {
            heads,
            blocks: cache.blocks(layer),
            first,
            mask,
            scale,
        };
        let group = heads.group();
        let (mut tiles, mut outs) = (Vec::new(), Vec::new());
        let (mut rest, mut from) = (y.data_mut(), first);
        while from < first + n {
            let end = tile_end(heads, mask, from).min(first + n);
            let (rows, others) = rest.split_at_mut((end - from) * heads.queries());
            let columns = ColsMut::new(rows, end - from, heads.queries());
            let parts = columns.chunks(group * heads.head_dim);
            for (kv_head, part) in parts.into_iter().enumerate() {
                tiles.push(layer.tile(kv_head, from..end));
                outs.push(part);
            }
            (rest, from) = (others, end);
        }
        let longest = tiles.iter().map(|tile| tile.blocks.len()).max();
        if tiles.len() >= 4 * self.team.threads() || longest.unwrap_or(0) < 2 {
            // Long tiles first: the threads end together.
            let parts = outs.into_iter().enumerate().rev().collect();
            self.team.each_part(parts, |(i, mut out)| {
                let (tile, next) = (&tiles[i], i.checked_sub(1).map(|next| &tiles[next]));
                SCRATCH.with_borrow_mut(|scratch| {
                    layer.load(qkv, tile, scratch);
                    scratch.state.reset(tile.rows(group), heads.head_dim);
                    for (i, &block) in tile.blocks.iter().enumerate() {
                        let then = layer.then(tile, i + 1, next);
                        layer.attend(kernels, tile, block, None, 0, then, scratch);
                    }
                    layer.finish(&scratch.state, &mut out);
                });
            });
            return;
        }
        // Few heads, many threads, a long cache: each block on its own, then merged in their order,
        // which is bit for bit what one thread does with them. Small blocks are taken several at a time.
        let several = BLOCK / mask.block();
        let mut states = Vec::new();
        for tile in &tiles {
            let pieces = tile.blocks.chunks(several).enumerate();
            states.extend(
                pieces.map(|(i, blocks)| (tile, i * several, blocks, AttentionState::default())),
            );
        }
        let parts = states.iter_mut().collect();
        self.team.each_part(parts, |(tile, first, blocks, state)| {
            SCRATCH.with_borrow_mut(|scratch| {
                let rows = tile.rows(group);
                layer.load(qkv, tile, scratch);
                scratch.state.reset(rows * blocks.len(), heads.head_dim);
                for (i, &block) in blocks.iter().enumerate() {
                    let then = layer.then(tile, *first + i + 1, None);
                    layer.attend(kernels, tile, block, None, i * rows, then, scratch);
                }
                std::mem::swap(&mut scratch.state, state);
            });
        });
        let mut states = states.into_iter();
        let mut merged = AttentionState::default();
        for (tile, mut out) in tiles.iter().zip(outs) {
            let rows = tile.rows(group);
            merged.reset(rows, heads.head_dim);
            let pieces = tile.blocks.len().div_ceil(several);
            for (.., blocks, state) in states.by_ref().take(pieces) {
                for i in 0..blocks.len() {
                    merged.merge(kernels, &state, i * rows);
                }
            }
            layer.finish(&merged, &mut out);
        }
    }

    /// [`CpuOps::rope_and_store`], then [`CpuOps::attention`], of which the result is given as `next` takes it; `y` is
    /// to work with.
    /// # Panics
    /// When `next` does not have the columns of the query heads.
    #[allow(
        clippy::too_many_arguments,
        reason = "one operation, every argument of its own type"
    )]
    pub fn attention_input(
        &self,
        qkv: &mut Buffer,
        heads: Heads,
        tokens: &Tokens,
        cache: &mut KvCache,
        seen: Seen,
        next: &Matrix,
        y: &mut Buffer,
        out: &mut Input,
    ) {
        let Seen { layer, mask, scale } = seen;
        let (n, first, rotations) = (qkv.rows(), tokens.first, &tokens.rotations);
        assert_columns(heads.queries(), next);
        if !self.stays_with_its_head(heads, mask, first..first + n) {
            self.rope_and_store(qkv, heads, rotations, cache, layer, first);
            self.attention(qkv, heads, cache, layer, first, mask, scale, y);
            self.input(y, next, out);
            return;
        }
        // A few tokens: what belongs to a KV head is done by one thread at once, and handed out once.
        let kernels = self.kernels;
        let (group, d) = (heads.group(), heads.head_dim);
        let (blocks, stores) = cache.open(layer, first..first + n);
        let layer = LayerCache {
            heads,
            blocks,
            first,
            mask,
            scale,
        };
        out.reshape(next, n);
        let outs: Vec<_> = match &mut out.kind {
            InputKind::Floats(buffer) => {
                let columns = buffer.columns_mut().chunks(group * d);
                columns.into_iter().map(HeadInput::Floats).collect()
            }
            InputKind::Quantized(quantized) => {
                let tiles = quantized.tiles_mut();
                let pieces = tiles.flat_map(|tile| tile.pieces(group * d / QUANTIZED));
                pieces.map(HeadInput::Quantized).collect()
            }
        };
        let parts = (heads.divide(qkv.columns_mut()).into_iter())
            .zip(stores)
            .zip(outs)
            .enumerate();
        self.team.each_part(
            parts.collect(),
            |(kv_head, ((mut columns, mut store), out))| {
                rotate_and_store(kernels, rotations, first, &mut columns, &mut store);
                let tile = layer.tile(kv_head, first..first + n);
                let another = kv_head + 1 < heads.kv_heads && !mask.differs_by_head();
                let next = another.then(|| layer.tile(kv_head + 1, first..first + n));
                SCRATCH.with_borrow_mut(|scratch| {
                    let [queries, ..] = &mut columns;
                    scratch.queries.clear();
                    for g in 0..group {
                        for t in 0..n {
                            let head = &queries.row(t)[g * d..][..d];
                            scratch.queries.extend_from_slice(head);
                        }
                    }
                    scratch.state.reset(tile.rows(group), d);
                    for (i, &block) in tile.blocks.iter().enumerate() {
                        let then = layer.then(&tile, i + 1, next.as_ref());
                        layer.attend(kernels, &tile, block, Some(&store), 0, then, scratch);
                    }
                    match out {
                        HeadInput::Floats(mut out) => layer.finish(&scratch.state, &mut out),
                        HeadInput::Quantized(mut tile) => {
                            let row = &mut scratch.row;
                            row.resize(group * d, 0.0);
                            for t in 0..n {
                                for (g, head) in row.chunks_exact_mut(d).enumerate() {
                                    scratch.state.finish(g * n + t, head);
                                }
                                kernels.quantize(row, &mut tile, t);
                            }
                        }
                    }
                });
            },
        );
    }

    /// Whether one thread had better do all that belongs to a KV head and these few tokens: when they are one
    /// tile of queries and of activations, and there are heads enough for all threads or little to read.
    fn stays_with_its_head(&self, heads: Heads, mask: Mask, positions: Range<usize>) -> bool {
        let rows = heads.group() * heads.head_dim;
        let blocks = mask.blocks(0..heads.heads, positions.clone()).count();
        positions.len() <= TILE
            && rows.is_multiple_of(QUANTIZED)
            && tile_end(heads, mask, positions.start) >= positions.end
            && (heads.kv_heads >= 4 * self.team.threads() || blocks < 2)
    }
}

/// A part of the input of the next matrix: what the queries of a KV head give.
enum HeadInput<'i> {
    Floats(ColsMut<'i>),
    Quantized(TileMut<'i>),
}

/// Rotates what the heads of one KV head have in the rows of tokens, the first at position `first`, and stores
/// keys and values.
fn rotate_and_store(
    kernels: &Kernels,
    rotations: &Rotations,
    first: usize,
    [queries, keys, values]: &mut [ColsMut<'_>; 3],
    store: &mut HeadMut<'_>,
) {
    for t in 0..queries.rows() {
        let (cos, sin) = (rotations.cos.row(t), rotations.sin.row(t));
        kernels.rope(queries.row(t), cos, sin);
        kernels.rope(keys.row(t), cos, sin);
        store.write(first + t, keys.row(t), values.row(t));
    }
}

/// Where the tile of queries that begins at position `from` ends. Where blocks of the mask matter, it lies in one.
fn tile_end(heads: Heads, mask: Mask, from: usize) -> usize {
    if mask.differs_by_head() {
        let rows = HEAD_ROWS.min(mask.block());
        (from / rows + 1) * rows
    } else {
        from + (QUERY_ROWS / heads.group()).max(1)
    }
}

/// Neighbouring tokens whose queries of one KV head are computed together.
struct QueryTile {
    kv_head: usize,
    positions: Range<usize>,
    /// The blocks of which one of the queries sees something, ascending.
    blocks: Vec<usize>,
}

impl QueryTile {
    /// Its queries, head by head: `[group, tokens]`.
    fn rows(&self, group: usize) -> usize {
        self.positions.len() * group
    }
}

/// One layer of the cache, and how it is looked at.
struct LayerCache<'a> {
    heads: Heads,
    /// Those that no thread writes.
    blocks: Blocks<'a>,
    /// Position of row 0 of the queries.
    first: usize,
    mask: Mask,
    scale: f32,
}

impl LayerCache<'_> {
    /// The query heads of a KV head.
    fn group_of(&self, kv_head: usize) -> Range<usize> {
        let group = self.heads.group();
        kv_head * group..(kv_head + 1) * group
    }

    fn tile(&self, kv_head: usize, positions: Range<usize>) -> QueryTile {
        let blocks = (self.mask).blocks(self.group_of(kv_head), positions.clone());
        QueryTile {
            kv_head,
            blocks: blocks.collect(),
            positions,
        }
    }

    /// The queries of a tile head by head: `[group, tokens, head_dim]`.
    fn load(&self, qkv: &Buffer, tile: &QueryTile, scratch: &mut Scratch) {
        let d = self.heads.head_dim;
        scratch.queries.clear();
        for g in 0..self.heads.group() {
            for position in tile.positions.clone() {
                let row = qkv.row(position - self.first);
                let [queries, _, _] = self.heads.of(tile.kv_head, row);
                scratch.queries.extend_from_slice(&queries[g * d..][..d]);
            }
        }
    }

    /// Positions of a block that the tile's queries can see.
    fn positions(&self, tile: &QueryTile, block: usize) -> usize {
        let size = self.mask.block();
        (tile.positions.end - block * size).min(size)
    }

    /// What of it is in a block that no thread writes.
    fn stored(&self, tile: &QueryTile, block: usize) -> Option<[Cached<'_>; 2]> {
        let held = self.blocks.has(block);
        held.then(|| (self.blocks).block(tile.kv_head, block, self.positions(tile, block)))
    }

    /// What is read when block `i` of the tile is next, and after its last one the tile `next`.
    fn then(&self, tile: &QueryTile, i: usize, next: Option<&QueryTile>) -> [Cached<'_>; THEN] {
        let own = tile.blocks[i..].iter().map(|block| (tile, block));
        let others = (next.into_iter()).flat_map(|next| next.blocks.iter().map(move |b| (next, b)));
        let read = own
            .chain(others)
            .filter_map(|(tile, block)| self.stored(tile, *block))
            .flatten();
        let mut then = [Cached::default(); THEN];
        for (then, read) in then.iter_mut().zip(read) {
            *then = read;
        }
        then
    }

    /// Adds a block to the state of the tile's queries, which begin at row `first` of `scratch.state`. It is read
    /// from `own` when it is not one of those that no thread writes. Heads that see nothing of it are left out.
    #[allow(
        clippy::too_many_arguments,
        reason = "what is read, by whom, and where it goes"
    )]
    fn attend(
        &self,
        kernels: &Kernels,
        tile: &QueryTile,
        block: usize,
        own: Option<&HeadMut<'_>>,
        first: usize,
        then: [Cached<'_>; THEN],
        scratch: &mut Scratch,
    ) {
        let d = self.heads.head_dim;
        let base = block * self.mask.block();
        let [keys, values] = (self.stored(tile, block))
            .or_else(|| Some(own?.block(block, self.positions(tile, block))))
            .expect("a block that is held, or written by this thread");
        let visible = &mut scratch.visible;
        visible.clear();
        for head in self.group_of(tile.kv_head) {
            for position in tile.positions.clone() {
                let seen = self.mask.seen(head, position, block);
                visible.push(seen.start - base..seen.end - base);
            }
        }
        let tokens = tile.positions.len();
        let sees = |head: usize| {
            visible[head * tokens..][..tokens]
                .iter()
                .any(|r| !r.is_empty())
        };
        // Neighbouring heads that see it go together.
        let mut head = 0;
        while head < self.heads.group() {
            let end = (head..self.heads.group()).find(|h| !sees(*h));
            let end = end.unwrap_or(self.heads.group());
            let rows = head * tokens..end * tokens;
            if !rows.is_empty() {
                let task = AttentionTask {
                    first: first + rows.start,
                    queries: &scratch.queries[rows.start * d..rows.end * d],
                    visible: &visible[rows],
                    keys,
                    values,
                    scale: self.scale,
                    then,
                };
                kernels.attend(task, &mut scratch.state);
            }
            head = end + 1;
        }
    }

    /// Writes the attention of a tile's queries.
    fn finish(&self, state: &AttentionState, out: &mut ColsMut<'_>) {
        let tokens = out.rows();
        for t in 0..tokens {
            let row = out.row(t).chunks_exact_mut(self.heads.head_dim);
            for (g, head) in row.enumerate() {
                state.finish(g * tokens + t, head);
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
    /// What a token's queries give.
    row: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[cfg(test)]
mod tests {
    use super::super::tests::{buffer, matrix, packed};
    use super::*;
    use crate::backend::{Cpu, HeadOrder};
    use crate::kv_cache::{KvShape, KvType};
    use crate::mask::BlockSparse;
    use crate::pool::Pool;
    use crate::tensor::Linear;
    use std::sync::Arc;

    const GROUP: usize = 2;
    const KV_HEADS: usize = 2;

    /// What the tokens of a pass after `first` others give, times `next`; `at_once` or step by step.
    fn attended(
        (d, mask, kind): (usize, Mask, KvType),
        (first, n): (usize, usize),
        next: &Linear,
        threads: usize,
        at_once: bool,
    ) -> Buffer {
        let heads = Heads {
            heads: GROUP * KV_HEADS,
            kv_heads: KV_HEADS,
            head_dim: d,
            order: HeadOrder::Parts,
        };
        let shape = KvShape {
            layers: vec![mask],
            heads: heads.heads,
            kv_heads: KV_HEADS,
            head_dim: d,
        };
        let mut cache = KvCache::new(shape, kind);
        cache.reserve(first + n).unwrap();
        let width = heads.queries() + 2 * heads.keys();
        let rotations = |rows| Rotations {
            cos: buffer(rows, d / 2, 5),
            sin: buffer(rows, d / 2, 6),
        };
        let cpu = Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(threads)).unwrap()));
        let (mut y, mut input, mut out) = (Buffer::default(), Input::default(), Buffer::default());
        cpu.enter(|ops| {
            if first > 0 {
                let mut before = buffer(first, width, 1);
                let rotations = rotations(first);
                ops.rope_and_store(&mut before, heads, &rotations, &mut cache, 0, 0);
            }
            let mut qkv = buffer(n, width, 2);
            let tokens = Tokens {
                ids: vec![0; n],
                first,
                rotations: rotations(n),
            };
            let (layer, scale, w) = (0, 0.3, &next.weight);
            let seen = Seen { layer, mask, scale };
            if at_once {
                let (qkv, cache) = (&mut qkv, &mut cache);
                ops.attention_input(qkv, heads, &tokens, cache, seen, w, &mut y, &mut input);
            } else {
                ops.rope_and_store(&mut qkv, heads, &tokens.rotations, &mut cache, 0, first);
                ops.attention(&qkv, heads, &cache, 0, first, mask, scale, &mut y);
                ops.input(&y, w, &mut input);
            }
            ops.linear(next, &input, &mut out);
        });
        out
    }

    /// What one thread does with a KV head at once, and what threads share, is what the steps give, bit for
    /// bit: inside a block and across the border of two, where heads have whole blocks of 32 and where not.
    #[test]
    fn a_head_at_once_is_step_by_step() {
        let sparse = Mask::BlockSparse(BlockSparse {
            block: 64,
            local_blocks: 2,
            vert_stride: 3,
            head_step: 1,
        });
        let window = Mask::Causal { window: Some(40) };
        for d in [16, 20, 48] {
            for next in [matrix(7, 4 * d, 3), packed(32, 4 * d, 3)] {
                for (mask, kind) in [
                    (Mask::CAUSAL, KvType::F32),
                    (Mask::CAUSAL, KvType::F16),
                    (Mask::CAUSAL, KvType::Int8),
                    (window, KvType::F16),
                    (sparse, KvType::F16),
                    (sparse, KvType::Int8),
                ] {
                    for place in [
                        (0, 1),
                        (0, 8),
                        (63, 3),
                        (200, 1),
                        (254, 5),
                        (300, 2),
                        (300, 9),
                    ] {
                        let of = (d, mask, kind);
                        let want = attended(of, place, &next, 1, false);
                        assert!(want.data().iter().all(|v| v.is_finite()));
                        for threads in [1, 2, 5] {
                            let found = attended(of, place, &next, threads, true);
                            assert_eq!(found.data(), want.data(), "{of:?} {place:?} {threads}");
                        }
                    }
                }
            }
        }
    }
}
