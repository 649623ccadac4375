//! Keys and values in the memory of a device: room for the whole context from the start.

use super::weights::failed;
use crate::backend::{Cache, DeviceFailed};
use crate::kv_cache::{KvOutOfMemory, KvShape, KvType};
use phidias_kernels::cuda::{Device, DeviceError, Memory, Span, attention};
use phidias_quant::f16;
use std::ops::Range;
use std::sync::Arc;

/// Keys and values of a sequence: of each layer `[kv_heads, context, head_dim]` keys, then as many values.
#[derive(Debug)]
pub struct DeviceCache {
    shape: KvShape,
    kind: KvType,
    context: usize,
    len: usize,
    memory: Memory,
}

/// A type of cache that the kernels do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the KV cache on a GPU is f16 or f32, not {}", .0.name())]
pub struct KvTypeRefused(pub KvType);

impl DeviceCache {
    /// Bytes of the keys and values of so many positions.
    /// # Errors
    /// [`KvTypeRefused`].
    pub fn bytes_of(shape: &KvShape, kind: KvType, context: usize) -> Result<usize, KvTypeRefused> {
        match Self::takes(kind) {
            true => Ok(shape.bytes_per_position(kind).saturating_mul(context)),
            false => Err(KvTypeRefused(kind)),
        }
    }

    /// Whether the kernels have this type.
    #[must_use]
    pub fn takes(kind: KvType) -> bool {
        match kind {
            KvType::F16 | KvType::F32 => true,
            KvType::Bf16 | KvType::Int8 => false,
        }
    }

    /// An empty cache.
    /// # Errors
    /// When there is no memory for it.
    /// # Panics
    /// When [`DeviceCache::bytes_of`] refuses the type.
    pub fn new(
        device: &Arc<dyn Device>,
        shape: KvShape,
        kind: KvType,
        context: usize,
    ) -> Result<Self, DeviceFailed> {
        let bytes = Self::bytes_of(&shape, kind, context).expect("a type that was checked");
        let memory = Memory::new(device, bytes).map_err(|error| failed(&**device, error))?;
        Ok(Self {
            shape,
            kind,
            context,
            len: 0,
            memory,
        })
    }

    /// Values of a layer's keys, and of its values.
    fn layer_len(&self) -> usize {
        self.shape.kv_heads * self.context * self.shape.head_dim
    }

    /// Keys and values of a layer as values of its type.
    fn halves<T: bytemuck::Pod>(&self, layer: usize) -> [Span<'_, T>; 2] {
        let len = self.layer_len();
        let all = self.memory.span::<T>();
        [2 * layer, 2 * layer + 1].map(|i| all.slice(i * len..(i + 1) * len))
    }

    pub(super) fn layer(&self, layer: usize) -> attention::Cache<'_> {
        match self.kind {
            KvType::F32 => {
                let [keys, values] = self.halves(layer);
                attention::Cache::F32 { keys, values }
            }
            _ => {
                let [keys, values] = self.halves(layer);
                attention::Cache::F16 { keys, values }
            }
        }
    }

    /// Some keys, or values, of a layer as f32.
    fn download(
        &self,
        layer: usize,
        half: usize,
        range: Range<usize>,
    ) -> Result<Vec<f32>, DeviceError> {
        Ok(match self.kind {
            KvType::F32 => self.halves::<f32>(layer)[half].slice(range).to_vec()?,
            _ => {
                let values = self.halves::<f16>(layer)[half].slice(range).to_vec()?;
                values.iter().map(|v| v.to_f32()).collect()
            }
        })
    }

    fn upload_keys(
        &self,
        layer: usize,
        range: Range<usize>,
        keys: &[f32],
    ) -> Result<(), DeviceError> {
        match self.kind {
            KvType::F32 => self.halves::<f32>(layer)[0].slice(range).upload(keys),
            _ => {
                let keys: Vec<f16> = keys.iter().map(|v| f16::from_f32(*v)).collect();
                self.halves::<f16>(layer)[0].slice(range).upload(&keys)
            }
        }
    }

    fn failed(&self, error: DeviceError) -> DeviceFailed {
        failed(&**self.memory.device(), error)
    }
}

impl Cache for DeviceCache {
    fn kind(&self) -> KvType {
        self.kind
    }

    fn len(&self) -> usize {
        self.len
    }

    fn set_len(&mut self, len: usize) {
        assert!(len <= self.context, "{len} positions of {}", self.context);
        self.len = len;
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn dropped_bytes(&self) -> usize {
        0
    }

    fn reserve(&mut self, positions: usize) -> Result<(), KvOutOfMemory> {
        match positions <= self.context {
            true => Ok(()),
            false => Err(KvOutOfMemory {
                bytes: (self.shape.bytes_per_position(self.kind))
                    .saturating_mul(positions - self.context),
                positions,
            }),
        }
    }

    /// It stays as it is: what is hidden would be a hole in the middle.
    fn drop_hidden(&mut self, _next: usize) {}

    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// It is one piece of memory for the whole context.
    fn give_back(&mut self) {}

    fn update_keys(
        &mut self,
        change: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), DeviceFailed> {
        let d = self.shape.head_dim;
        for layer in 0..self.shape.layers.len() {
            for head in 0..self.shape.kv_heads {
                let first = head * self.context * d;
                let range = first..first + self.len * d;
                let keys = self.download(layer, 0, range.clone());
                let mut keys = keys.map_err(|error| self.failed(error))?;
                for (position, key) in keys.chunks_exact_mut(d).enumerate() {
                    change(position, key);
                }
                (self.upload_keys(layer, range, &keys)).map_err(|error| self.failed(error))?;
            }
        }
        Ok(())
    }

    fn read(
        &self,
        layer: usize,
        head: usize,
        position: usize,
    ) -> Result<(Vec<f32>, Vec<f32>), DeviceFailed> {
        let d = self.shape.head_dim;
        let first = (head * self.context + position) * d;
        let of = |half| {
            let values = self.download(layer, half, first..first + d);
            values.map_err(|error| self.failed(error))
        };
        Ok((of(0)?, of(1)?))
    }
}
