//! The KV cache: keys and values of every position, layer and head, growing on demand.
//!
//! ```text
//! layer -> block of 256 positions -> keys [kv_heads][256][head_dim], values likewise
//! ```
//!
//! The keys of one head lie side by side, so reading them runs at the full bandwidth; blocks are
//! never moved once taken, so growing copies nothing; and blocks begin at fixed positions, so
//! attention merges the same ranges in the same order whatever was allocated.

use bytemuck::{Pod, Zeroable};
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
}

impl KvType {
    /// Every type there is.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
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
        2 * self.layers * self.kv_heads * self.head_dim * kind.bytes()
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

/// `[kv_heads][256][head_dim]`
#[derive(Debug)]
enum Store {
    F32(Box<[f32]>),
    F16(Box<[f16]>),
    Bf16(Box<[bf16]>),
}

impl Store {
    fn new(kind: KvType, len: usize) -> Option<Self> {
        fn zeroed<T: Zeroable>(len: usize) -> Option<Box<[T]>> {
            bytemuck::allocation::try_zeroed_slice_box(len).ok()
        }
        Some(match kind {
            KvType::F32 => Self::F32(zeroed(len)?),
            KvType::F16 => Self::F16(zeroed(len)?),
            KvType::Bf16 => Self::Bf16(zeroed(len)?),
        })
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(s) => Elements::F32(s),
            Self::F16(s) => Elements::F16(s),
            Self::Bf16(s) => Elements::Bf16(s),
        }
    }

    fn write(&mut self, first: usize, values: &[f32]) {
        fn put<T: Pod>(out: &mut [T], values: &[f32], narrow: fn(f32) -> T) {
            out.iter_mut()
                .zip(values)
                .for_each(|(o, v)| *o = narrow(*v));
        }
        let range = first..first + values.len();
        match self {
            Self::F32(s) => s[range].copy_from_slice(values),
            Self::F16(s) => put(&mut s[range], values, f16::from_f32),
            Self::Bf16(s) => put(&mut s[range], values, bf16::from_f32),
        }
    }

    fn read(&self, range: Range<usize>, out: &mut [f32]) {
        match self.elements().slice(range) {
            Elements::F32(s) => out.copy_from_slice(s),
            Elements::F16(s) => out.iter_mut().zip(s).for_each(|(o, v)| *o = v.to_f32()),
            Elements::Bf16(s) => out.iter_mut().zip(s).for_each(|(o, v)| *o = v.to_f32()),
        }
    }
}

#[derive(Debug)]
struct Block {
    keys: Store,
    values: Store,
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
        let len = self.shape.kv_heads * BLOCK * self.shape.head_dim;
        for layer in &mut self.layers {
            while layer.len() < blocks {
                let keys = Store::new(self.kind, len).ok_or_else(error)?;
                let values = Store::new(self.kind, len).ok_or_else(error)?;
                layer.push(Block { keys, values });
            }
        }
        Ok(())
    }

    /// Stores keys and values, `[kv_heads * head_dim]` each, of one layer and position, which must
    /// have been reserved.
    pub fn write(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let d = self.shape.head_dim;
        debug_assert_eq!(
            (keys.len(), values.len()),
            (self.shape.kv_heads * d, self.shape.kv_heads * d)
        );
        let block = &mut self.layers[layer][position / BLOCK];
        for (h, (k, v)) in keys.chunks_exact(d).zip(values.chunks_exact(d)).enumerate() {
            let at = (h * BLOCK + position % BLOCK) * d;
            block.keys.write(at, k);
            block.values.write(at, v);
        }
    }

    /// All positions up to `len` are complete in every layer now.
    pub fn set_len(&mut self, len: usize) {
        debug_assert!(len <= self.layers.first().map_or(0, Vec::len) * BLOCK);
        self.len = len;
    }

    /// Keys and values of block `block` of one layer and head: the first `positions` of it, each
    /// `[positions, head_dim]`.
    #[must_use]
    pub fn block(
        &self,
        layer: usize,
        head: usize,
        block: usize,
        positions: usize,
    ) -> (Elements<'_>, Elements<'_>) {
        let d = self.shape.head_dim;
        let range = head * BLOCK * d..(head * BLOCK + positions) * d;
        let block = &self.layers[layer][block];
        (
            block.keys.elements().slice(range.clone()),
            block.values.elements().slice(range),
        )
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
            for position in 0..self.len {
                let keys = &mut layer[position / BLOCK].keys;
                for h in 0..self.shape.kv_heads {
                    let at = (h * BLOCK + position % BLOCK) * d;
                    keys.read(at..at + d, &mut head);
                    change(position, &mut head);
                    keys.write(at, &head);
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
                    cache.write(layer, p, &k, &v);
                }
                cache.set_len(p + 1);
            }
            assert_eq!(cache.bytes(), SHAPE.bytes(kind, BLOCK + 3));
            assert_eq!(cache.bytes(), 2 * BLOCK * SHAPE.bytes_per_position(kind));
            let (keys, _) = cache.block(1, 2, 1, 3);
            let mut out = [0.0; 12];
            match keys {
                Elements::F32(s) => out.copy_from_slice(s),
                Elements::F16(s) => out.iter_mut().zip(s).for_each(|(o, v)| *o = v.to_f32()),
                Elements::Bf16(s) => out.iter_mut().zip(s).for_each(|(o, v)| *o = v.to_f32()),
            }
            for (i, got) in out.iter().enumerate() {
                let p = BLOCK + i / 4;
                let want = bf16::from_f32(((p % 7) * 100 + 20 + 8 + i % 4) as f32 / 8.0).to_f32();
                assert_eq!(*got, want, "{kind:?} {i}");
            }
            cache.update_keys(|_, head| head.iter_mut().for_each(|v| *v *= 2.0));
            let (Elements::F32(doubled), _) = cache.block(0, 0, 0, 1) else {
                continue;
            };
            assert_eq!(doubled, [0.0, 0.25, 0.5, 0.75]);
        }
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
