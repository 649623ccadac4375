//! The KV cache: keys and values of every position, layer and head, growing on demand.
//!
//! ```text
//! layer -> block of positions -> part -> keys   [heads][panels][head_dim][16 positions]
//!                                        values [heads][positions][head_dim]
//!                            bytes:      keys   [heads][panels][head_dim / 2][16 positions][2]
//!                                        values [heads][positions / 2][head_dim][2]
//! ```
//!
//! A block has 256 positions, or as many as the layer's mask has in one. A part is what some KV heads
//! have in it: all of them where all see the same keys, else one, so that it can be dropped when no
//! later query of its heads sees it.
//!
//! Keys and values of one head lie side by side, so reading them runs at the full bandwidth, and
//! sixteen keys are the lanes of a register (see the attention kernels). Blocks are
//! never moved once taken, so growing copies nothing; and blocks begin at fixed positions, so
//! attention merges the same ranges in the same order whatever was allocated.

use crate::huge::HugeBox;
use crate::mask::Mask;
use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use phidias_kernels::cpu::{Cached, KEY_PANEL};
use phidias_kernels::view::Elements;
use phidias_quant::{bf16, f16};
use smallvec::SmallVec;
use std::ops::Range;

/// What keys and values are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// Exact; for comparison with a reference.
    F32,
    /// Half precision.
    F16,
    /// The upper half of f32.
    Bf16,
    /// Signed bytes, one f32 step for each key and each value: `amax / 127`.
    Int8,
}

impl KvType {
    /// Every type there is.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Int8];

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of a key and its value of one head.
    #[must_use]
    pub fn bytes_per_key(self, head_dim: usize) -> usize {
        2 * self.row_bytes(head_dim)
    }

    /// Bytes of one key or value of one head.
    fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 | Self::Bf16 => 2 * head_dim,
            Self::Int8 => head_dim + size_of::<f32>(),
        }
    }
}

/// What is fixed by the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Which keys the queries of each layer see.
    pub layers: Vec<Mask>,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head, an even number.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one position in every layer.
    #[must_use]
    pub fn bytes_per_position(&self, kind: KvType) -> usize {
        self.layers.len() * self.kv_heads * kind.bytes_per_key(self.head_dim)
    }

    /// Bytes of `positions` positions, whole blocks.
    #[must_use]
    pub fn bytes(&self, kind: KvType, positions: usize) -> usize {
        let of = |mask: &Mask| {
            (self.kv_heads * kind.bytes_per_key(self.head_dim))
                .saturating_mul(positions.next_multiple_of(mask.block()))
        };
        self.layers.iter().map(of).fold(0, usize::saturating_add)
    }

    /// Bytes of the blocks before position `next` that no query at it or later sees.
    #[must_use]
    pub fn hidden_bytes(&self, kind: KvType, next: usize) -> usize {
        let of = |mask: &Mask| {
            let heads = (0..self.parts(mask)).map(|part| self.heads_of(mask, part));
            let hidden = |heads: Range<usize>| {
                let blocks = 0..mask.settled(next);
                blocks.filter(|b| !mask.keeps(heads.clone(), *b)).count()
            };
            heads.map(hidden).sum::<usize>() * self.part_bytes(mask, kind)
        };
        self.layers.iter().map(of).fold(0, usize::saturating_add)
    }

    /// Into how many parts the KV heads of a block are divided.
    fn parts(&self, mask: &Mask) -> usize {
        if mask.differs_by_head() {
            self.kv_heads
        } else {
            1
        }
    }

    /// KV heads in a part.
    fn part_heads(&self, mask: &Mask) -> usize {
        self.kv_heads / self.parts(mask)
    }

    /// Query heads that look at a part.
    fn heads_of(&self, mask: &Mask, part: usize) -> Range<usize> {
        let count = self.part_heads(mask) * (self.heads / self.kv_heads);
        part * count..(part + 1) * count
    }

    /// Blocks of a layer with that mask, to be read.
    fn blocks<'a>(&self, mask: &Mask, blocks: &'a [Vec<Option<Part>>]) -> Blocks<'a> {
        Blocks {
            blocks,
            rows: mask.block(),
            heads: self.part_heads(mask),
            head_dim: self.head_dim,
        }
    }

    /// Bytes of a part.
    fn part_bytes(&self, mask: &Mask, kind: KvType) -> usize {
        self.part_heads(mask) * mask.block() * kind.bytes_per_key(self.head_dim)
    }
}

/// The allocator refused a block.
#[derive(Debug, thiserror::Error)]
#[error("out of memory: the KV cache needs {bytes} bytes more to hold {positions} positions")]
pub struct KvOutOfMemory {
    /// Bytes asked for.
    pub bytes: usize,
    /// Positions that were to fit.
    pub positions: usize,
}

/// How the elements of rows lie in what a head has in a block.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// `[panels][head_dim][16]`, bytes `[panels][head_dim / 2][16][2]`
    Keys,
    /// `[positions][head_dim]`, bytes `[positions / 2][head_dim][2]`
    Values,
}

/// Where a row lies: in runs of neighbouring elements.
#[derive(Clone, Copy, Debug)]
struct Place {
    first: usize,
    /// 1, 2 or the whole row.
    run: usize,
    /// From one run to the next.
    step: usize,
}

impl Order {
    /// Where row `r` lies among `elements`.
    fn place(self, r: usize, head_dim: usize, elements: Width) -> Place {
        let panel = r / KEY_PANEL * KEY_PANEL * head_dim;
        let (first, run, step) = match (self, elements) {
            (Self::Keys, Width::Floats) => (panel + r % KEY_PANEL, 1, KEY_PANEL),
            (Self::Keys, Width::Bytes) => (panel + 2 * (r % KEY_PANEL), 2, 2 * KEY_PANEL),
            (Self::Values, Width::Floats) => (r * head_dim, head_dim, head_dim),
            (Self::Values, Width::Bytes) => (r / 2 * 2 * head_dim + r % 2, 1, 2),
        };
        Place { first, run, step }
    }
}

/// What elements are, as far as their places depend on it.
#[derive(Clone, Copy, Debug)]
enum Width {
    Floats,
    Bytes,
}

impl Place {
    /// Of element `i` of the row.
    fn at(self, i: usize) -> usize {
        self.first + i / self.run * self.step + i % self.run
    }
}

/// Keys or values of some heads in a block.
#[derive(Debug)]
enum Store {
    F32(HugeBox<f32>),
    F16(HugeBox<f16>),
    Bf16(HugeBox<bf16>),
    /// And the steps, `[heads][positions]`.
    Int8(HugeBox<i8>, HugeBox<f32>),
}

/// The part of a [`Store`] that belongs to one head.
#[derive(Debug)]
enum HeadStore<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
    Int8(&'a mut [i8], &'a mut [f32]),
}

/// A head that fits on the stack while it is narrowed; longer ones go in pieces.
const PIECE: usize = 256;

impl HeadStore<'_> {
    /// Stores one row.
    fn write(&mut self, order: Order, r: usize, row: &[f32]) {
        fn put<T: Copy + Default>(
            out: &mut [T],
            place: Place,
            row: &[f32],
            narrow: impl Fn(&mut [T], &[f32]),
        ) {
            let mut piece = [T::default(); PIECE];
            for (i, row) in row.chunks(PIECE).enumerate() {
                let piece = &mut piece[..row.len()];
                narrow(piece, row);
                let out = &mut out[place.at(i * PIECE)..];
                match place.run {
                    1 => {
                        let out = out.iter_mut().step_by(place.step);
                        out.zip(piece).for_each(|(o, v)| *o = *v);
                    }
                    2 => {
                        let out = out.chunks_mut(place.step);
                        let pairs = piece.as_chunks::<2>().0;
                        out.zip(pairs).for_each(|(o, v)| o[..2].copy_from_slice(v));
                    }
                    _ => out[..piece.len()].copy_from_slice(piece),
                }
            }
        }
        let width = match self {
            Self::Int8(..) => Width::Bytes,
            _ => Width::Floats,
        };
        let place = order.place(r, row.len(), width);
        match self {
            Self::F32(s) => put(s, place, row, |o, v| o.copy_from_slice(v)),
            Self::F16(s) => put(s, place, row, |o, v| o.convert_from_f32_slice(v)),
            Self::Bf16(s) => put(s, place, row, |o, v| o.convert_from_f32_slice(v)),
            Self::Int8(s, steps) => {
                let amax = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let finite = row.iter().all(|v| v.is_finite());
                // What is not finite must not pass unseen; a subnormal step would divide to infinity.
                let step = match finite {
                    true if amax > 127.0 * f32::MIN_POSITIVE => amax / 127.0,
                    true => 0.0,
                    false => f32::NAN,
                };
                let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
                steps[r] = step;
                put(s, place, row, |o, v| {
                    for (o, v) in o.iter_mut().zip(v) {
                        *o = phidias_quant::round((v * inverse).clamp(-127.0, 127.0)) as i8;
                    }
                });
            }
        }
    }

    /// All of it.
    fn cached(&self) -> Cached<'_> {
        match self {
            Self::F32(s) => Cached::Floats(Elements::F32(s)),
            Self::F16(s) => Cached::Floats(Elements::F16(s)),
            Self::Bf16(s) => Cached::Floats(Elements::Bf16(s)),
            Self::Int8(quants, steps) => Cached::I8 { quants, steps },
        }
    }
}

/// `elements` and the steps of `rows` of what is cached, from its row `first` on.
fn rows(
    cached: Cached<'_>,
    first: usize,
    head_dim: usize,
    elements: usize,
    rows: usize,
) -> Cached<'_> {
    let range = first * head_dim..first * head_dim + elements;
    match cached {
        Cached::Floats(floats) => Cached::Floats(floats.slice(range)),
        Cached::I8 { quants, steps } => Cached::I8 {
            quants: &quants[range],
            steps: &steps[first..][..rows],
        },
    }
}

/// Of keys and values that begin with row `first`, the first `positions`: keys in whole panels, values of bytes
/// in whole pairs, laid out as the head of the module says.
fn positions<'c>(
    [keys, values]: [Cached<'c>; 2],
    first: usize,
    head_dim: usize,
    positions: usize,
) -> [Cached<'c>; 2] {
    let padded = positions.next_multiple_of(KEY_PANEL);
    let pairs = match values {
        Cached::I8 { .. } => positions.next_multiple_of(2),
        Cached::Floats(_) => positions,
    };
    [
        rows(keys, first, head_dim, padded * head_dim, padded),
        rows(values, first, head_dim, pairs * head_dim, padded),
    ]
}

/// Reads one row back.
fn read(head: Cached<'_>, order: Order, r: usize, row: &mut [f32]) {
    let width = match head {
        Cached::I8 { .. } => Width::Bytes,
        Cached::Floats(_) => Width::Floats,
    };
    let place = order.place(r, row.len(), width);
    for (i, v) in row.iter_mut().enumerate() {
        let at = place.at(i);
        *v = match head {
            Cached::Floats(Elements::F32(s)) => s[at],
            Cached::Floats(Elements::F16(s)) => s[at].to_f32(),
            Cached::Floats(Elements::Bf16(s)) => s[at].to_f32(),
            Cached::I8 { quants, steps } => f32::from(quants[at]) * steps[r],
        };
    }
}

impl Store {
    /// Zeros for `rows` keys or values of `head_dim`; `None` when the memory is refused.
    fn new(kind: KvType, rows: Option<usize>, head_dim: usize) -> Option<Self> {
        fn zeroed<T: Pod>(len: usize) -> Option<HugeBox<T>> {
            HugeBox::zeroed(len).ok()
        }
        let rows = rows?;
        let len = rows.checked_mul(head_dim)?;
        Some(match kind {
            KvType::F32 => Self::F32(zeroed(len)?),
            KvType::F16 => Self::F16(zeroed(len)?),
            KvType::Bf16 => Self::Bf16(zeroed(len)?),
            KvType::Int8 => Self::Int8(zeroed(len)?, zeroed(rows)?),
        })
    }

    /// All of it.
    fn cached(&self) -> Cached<'_> {
        match self {
            Self::F32(s) => Cached::Floats(Elements::F32(s)),
            Self::F16(s) => Cached::Floats(Elements::F16(s)),
            Self::Bf16(s) => Cached::Floats(Elements::Bf16(s)),
            Self::Int8(quants, steps) => Cached::I8 { quants, steps },
        }
    }

    /// The heads, of `rows` rows each, one after the other.
    fn heads(&mut self, head_dim: usize, rows: usize) -> Vec<HeadStore<'_>> {
        let len = rows * head_dim;
        match self {
            Self::F32(s) => s.chunks_mut(len).map(HeadStore::F32).collect(),
            Self::F16(s) => s.chunks_mut(len).map(HeadStore::F16).collect(),
            Self::Bf16(s) => s.chunks_mut(len).map(HeadStore::Bf16).collect(),
            Self::Int8(s, steps) => (s.chunks_mut(len))
                .zip(steps.chunks_mut(rows))
                .map(|(s, steps)| HeadStore::Int8(s, steps))
                .collect(),
        }
    }
}

/// Keys and values of some heads in a block.
#[derive(Debug)]
struct Part {
    keys: Store,
    values: Store,
}

/// The blocks of a layer.
#[derive(Debug)]
struct Layer {
    mask: Mask,
    /// `[blocks][parts]`, `None` for what was dropped.
    blocks: Vec<Vec<Option<Part>>>,
    /// In the blocks before this one, what no later query sees was dropped.
    settled: usize,
}

impl Layer {
    /// Whether something was dropped that the queries from `next` on see.
    fn lacks(&self, next: usize) -> bool {
        let open = self.mask.settled(next).min(self.settled)..self.settled;
        self.blocks[open].iter().flatten().any(Option::is_none)
    }
}

const HELD: &str = "no query sees what was dropped";

/// One head of one layer, to be written at some positions.
#[derive(Debug)]
pub struct HeadMut<'a> {
    /// Positions in a block.
    block: usize,
    head_dim: usize,
    /// The block of `blocks[0]`.
    first: usize,
    /// keys, values; a token, and mostly a few, lie in one block.
    blocks: SmallVec<[(HeadStore<'a>, HeadStore<'a>); 1]>,
}

impl HeadMut<'_> {
    /// Stores key and value, `[head_dim]` each, of a position that the head was taken for.
    pub fn write(&mut self, position: usize, key: &[f32], value: &[f32]) {
        let (keys, values) = &mut self.blocks[position / self.block - self.first];
        keys.write(Order::Keys, position % self.block, key);
        values.write(Order::Values, position % self.block, value);
    }

    /// [`Blocks::block`] of a block that the head was taken for.
    #[must_use]
    pub fn block(&self, block: usize, count: usize) -> [Cached<'_>; 2] {
        let (keys, values) = &self.blocks[block - self.first];
        positions([keys.cached(), values.cached()], 0, self.head_dim, count)
    }
}

/// Blocks of one layer, to be read: the first ones, or all.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    blocks: &'a [Vec<Option<Part>>],
    /// Positions in a block.
    rows: usize,
    /// KV heads in a part.
    heads: usize,
    head_dim: usize,
}

impl<'a> Blocks<'a> {
    /// Whether block `block` is one of them.
    #[must_use]
    pub fn has(&self, block: usize) -> bool {
        block < self.blocks.len()
    }

    /// Keys and values of a block and head: the first `count` positions of it, keys in whole panels, values of
    /// bytes in whole pairs, laid out as the head of the module says.
    #[must_use]
    pub fn block(&self, head: usize, block: usize, count: usize) -> [Cached<'a>; 2] {
        let part = self.blocks[block][head / self.heads].as_ref().expect(HELD);
        let first = head % self.heads * self.rows;
        let all = [part.keys.cached(), part.values.cached()];
        positions(all, first, self.head_dim, count)
    }
}

/// Keys and values of one sequence.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    kind: KvType,
    layers: Vec<Layer>,
    len: usize,
}

impl KvCache {
    /// An empty cache; memory is taken by [`KvCache::reserve`].
    /// # Panics
    /// When a head has an odd number of elements.
    #[must_use]
    pub fn new(shape: KvShape, kind: KvType) -> Self {
        let d = shape.head_dim;
        assert!(d.is_multiple_of(2), "heads of {d} elements are not even");
        let layer = |mask: &Mask| Layer {
            mask: *mask,
            blocks: Vec::new(),
            settled: 0,
        };
        Self {
            layers: shape.layers.iter().map(layer).collect(),
            shape,
            kind,
            len: 0,
        }
    }

    /// The sizes fixed by the model.
    #[must_use]
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// What it stores.
    #[must_use]
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Positions that are complete in every layer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.count_bytes(Option::is_some)
    }

    /// Bytes that were given back because no later query sees them.
    #[must_use]
    pub fn dropped_bytes(&self) -> usize {
        self.count_bytes(Option::is_none)
    }

    fn count_bytes(&self, counts: impl Fn(&Option<Part>) -> bool) -> usize {
        let of = |layer: &Layer| {
            let parts = layer.blocks.iter().flatten();
            parts.filter(|part| counts(part)).count()
                * self.shape.part_bytes(&layer.mask, self.kind)
        };
        self.layers.iter().map(of).sum()
    }

    /// Takes memory for `positions` positions in all.
    /// # Errors
    /// [`KvOutOfMemory`]; what was there stays usable.
    pub fn reserve(&mut self, positions: usize) -> Result<(), KvOutOfMemory> {
        let (shape, kind) = (&self.shape, self.kind);
        let mut refused = false;
        for layer in &mut self.layers {
            let mask = layer.mask;
            let rows = shape.part_heads(&mask).checked_mul(mask.block());
            let part = || {
                Some(Part {
                    keys: Store::new(kind, rows, shape.head_dim)?,
                    values: Store::new(kind, rows, shape.head_dim)?,
                })
            };
            while layer.blocks.len() < positions.div_ceil(mask.block()) && !refused {
                let parts = (0..shape.parts(&mask)).map(|_| part().map(Some));
                match parts.collect() {
                    Some(parts) => layer.blocks.push(parts),
                    None => refused = true,
                }
            }
        }
        if refused {
            let bytes = self.shape.bytes(kind, positions);
            return Err(KvOutOfMemory {
                bytes: bytes.saturating_sub(self.bytes() + self.dropped_bytes()),
                positions,
            });
        }
        Ok(())
    }

    /// Gives back what no query at position `next` or later sees.
    pub fn drop_hidden(&mut self, next: usize) {
        for layer in &mut self.layers {
            let settled = layer.mask.settled(next).min(layer.blocks.len());
            for block in layer.settled..settled {
                for (i, part) in layer.blocks[block].iter_mut().enumerate() {
                    if !(layer.mask).keeps(self.shape.heads_of(&layer.mask, i), block) {
                        *part = None;
                    }
                }
            }
            layer.settled = layer.settled.max(settled);
        }
    }

    /// The blocks of one layer.
    #[must_use]
    pub fn blocks(&self, layer: usize) -> Blocks<'_> {
        let Layer { mask, blocks, .. } = &self.layers[layer];
        self.shape.blocks(mask, blocks)
    }

    /// One layer, to be written at `positions`, which must have been reserved: the blocks before theirs, and
    /// each head with its part of theirs.
    pub fn open(
        &mut self,
        layer: usize,
        positions: Range<usize>,
    ) -> (Blocks<'_>, Vec<HeadMut<'_>>) {
        let Layer { mask, blocks, .. } = &mut self.layers[layer];
        let (d, rows) = (self.shape.head_dim, mask.block());
        let (first, end) = (positions.start / rows, positions.end.div_ceil(rows));
        let (earlier, rest) = blocks.split_at_mut(first);
        let mut heads: Vec<_> = (0..self.shape.kv_heads)
            .map(|_| HeadMut {
                block: rows,
                head_dim: d,
                first,
                blocks: SmallVec::new(),
            })
            .collect();
        for block in &mut rest[..end - first] {
            let mut heads = heads.iter_mut();
            for part in block {
                let Part { keys, values } = part.as_mut().expect(HELD);
                let pairs = (keys.heads(d, rows).into_iter()).zip(values.heads(d, rows));
                for (pair, head) in pairs.zip(&mut heads) {
                    head.blocks.push(pair);
                }
            }
        }
        (self.shape.blocks(mask, earlier), heads)
    }

    /// All positions up to `len` are complete in every layer now.
    pub fn set_len(&mut self, len: usize) {
        debug_assert!(
            (self.layers.iter()).all(|l| len <= l.blocks.len() * l.mask.block()),
            "reserved"
        );
        self.len = len;
    }

    /// Key and value of one position as f32, `[head_dim]` each.
    #[must_use]
    pub fn read(&self, layer: usize, head: usize, position: usize) -> (Vec<f32>, Vec<f32>) {
        let size = self.shape.layers[layer].block();
        let (block, r) = (position / size, position % size);
        let [keys, values] = self.blocks(layer).block(head, block, r + 1);
        let d = self.shape.head_dim;
        let (mut key, mut value) = (vec![0.0; d], vec![0.0; d]);
        read(keys, Order::Keys, r, &mut key);
        read(values, Order::Values, r, &mut value);
        (key, value)
    }

    /// Forgets the positions from `len` on, or all of them where the next query would see what was dropped;
    /// the memory of the others stays for the next ones.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        if self.layers.iter().any(|layer| layer.lacks(self.len)) {
            self.len = 0;
        }
        for layer in &mut self.layers {
            if layer.lacks(self.len) {
                layer.blocks.clear();
            }
            layer.settled = layer.settled.min(layer.mask.settled(self.len));
        }
    }

    /// Gives back the blocks that hold none of the positions there are: those that were reserved for more,
    /// or whose positions were truncated.
    pub fn give_back(&mut self) {
        for layer in &mut self.layers {
            layer.blocks.truncate(self.len.div_ceil(layer.mask.block()));
        }
    }

    /// Changes every stored key in place: `change(position, head)` with `head` of `[head_dim]`.
    pub fn update_keys(&mut self, mut change: impl FnMut(usize, &mut [f32])) {
        let d = self.shape.head_dim;
        let mut head = vec![0.0; d];
        for layer in &mut self.layers {
            let rows = layer.mask.block();
            for (b, block) in layer.blocks.iter_mut().enumerate() {
                let positions = b * rows..self.len.min((b + 1) * rows);
                let parts = block.iter_mut().flatten();
                for mut keys in parts.flat_map(|part| part.keys.heads(d, rows)) {
                    for position in positions.clone() {
                        read(keys.cached(), Order::Keys, position % rows, &mut head);
                        change(position, &mut head);
                        keys.write(Order::Keys, position % rows, &head);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::mask::{BLOCK, BlockSparse};

    fn shape() -> KvShape {
        KvShape {
            layers: vec![Mask::CAUSAL; 2],
            heads: 3,
            kv_heads: 3,
            head_dim: 4,
        }
    }

    #[test]
    fn grows_by_blocks_and_keeps_what_it_holds() {
        for kind in KvType::ALL {
            let mut cache = KvCache::new(shape(), kind);
            assert_eq!((cache.bytes(), cache.len()), (0, 0));
            for p in 0..BLOCK + 3 {
                cache.reserve(p + 1).unwrap();
                for layer in 0..2 {
                    let k: Vec<f32> = (0..12)
                        .map(|i| ((p % 7) * 100 + layer * 20 + i) as f32 / 8.0)
                        .collect();
                    let v: Vec<f32> = k.iter().map(|k| -k).collect();
                    // bf16 keeps eight bits: use values it represents.
                    let k: Vec<f32> = k.iter().map(|k| bf16::from_f32(*k).to_f32()).collect();
                    let heads = cache.open(layer, p..p + 1).1;
                    for ((mut head, k), v) in heads.into_iter().zip(k.chunks(4)).zip(v.chunks(4)) {
                        head.write(p, k, v);
                    }
                }
                cache.set_len(p + 1);
            }
            assert_eq!(cache.bytes(), shape().bytes(kind, BLOCK + 3));
            assert_eq!(cache.bytes(), 2 * BLOCK * shape().bytes_per_position(kind));
            for i in 0..12 {
                let p = BLOCK + i / 4;
                let want = bf16::from_f32(((p % 7) * 100 + 20 + 8 + i % 4) as f32 / 8.0).to_f32();
                let (key, value) = cache.read(1, 2, p);
                // Bytes: half a step of the row's largest, 79. The values were not rounded to bf16.
                let bound = if kind == KvType::Int8 { 0.32 } else { 0.0 };
                assert!((key[i % 4] - want).abs() <= bound, "{kind:?} {i}");
                assert!((value[i % 4] + want).abs() <= bound + 0.26, "{kind:?} {i}");
            }
            let [keys, values] = cache.blocks(1).block(2, 1, 3);
            let panel = match (keys, values) {
                (Cached::Floats(k), Cached::Floats(v)) => (k.len(), v.len()),
                (Cached::I8 { quants, steps }, Cached::I8 { quants: v, .. }) => {
                    assert_eq!(steps.len(), KEY_PANEL);
                    (quants.len(), v.len())
                }
                _ => unreachable!("one kind"),
            };
            // Bytes of values in whole pairs.
            let rows = if kind == KvType::Int8 { 4 } else { 3 };
            assert_eq!(panel, (KEY_PANEL * 4, rows * 4));
            cache.update_keys(|_, head| head.iter_mut().for_each(|v| *v *= 2.0));
            let Cached::Floats(Elements::F32(panel)) = cache.blocks(0).block(0, 0, 2)[0] else {
                continue;
            };
            // Element by element, sixteen keys each: 0, 1/8 .. of position 0, 100/8 .. of position 1.
            let of = |key: usize| [0, 1, 2, 3].map(|e| panel[e * KEY_PANEL + key]);
            assert_eq!(of(0), [0.0, 0.25, 0.5, 0.75]);
            assert_eq!(
                of(1),
                [100.0, 101.0, 102.0, 103.0].map(|v| bf16::from_f32(v / 8.0).to_f32() * 2.0)
            );
        }
    }

    #[test]
    fn bytes_keep_zeros_and_show_what_is_not_finite() {
        let mut cache = KvCache::new(shape(), KvType::Int8);
        cache.reserve(1).unwrap();
        let rows = [[0.0; 4], [1e-40; 4], [f32::NAN, 1.0, 1.0, 1.0]];
        for (mut head, row) in cache.open(0, 0..1).1.into_iter().zip(rows) {
            head.write(0, &row, &row);
        }
        assert_eq!(cache.read(0, 0, 0).0, [0.0; 4]);
        assert_eq!(cache.read(0, 1, 0).0, [0.0; 4]);
        assert!(cache.read(0, 2, 0).1.iter().all(|v| v.is_nan()));
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        let mut cache = KvCache::new(
            KvShape {
                layers: vec![Mask::CAUSAL],
                heads: 1 << 20,
                kv_heads: 1 << 20,
                head_dim: 1 << 30,
            },
            KvType::F32,
        );
        assert!(cache.reserve(1).is_err());
    }

    /// A block-sparse layer of two KV heads of two query heads each, and one with a window.
    fn sparse() -> KvShape {
        let layout = BlockSparse {
            block: 16,
            local_blocks: 2,
            vert_stride: 4,
            head_step: 1,
        };
        KvShape {
            layers: vec![Mask::BlockSparse(layout), Mask::Causal { window: Some(20) }],
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
        }
    }

    fn filled(positions: Range<usize>, cache: &mut KvCache) {
        cache.reserve(positions.end).unwrap();
        for p in positions.clone() {
            for layer in 0..2 {
                for mut head in cache.open(layer, p..p + 1).1 {
                    head.write(p, &[p as f32; 4], &[layer as f32; 4]);
                }
            }
        }
        cache.set_len(positions.end);
    }

    #[test]
    fn what_no_later_query_sees_is_given_back() {
        let shape = sparse();
        let mut cache = KvCache::new(shape.clone(), KvType::F32);
        filled(0..600, &mut cache);
        let all = cache.bytes();
        assert_eq!(all, shape.bytes(KvType::F32, 600));
        for next in [0, 31, 32, 47, 48, 300, 600] {
            cache.drop_hidden(next);
            let hidden = shape.hidden_bytes(KvType::F32, next);
            assert_eq!(cache.dropped_bytes(), hidden, "{next}");
            assert_eq!(cache.bytes() + hidden, all);
            for (l, mask) in shape.layers.iter().enumerate() {
                for (head, kv_head) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
                    for p in mask.blocks(head..head + 1, next..next + 1) {
                        let p = p * mask.block();
                        if p < 600 {
                            assert_eq!(cache.read(l, kv_head, p).0, [p as f32; 4]);
                        }
                    }
                }
            }
        }
        // Block 0 is for heads 3; of blocks 0 to 35 each KV head sees two of four, and the last two. The
        // window is 20 of two blocks of 256: one of three is hidden.
        let part = 2 * 16 * 4 * 4;
        let window = 2 * 2 * 256 * 4 * 4;
        assert_eq!(cache.dropped_bytes(), 2 * 18 * part + 2 * window);
        // Back to where all is seen: nothing is lost. Further: everything is.
        let mut kept = KvCache::new(shape.clone(), KvType::F32);
        filled(0..600, &mut kept);
        kept.drop_hidden(560);
        let held = kept.bytes();
        kept.truncate(570);
        assert_eq!((kept.len(), kept.bytes()), (570, held));
        kept.truncate(560 - 16);
        assert_eq!(kept.len(), 0);
        assert_eq!(kept.dropped_bytes(), 0);
        filled(0..600, &mut kept);
        assert_eq!(kept.bytes(), all);
    }

    #[test]
    fn blocks_without_positions_are_given_back() {
        let shape = sparse();
        let mut cache = KvCache::new(shape.clone(), KvType::F32);
        filled(0..600, &mut cache);
        for len in [600, 513, 512, 100, 1, 0] {
            cache.truncate(len);
            cache.reserve(700).unwrap();
            cache.give_back();
            assert_eq!(cache.bytes(), shape.bytes(KvType::F32, len), "{len}");
            for p in (0..len).step_by(37) {
                assert_eq!(cache.read(0, 1, p).0, [p as f32; 4]);
            }
        }
        // What is dropped stays so, and room can be had again.
        filled(0..600, &mut cache);
        cache.drop_hidden(600);
        let held = cache.bytes();
        cache.reserve(2000).unwrap();
        cache.give_back();
        assert_eq!(cache.bytes(), held);
        filled(600..700, &mut cache);
        assert_eq!(cache.read(1, 0, 699).0, [699.0; 4]);
    }
}
