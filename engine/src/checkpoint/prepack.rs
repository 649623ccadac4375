//! Writing a checkpoint with its matrices in the kernels' order.
//!
//! The result is an ordinary safetensors container. Packed tensors have dtype U8; their format and
//! shape stand in the metadata. The header is padded so that the data begins on a 64-byte boundary,
//! and tensors whose length is a multiple of 64 come first, so every packed tensor is aligned
//! although the container allows no holes.

use super::{Checkpoint, CheckpointError, PACKED_KEY, Result, VERSION_KEY};
use crate::pool::Pool;
use crate::tensor::{DType, Tensor};
use crate::{Bytes, Cancel, OwnedBytes};
use phidias_quant::packed::{PANEL_ROWS, pack_panel};
use phidias_quant::{ALIGN, Format, PackError, PackedLayout, bf16, f16, packed};
use rayon::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Where the elements of a new tensor come from: a mapped [`Tensor`], or a rule that makes them
/// as they are asked for. Several threads ask at once.
pub trait Values: fmt::Debug + Sync {
    /// What the elements are.
    fn dtype(&self) -> DType;
    /// Shape; `[rows, cols]` of a matrix.
    fn shape(&self) -> &[usize];
    /// The bytes, where they stand in memory.
    fn raw(&self) -> Option<&[u8]>;
    /// Widens `out.len()` elements from `first` on to f32, exactly; `false` when packed.
    #[must_use]
    fn widen(&self, first: usize, out: &mut [f32]) -> bool;
}

impl Values for Tensor {
    fn dtype(&self) -> DType {
        self.dtype()
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn raw(&self) -> Option<&[u8]> {
        Some(self.bytes())
    }
    fn widen(&self, first: usize, out: &mut [f32]) -> bool {
        self.widen(first, out)
    }
}

/// What happens to a tensor on its way into the new checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// The bytes as they are.
    Keep,
    /// Another float type: exact when wider, rounded to nearest even when narrower.
    Cast(DType),
    /// Blocks in packed order; the tensor must be a matrix.
    Pack(Format),
}

/// One tensor of the new checkpoint.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name there.
    pub name: String,
    /// The tensor it is made from.
    pub source: String,
    /// How.
    pub treatment: Treatment,
}

/// One tensor of the new checkpoint and the values it is made from.
#[derive(Clone, Debug)]
pub struct Item<'a> {
    /// Its name there.
    pub name: String,
    /// What it is made from, by its own name: that of a tied head is the embedding's.
    pub source: String,
    /// Its values.
    pub values: &'a dyn Values,
    /// How.
    pub treatment: Treatment,
}

/// A checkpoint about to be written: every size is known before the first byte.
#[derive(Debug)]
pub struct Prepack<'a> {
    /// The checkpoint that it is made from, for messages.
    path: PathBuf,
    parts: Vec<Part<'a>>,
    header: Vec<u8>,
    data: usize,
}

#[derive(Debug)]
struct Part<'a> {
    name: String,
    source: String,
    values: &'a dyn Values,
    treatment: Treatment,
    layout: Option<PackedLayout>,
    bytes: usize,
}

/// Progress of the writing: bytes done, bytes in all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

impl<'a> Prepack<'a> {
    /// Plans a new checkpoint made from tensors of another one.
    /// # Errors
    /// A missing source tensor, or one that cannot be treated as asked.
    pub fn plan(source: &'a Checkpoint, entries: Vec<Entry>) -> Result<Self> {
        let items: Result<_> = (entries.into_iter())
            .map(|entry| match source.get(&entry.source) {
                Some(tensor) => Ok(Item {
                    name: entry.name,
                    source: entry.source,
                    values: tensor,
                    treatment: entry.treatment,
                }),
                None => Err(CheckpointError::MissingTensor {
                    path: source.path().to_owned(),
                    tensor: entry.source,
                }),
            })
            .collect();
        Self::of(source.path(), items?)
    }

    /// Plans a new checkpoint of any values; `path` is for messages.
    /// # Errors
    /// Values that cannot be treated as asked.
    pub fn of(path: &Path, items: Vec<Item<'a>>) -> Result<Self> {
        let mut parts = Vec::new();
        for Item {
            name,
            source,
            values,
            treatment,
        } in items
        {
            let dense = !matches!(values.dtype(), DType::Packed(_));
            let elements: usize = values.shape().iter().product();
            let wrong = |expected| CheckpointError::DType {
                path: path.to_owned(),
                tensor: source.clone(),
                expected,
                found: values.dtype(),
            };
            let mut layout = None;
            let bytes = match treatment {
                Treatment::Keep => match values.raw() {
                    Some(bytes) => bytes.len(),
                    None if dense => elements * values.dtype().align(),
                    None => return Err(wrong("bytes in memory")),
                },
                Treatment::Cast(dtype) if dense && !matches!(dtype, DType::Packed(_)) => {
                    elements * dtype.align()
                }
                Treatment::Cast(_) => return Err(wrong("F32, F16 or BF16")),
                Treatment::Pack(format) => {
                    let &[rows, cols] = values.shape() else {
                        return Err(CheckpointError::Shape {
                            path: path.to_owned(),
                            tensor: source.clone(),
                            expected: vec![0, 0],
                            found: values.shape().to_vec(),
                        });
                    };
                    if !dense {
                        return Err(wrong("F32, F16 or BF16"));
                    }
                    let l = PackedLayout::new(format, rows, cols).map_err(|cause| {
                        CheckpointError::Unpackable {
                            path: path.to_owned(),
                            tensor: source.clone(),
                            format: format.name(),
                            source: cause,
                        }
                    })?;
                    layout = Some(l);
                    l.bytes()
                }
            };
            parts.push(Part {
                name,
                source,
                values,
                treatment,
                layout,
                bytes,
            });
        }
        parts.sort_by(|a, b| (a.bytes % ALIGN != 0, &a.name).cmp(&(b.bytes % ALIGN != 0, &b.name)));
        let data = parts.iter().map(|p| p.bytes).sum();
        let header = header(&parts);
        Ok(Self {
            path: path.to_owned(),
            parts,
            header,
            data,
        })
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.header.len() + self.data
    }

    /// Bytes of the tensors of these names together.
    pub fn bytes_of(&self, wanted: impl Fn(&str) -> bool) -> usize {
        let parts = self.parts.iter().filter(|part| wanted(&part.name));
        parts.map(|part| part.bytes).sum()
    }

    /// Whether `checkpoint` has every tensor of the plan, in its type and shape.
    #[must_use]
    pub fn describes(&self, checkpoint: &Checkpoint) -> bool {
        self.parts.iter().all(|part| {
            checkpoint.get(&part.name).is_some_and(|found| {
                found.dtype() == part.dtype() && found.shape() == part.values.shape()
            })
        })
    }

    /// Writes the file.
    /// # Errors
    /// The writer's error (as [`CheckpointError::Io`] on `path`, which is for messages only), a
    /// weight that has no place in the format, or cancellation.
    pub fn write(
        &self,
        out: &mut dyn Write,
        path: &Path,
        pool: &Pool,
        cancel: &Cancel,
        progress: Progress<'_>,
    ) -> Result<()> {
        let io = |source: io::Error| CheckpointError::Io {
            path: path.to_owned(),
            source,
        };
        out.write_all(&self.header).map_err(io)?;
        let mut done = self.header.len();
        for part in &self.parts {
            part.write(&self.path, pool, &mut |bytes| {
                if cancel.is_cancelled() {
                    return Err(CheckpointError::Cancelled);
                }
                out.write_all(bytes).map_err(io)?;
                done += bytes.len();
                progress(done, self.bytes());
                Ok(())
            })?;
        }
        out.flush().map_err(io)
    }

    /// The same file in memory.
    /// # Errors
    /// As [`Prepack::write`], and [`CheckpointError::OutOfMemory`].
    pub fn to_memory(&self, pool: &Pool, cancel: &Cancel, progress: Progress<'_>) -> Result<Bytes> {
        let mut bytes =
            OwnedBytes::zeroed(self.bytes()).map_err(|_| CheckpointError::OutOfMemory {
                what: "quantized weights".into(),
                bytes: self.bytes(),
            })?;
        self.write(
            &mut &mut bytes[..],
            Path::new("memory"),
            pool,
            cancel,
            progress,
        )?;
        Ok(Bytes::from(bytes))
    }
}

fn header(parts: &[Part<'_>]) -> Vec<u8> {
    let packed: BTreeMap<_, _> = (parts.iter())
        .filter_map(|p| {
            p.layout
                .map(|l| (&p.name, (l.format().name(), l.rows(), l.cols())))
        })
        .collect();
    let mut header = serde_json::Map::new();
    let mut notes = json!({ "format": "pt" });
    if !packed.is_empty() {
        notes[VERSION_KEY] = packed::VERSION.to_string().into();
        notes[PACKED_KEY] = json!(packed).to_string().into();
    }
    header.insert("__metadata__".into(), notes);
    let mut offset = 0;
    for part in parts {
        let (dtype, shape) = match part.dtype() {
            DType::F32 => ("F32", part.values.shape().to_vec()),
            DType::F16 => ("F16", part.values.shape().to_vec()),
            DType::Bf16 => ("BF16", part.values.shape().to_vec()),
            DType::Packed(_) => ("U8", vec![part.bytes]),
        };
        let range = [offset, offset + part.bytes];
        header.insert(
            part.name.clone(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": range }),
        );
        offset += part.bytes;
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize((8 + json.len()).next_multiple_of(ALIGN) - 8, b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

/// Bytes handed to the writer at a time, so that memory stays bounded and progress is seen.
const STEP: usize = 4 << 20;
/// Bytes that one thread converts at a time; a step has enough of them for every thread.
const RUN: usize = 64 << 10;

impl Part<'_> {
    /// What the new tensor is stored as.
    fn dtype(&self) -> DType {
        match self.treatment {
            Treatment::Keep => self.values.dtype(),
            Treatment::Cast(dtype) => dtype,
            Treatment::Pack(format) => DType::Packed(format),
        }
    }

    /// `path` is for messages.
    fn write(
        &self,
        path: &Path,
        pool: &Pool,
        out: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        match (self.layout, self.values.raw()) {
            (Some(layout), _) => self.pack(path, &layout, pool, out),
            (None, Some(bytes)) if self.dtype() == self.values.dtype() => {
                bytes.chunks(STEP).try_for_each(out)
            }
            (None, _) => self.cast(pool, out),
        }
    }

    fn cast(&self, pool: &Pool, out: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (dtype, size) = (self.dtype(), self.dtype().align());
        let mut bytes = vec![0; STEP.min(self.bytes)];
        for start in (0..self.bytes).step_by(STEP) {
            let bytes = &mut bytes[..STEP.min(self.bytes - start)];
            pool.install(|| {
                bytes.par_chunks_mut(RUN).enumerate().for_each_init(
                    Vec::new,
                    |values: &mut Vec<f32>, (i, out)| {
                        values.resize(out.len() / size, 0.0);
                        let first = (start + i * RUN) / size;
                        assert!(self.values.widen(first, values), "planned as dense");
                        narrow(values, dtype, out);
                    },
                );
            });
            out(bytes)?;
        }
        Ok(())
    }

    fn pack(
        &self,
        path: &Path,
        layout: &PackedLayout,
        pool: &Pool,
        out: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (cols, size) = (layout.cols(), layout.panel_bytes());
        // At least one panel a thread, whatever the panel's size.
        let batch = (STEP / size).max(pool.threads());
        let mut bytes = vec![0; size * batch.min(layout.panels())];
        let mut panel = 0;
        while panel < layout.panels() {
            let count = batch.min(layout.panels() - panel);
            let bytes = &mut bytes[..count * size];
            pool.install(|| {
                bytes
                    .par_chunks_exact_mut(size)
                    .enumerate()
                    .try_for_each_init(Vec::new, |rows, (i, out)| {
                        let first = (panel + i) * PANEL_ROWS;
                        rows.resize(PANEL_ROWS.min(layout.rows() - first) * cols, 0.0);
                        assert!(self.values.widen(first * cols, rows), "planned as dense");
                        pack_panel(layout, rows, out).map_err(|e| match e {
                            PackError::Weight { row, block, found } => PackError::Weight {
                                row: first + row,
                                block,
                                found,
                            },
                            other => other,
                        })
                    })
            })
            .map_err(|source| CheckpointError::Unpackable {
                path: path.to_owned(),
                tensor: self.source.clone(),
                format: layout.format().name(),
                source,
            })?;
            out(bytes)?;
            panel += count;
        }
        Ok(())
    }
}

/// `values` as `dtype`, little endian, rounded to nearest even where it is narrower.
fn narrow(values: &[f32], dtype: DType, out: &mut [u8]) {
    fn each<const N: usize>(values: &[f32], out: &mut [u8], to: impl Fn(f32) -> [u8; N]) {
        for (out, v) in out.as_chunks_mut().0.iter_mut().zip(values) {
            *out = to(*v);
        }
    }
    match dtype {
        DType::F32 => each(values, out, f32::to_le_bytes),
        DType::F16 => each(values, out, |v| f16::from_f32(v).to_le_bytes()),
        DType::Bf16 => each(values, out, |v| bf16::from_f32(v).to_le_bytes()),
        DType::Packed(_) => unreachable!("refused by the plan"),
    }
}
