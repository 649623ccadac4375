//! The KV cache: keys and values of every position, layer and head, growing on demand.
//!
//! ```text
//! layer -> block of 256 positions -> keys   [kv_heads][16 panels][head_dim][16 positions]
//!                                    values [kv_heads][256][head_dim]
//! ```
//!
//! Keys and values of one head lie side by side, so reading them runs at the full bandwidth, and
//! sixteen keys are the lanes of a register (see the attention kernels). Blocks are
//! never moved once taken, so growing copies nothing; and blocks begin at fixed positions, so
//! attention merges the same ranges in the same order whatever was allocated.

use bytemuck::Zeroable;
use half::slice::HalfFloatSliceExt;
use phidias_kernels::cpu::{Cached, KEY_PANEL};
use phidias_kernels::view::Elements;
use phidias_quant::{bf16, f16};
use std::ops::Range;

/// Positions in a block.
pub const BLOCK: usize = 256;

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

    /// Bytes of one key or value of one head.
    fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 | Self::Bf16 => 2 * head_dim,
            Self::Int8 => head_dim + size_of::<f32>(),
        }
    }
}

/// The sizes that are fixed by the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one position in every layer.
    #[must_use]
    pub fn bytes_per_position(&self, kind: KvType) -> usize {
        2 * self.layers * self.kv_heads * kind.row_bytes(self.head_dim)
    }

    /// Bytes of `positions` positions, whole blocks.
    #[must_use]
    pub fn bytes(&self, kind: KvType, positions: usize) -> usize {
        self.bytes_per_position(kind)
            .saturating_mul(positions.next_multiple_of(BLOCK))
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

/// Where an element of a row lies in what a head has in a block.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// `[16 panels][head_dim][16]`
    Keys,
    /// `[256][head_dim]`
    Values,
}

impl Order {
    /// First element of row `r`, and the distance from one to the next.
    fn place(self, r: usize, head_dim: usize) -> (usize, usize) {
        match self {
            Self::Keys => (
                r / KEY_PANEL * KEY_PANEL * head_dim + r % KEY_PANEL,
                KEY_PANEL,
            ),
            Self::Values => (r * head_dim, 1),
        }
    }
}

/// Keys or values of all heads in a block.
#[derive(Debug)]
enum Store {
    F32(Box<[f32]>),
    F16(Box<[f16]>),
    Bf16(Box<[bf16]>),
    /// And the steps, `[kv_heads][256]`.
    Int8(Box<[i8]>, Box<[f32]>),
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
            (first, step): (usize, usize),
            row: &[f32],
            narrow: impl Fn(&mut [T], &[f32]),
        ) {
            let mut piece = [T::default(); PIECE];
            for (i, row) in row.chunks(PIECE).enumerate() {
                let piece = &mut piece[..row.len()];
                narrow(piece, row);
                let out = &mut out[first + i * PIECE * step..];
                if step == 1 {
                    out[..piece.len()].copy_from_slice(piece);
                } else {
                    out.iter_mut()
                        .step_by(step)
                        .zip(piece)
                        .for_each(|(o, v)| *o = *v);
                }
            }
        }
        let place = order.place(r, row.len());
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

    fn cached(&self) -> Cached<'_> {
        match self {
            Self::F32(s) => Cached::Floats(Elements::F32(s)),
            Self::F16(s) => Cached::Floats(Elements::F16(s)),
            Self::Bf16(s) => Cached::Floats(Elements::Bf16(s)),
            Self::Int8(quants, steps) => Cached::I8 { quants, steps },
        }
    }
}

/// Reads one row back.
fn read(head: Cached<'_>, order: Order, r: usize, row: &mut [f32]) {
    let (first, step) = order.place(r, row.len());
    for (i, v) in row.iter_mut().enumerate() {
        let at = first + i * step;
        *v = match head {
            Cached::Floats(Elements::F32(s)) => s[at],
            Cached::Floats(Elements::F16(s)) => s[at].to_f32(),
            Cached::Floats(Elements::Bf16(s)) => s[at].to_f32(),
            Cached::I8 { quants, steps } => f32::from(quants[at]) * steps[r],
        };
    }
}

impl Store {
    fn new(kind: KvType, shape: KvShape) -> Option<Self> {
        fn zeroed<T: Zeroable>(len: usize) -> Option<Box<[T]>> {
            bytemuck::allocation::try_zeroed_slice_box(len).ok()
        }
        let rows = shape.kv_heads.checked_mul(BLOCK)?;
        let len = rows.checked_mul(shape.head_dim)?;
        Some(match kind {
            KvType::F32 => Self::F32(zeroed(len)?),
            KvType::F16 => Self::F16(zeroed(len)?),
            KvType::Bf16 => Self::Bf16(zeroed(len)?),
            KvType::Int8 => Self::Int8(zeroed(len)?, zeroed(rows)?),
        })
    }

    /// The first `elements` and `rows` of head `h`.
    fn head(&self, h: usize, head_dim: usize, elements: usize, rows: usize) -> Cached<'_> {
        let len = BLOCK * head_dim;
        let range = h * len..h * len + elements;
        match self {
            Self::F32(s) => Cached::Floats(Elements::F32(&s[range])),
            Self::F16(s) => Cached::Floats(Elements::F16(&s[range])),
            Self::Bf16(s) => Cached::Floats(Elements::Bf16(&s[range])),
            Self::Int8(s, steps) => Cached::I8 {
                quants: &s[range],
                steps: &steps[h * BLOCK..][..rows],
            },
        }
    }

    /// The heads one after the other.
    fn heads(&mut self, head_dim: usize) -> Vec<HeadStore<'_>> {
        let len = BLOCK * head_dim;
        match self {
            Self::F32(s) => s.chunks_mut(len).map(HeadStore::F32).collect(),
            Self::F16(s) => s.chunks_mut(len).map(HeadStore::F16).collect(),
            Self::Bf16(s) => s.chunks_mut(len).map(HeadStore::Bf16).collect(),
            Self::Int8(s, steps) => (s.chunks_mut(len))
                .zip(steps.chunks_mut(BLOCK))
                .map(|(s, steps)| HeadStore::Int8(s, steps))
                .collect(),
        }
    }
}

#[derive(Debug)]
struct Block {
    keys: Store,
    values: Store,
}

/// One head of one layer, to be written at some positions.
#[derive(Debug)]
pub struct HeadMut<'a> {
    /// The block of `blocks[0]`.
    first: usize,
    /// keys, values
    blocks: Vec<(HeadStore<'a>, HeadStore<'a>)>,
}

impl HeadMut<'_> {
    /// Stores key and value, `[head_dim]` each, of a position that the head was taken for.
    pub fn write(&mut self, position: usize, key: &[f32], value: &[f32]) {
        let (keys, values) = &mut self.blocks[position / BLOCK - self.first];
        keys.write(Order::Keys, position % BLOCK, key);
        values.write(Order::Values, position % BLOCK, value);
    }
}

/// Keys and values of one sequence.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    kind: KvType,
    /// `[layers][blocks]`
    layers: Vec<Vec<Block>>,
    len: usize,
}

impl KvCache {
    /// An empty cache; memory is taken by [`KvCache::reserve`].
    #[must_use]
    pub fn new(shape: KvShape, kind: KvType) -> Self {
        Self {
            shape,
            kind,
            layers: (0..shape.layers).map(|_| Vec::new()).collect(),
            len: 0,
        }
    }

    /// The sizes fixed by the model.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
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

    /// Bytes taken so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let blocks = self.layers.first().map_or(0, Vec::len);
        self.shape.bytes(self.kind, blocks * BLOCK)
    }

    /// Takes memory for `positions` positions in all.
    /// # Errors
    /// [`KvOutOfMemory`]; what was there stays usable.
    pub fn reserve(&mut self, positions: usize) -> Result<(), KvOutOfMemory> {
        let blocks = positions.div_ceil(BLOCK);
        let have = self.layers.first().map_or(0, Vec::len);
        let missing = blocks.saturating_sub(have) * BLOCK;
        let error = || KvOutOfMemory {
            bytes: self.shape.bytes(self.kind, missing),
            positions,
        };
        for layer in &mut self.layers {
            while layer.len() < blocks {
                let keys = Store::new(self.kind, self.shape).ok_or_else(error)?;
                let values = Store::new(self.kind, self.shape).ok_or_else(error)?;
                layer.push(Block { keys, values });
            }
        }
        Ok(())
    }

    /// The heads of one layer, each to be written at `positions`, which must have been reserved.
    pub fn heads_mut(&mut self, layer: usize, positions: Range<usize>) -> Vec<HeadMut<'_>> {
        let (first, end) = (positions.start / BLOCK, positions.end.div_ceil(BLOCK));
        let mut heads: Vec<_> = (0..self.shape.kv_heads)
            .map(|_| HeadMut {
                first,
                blocks: Vec::with_capacity(end - first),
            })
            .collect();
        for block in &mut self.layers[layer][first..end] {
            let keys = block.keys.heads(self.shape.head_dim);
            let values = block.values.heads(self.shape.head_dim);
            for (head, pair) in heads.iter_mut().zip(keys.into_iter().zip(values)) {
                head.blocks.push(pair);
            }
        }
        heads
    }

    /// All positions up to `len` are complete in every layer now.
    pub fn set_len(&mut self, len: usize) {
        debug_assert!(len <= self.layers.first().map_or(0, Vec::len) * BLOCK);
        self.len = len;
    }

    /// Keys and values of block `block` of one layer and head: the first `positions` of it, keys in
    /// whole panels `[panels, head_dim, 16]`, values `[positions, head_dim]`.
    #[must_use]
    pub fn block(
        &self,
        layer: usize,
        head: usize,
        block: usize,
        positions: usize,
    ) -> (Cached<'_>, Cached<'_>) {
        let d = self.shape.head_dim;
        let padded = positions.next_multiple_of(KEY_PANEL);
        let block = &self.layers[layer][block];
        (
            block.keys.head(head, d, padded * d, padded),
            block.values.head(head, d, positions * d, padded),
        )
    }

    /// Key and value of one position as f32, `[head_dim]` each.
    #[must_use]
    pub fn read(&self, layer: usize, head: usize, position: usize) -> (Vec<f32>, Vec<f32>) {
        let (block, r) = (position / BLOCK, position % BLOCK);
        let (keys, values) = self.block(layer, head, block, r + 1);
        let d = self.shape.head_dim;
        let (mut key, mut value) = (vec![0.0; d], vec![0.0; d]);
        read(keys, Order::Keys, r, &mut key);
        read(values, Order::Values, r, &mut value);
        (key, value)
    }

    /// Forgets the positions from `len` on; the memory stays for the next ones.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Changes every stored key in place: `change(position, head)` with `head` of `[head_dim]`.
    pub fn update_keys(&mut self, mut change: impl FnMut(usize, &mut [f32])) {
        let d = self.shape.head_dim;
        let mut head = vec![0.0; d];
        for layer in &mut self.layers {
            for (b, block) in layer.iter_mut().enumerate() {
                let positions = b * BLOCK..self.len.min((b + 1) * BLOCK);
                for mut keys in block.keys.heads(d) {
                    for position in positions.clone() {
                        read(keys.cached(), Order::Keys, position % BLOCK, &mut head);
                        change(position, &mut head);
                        keys.write(Order::Keys, position % BLOCK, &head);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape {
        layers: 2,
        kv_heads: 3,
        head_dim: 4,
    };

    #[test]
    fn grows_by_blocks_and_keeps_what_it_holds() {
        for kind in KvType::ALL {
            let mut cache = KvCache::new(SHAPE, kind);
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
                    let heads = cache.heads_mut(layer, p..p + 1);
                    for ((mut head, k), v) in heads.into_iter().zip(k.chunks(4)).zip(v.chunks(4)) {
                        head.write(p, k, v);
                    }
                }
                cache.set_len(p + 1);
            }
            assert_eq!(cache.bytes(), SHAPE.bytes(kind, BLOCK + 3));
            assert_eq!(cache.bytes(), 2 * BLOCK * SHAPE.bytes_per_position(kind));
            for i in 0..12 {
                let p = BLOCK + i / 4;
                let want = bf16::from_f32(((p % 7) * 100 + 20 + 8 + i % 4) as f32 / 8.0).to_f32();
                let (key, value) = cache.read(1, 2, p);
                // Bytes: half a step of the row's largest, 79. The values were not rounded to bf16.
                let bound = if kind == KvType::Int8 { 0.32 } else { 0.0 };
                assert!((key[i % 4] - want).abs() <= bound, "{kind:?} {i}");
                assert!((value[i % 4] + want).abs() <= bound + 0.26, "{kind:?} {i}");
            }
            let (keys, values) = cache.block(1, 2, 1, 3);
            let panel = match (keys, values) {
                (Cached::Floats(k), Cached::Floats(v)) => (k.len(), v.len()),
                (Cached::I8 { quants, steps }, Cached::I8 { quants: v, .. }) => {
                    assert_eq!(steps.len(), KEY_PANEL);
                    (quants.len(), v.len())
                }
                _ => unreachable!("one kind"),
            };
            assert_eq!(panel, (KEY_PANEL * 4, 3 * 4));
            cache.update_keys(|_, head| head.iter_mut().for_each(|v| *v *= 2.0));
            let Cached::Floats(Elements::F32(panel)) = cache.block(0, 0, 0, 2).0 else {
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
        let mut cache = KvCache::new(SHAPE, KvType::Int8);
        cache.reserve(1).unwrap();
        let rows = [[0.0; 4], [1e-40; 4], [f32::NAN, 1.0, 1.0, 1.0]];
        for (mut head, row) in cache.heads_mut(0, 0..1).into_iter().zip(rows) {
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
                layers: 1,
                kv_heads: 1 << 20,
                head_dim: 1 << 30,
            },
            KvType::F32,
        );
        assert!(cache.reserve(1).is_err());
    }
}
