//! Checkpoints: named tensors in one or several mapped `.safetensors` files.
//!
//! The container (<https://github.com/huggingface/safetensors>): 8 bytes header length, little
//! endian; a JSON header that gives each tensor's dtype, shape and byte range; the data. Every rule
//! of it, and of the index of a sharded checkpoint, is checked here, once; what comes out are
//! [`Tensor`]s that need no second look.

use crate::bytes::Bytes;
use crate::cancel::Cancel;
use crate::files::{MAX_INDEX_BYTES, read_at_most};
use crate::huge::OwnedBytes;
use crate::pool::Pool;
use crate::tensor::{DType, Tensor};
use phidias_quant::{ALIGN, Format, PackError, Packed, PackedLayout, packed};
use rayon::prelude::*;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

pub mod map;
pub mod prepack;

/// The single-file name of the Hugging Face layout.
pub const SINGLE: &str = "model.safetensors";
/// The index of the sharded layout.
pub const INDEX: &str = "model.safetensors.index.json";
/// Metadata key that holds the version of the packed order.
const VERSION_KEY: &str = "phidias.packed_version";
/// Metadata key that holds the packed tensors: `{"name": ["q4", rows, cols], ..}`.
const PACKED_KEY: &str = "phidias.packed";
/// A header longer than this is refused, as by the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// Why a checkpoint, or a tensor of it, is refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum CheckpointError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: no {SINGLE} and no {INDEX}: not a model folder{}", path.display(), Foreign(foreign))]
    NoWeights {
        path: PathBuf,
        foreign: Option<String>,
    },
    #[error("{}: {found} bytes, too short for a safetensors file (truncated?)", path.display())]
    TooShort { path: PathBuf, found: u64 },
    #[error("{}: header of {header} bytes does not fit a file of {found} bytes (truncated, or not a safetensors file)", path.display())]
    HeaderLength {
        path: PathBuf,
        header: u64,
        found: u64,
    },
    #[error("{}: bad safetensors header: {reason}", path.display())]
    Header { path: PathBuf, reason: String },
    #[error("{}: tensor '{tensor}' appears twice", path.display())]
    DuplicateTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor data ends at byte {expected}, file has {found} bytes ({})", path.display(), if found < expected { "truncated" } else { "overlong" })]
    FileLength {
        path: PathBuf,
        expected: u64,
        found: u64,
    },
    #[error("{}: tensor '{tensor}' starts at byte {offset}, which is not a multiple of {align} as {dtype} needs", path.display())]
    Misaligned {
        path: PathBuf,
        tensor: String,
        offset: usize,
        align: usize,
        dtype: DType,
    },
    #[error("{}: tensor '{tensor}' has dtype {found}, which is not supported (expected F32, F16, BF16 or a packed format)", path.display())]
    DTypeUnsupported {
        path: PathBuf,
        tensor: String,
        found: String,
    },
    #[error("{}: bad index: {reason}", path.display())]
    Index { path: PathBuf, reason: String },
    #[error("{}: shard name '{name}' is refused: expected a plain file name ending in .safetensors", path.display())]
    ShardName { path: PathBuf, name: String },
    #[error("{}: shard '{name}' is missing", path.display())]
    MissingShard { path: PathBuf, name: String },
    #[error("{}: the index puts tensor '{tensor}' into '{shard}', which does not have it", path.display())]
    NotInShard {
        path: PathBuf,
        tensor: String,
        shard: String,
    },
    #[error("{}: packed with version {found} of the format, this program reads version {expected}; quantize the original again", path.display())]
    PackedVersion {
        path: PathBuf,
        expected: u32,
        found: String,
    },
    #[error("{}: tensor '{tensor}': {source}", path.display())]
    Packed {
        path: PathBuf,
        tensor: String,
        source: PackError,
    },
    #[error("{}: tensor '{tensor}' is missing", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor '{tensor}' has shape {found:?}, expected {expected:?}", path.display())]
    Shape {
        path: PathBuf,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("{}: tensor '{tensor}' is {found}, expected {expected}", path.display())]
    DType {
        path: PathBuf,
        tensor: String,
        expected: &'static str,
        found: DType,
    },
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory { what: String, bytes: usize },
    #[error("{}: tensor '{tensor}' cannot be stored as {format}: {source}", path.display())]
    Unpackable {
        path: PathBuf,
        tensor: String,
        format: &'static str,
        source: PackError,
    },
    #[error("cancelled")]
    Cancelled,
}

type Result<T> = std::result::Result<T, CheckpointError>;

/// The end of [`CheckpointError::NoWeights`].
struct Foreign<'a>(&'a Option<String>);

impl fmt::Display for Foreign<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(name) => write!(f, " ({name} is there, but only safetensors files are read)"),
            None => Ok(()),
        }
    }
}

/// The first file of a folder that looks like weights of another kind.
fn foreign_weights(folder: &Path) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.filter_map(|entry| {
        let path = entry.ok()?.path();
        let kind = path.extension()?.to_str()?;
        let foreign = ["gguf", "bin", "pt", "pth", "onnx", "h5", "npz"].contains(&kind);
        foreign.then(|| {
            path.file_name()
                .map(|name| name.to_string_lossy().into_owned())
        })?
    });
    names.min()
}

/// Named tensors, every range checked.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The folder or file, for messages.
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Maps the weights of a model folder: `model.safetensors`, or the shards of the index.
    /// # Errors
    /// One variant of [`CheckpointError`] per cause.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        // A link into nowhere is there: its error names it.
        let is_there = |file: &Path| file.symlink_metadata().is_ok();
        if is_there(&single) {
            let tensors = read_file(&single)?.into_iter().collect();
            return Ok(Self {
                path: folder.to_owned(),
                tensors,
            });
        }
        let index = folder.join(INDEX);
        if !is_there(&index) {
            return Err(CheckpointError::NoWeights {
                path: folder.to_owned(),
                foreign: foreign_weights(folder),
            });
        }
        Ok(Self {
            path: folder.to_owned(),
            tensors: read_shards(folder, &index)?,
        })
    }

    /// Maps one safetensors file.
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_file(file: &Path) -> Result<Self> {
        Ok(Self {
            path: file.to_owned(),
            tensors: read_file(file)?.into_iter().collect(),
        })
    }

    /// A checkpoint over bytes in memory that hold one safetensors file; `name` is for messages.
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(name: &str, bytes: Bytes) -> Result<Self> {
        let path = PathBuf::from(name);
        let tensors = read_container(&path, &bytes)?.into_iter().collect();
        Ok(Self { path, tensors })
    }

    /// The same tensors in memory of this process, on huge pages where they can be had.
    /// # Errors
    /// A file that cannot be read, memory that cannot be had, cancellation.
    pub fn copied(
        &self,
        pool: &Pool,
        cancel: &Cancel,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        /// Bytes that one thread reads at a time.
        const RUN: usize = 2 << 20;
        let places: Vec<_> = (self.tensors.values())
            .scan(0usize, |end, tensor| {
                let first = end.next_multiple_of(ALIGN);
                *end = first + tensor.bytes().len();
                Some(first..*end)
            })
            .collect();
        let total = places.last().map_or(0, |place| place.end);
        let io = |source| CheckpointError::Io {
            path: self.path.clone(),
            source,
        };
        let mut copy = OwnedBytes::zeroed(total).map_err(|_| CheckpointError::OutOfMemory {
            what: "a copy of the weights".into(),
            bytes: total,
        })?;
        for (tensor, place) in self.tensors.values().zip(&places) {
            let out = &mut copy[place.clone()];
            // Enough for every thread, few enough to hear a cancellation.
            let step = RUN * 8 * pool.threads();
            for (i, out) in out.chunks_mut(step).enumerate() {
                if cancel.is_cancelled() {
                    return Err(CheckpointError::Cancelled);
                }
                let end = i * step + out.len();
                pool.install(|| {
                    let runs = out.par_chunks_mut(RUN).enumerate();
                    runs.try_for_each(|(run, out)| tensor.bytes().read(i * step + run * RUN, out))
                })
                .map_err(io)?;
                progress(place.start + end, total);
            }
        }
        let copy = Bytes::from(copy);
        let tensors = (self.tensors.iter().zip(places))
            .map(|((name, tensor), place)| {
                let shape = tensor.shape().to_vec();
                let tensor = Tensor::new(tensor.dtype(), shape, copy.slice(place));
                (name.clone(), tensor)
            })
            .collect();
        Ok(Self {
            path: self.path.clone(),
            tensors,
        })
    }

    /// The folder or file it came from, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor, in the order of names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor of that name, if there is one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The tensor of that name, which must have that shape.
    /// # Errors
    /// [`CheckpointError::MissingTensor`] or [`CheckpointError::Shape`].
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&Tensor> {
        let tensor = self
            .get(name)
            .ok_or_else(|| CheckpointError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            })?;
        if tensor.shape() == shape {
            return Ok(tensor);
        }
        Err(CheckpointError::Shape {
            path: self.path.clone(),
            tensor: name.to_owned(),
            expected: shape.to_vec(),
            found: tensor.shape().to_vec(),
        })
    }

    /// The vector of that name as f32, `[len]`.
    /// # Errors
    /// As [`Checkpoint::tensor`], or [`CheckpointError::DType`] for a packed one.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, &[len])?;
        let mut values = vec![0.0; len];
        if tensor.widen(0, &mut values) {
            return Ok(values);
        }
        Err(CheckpointError::DType {
            path: self.path.clone(),
            tensor: name.to_owned(),
            expected: "F32, F16 or BF16",
            found: tensor.dtype(),
        })
    }

    /// The packed format of its matrices, if any tensor is packed.
    #[must_use]
    pub fn packed_format(&self) -> Option<Format> {
        self.tensors.values().find_map(|t| match t.dtype() {
            DType::Packed(format) => Some(format),
            _ => None,
        })
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.bytes().len()).sum()
    }
}

fn read_shards(folder: &Path, index: &Path) -> Result<BTreeMap<String, Tensor>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = read_at_most(index, MAX_INDEX_BYTES).map_err(|source| CheckpointError::Io {
        path: index.to_owned(),
        source,
    })?;
    let parsed: Index = serde_json::from_slice(&text).map_err(|e| CheckpointError::Index {
        path: index.to_owned(),
        reason: e.to_string(),
    })?;
    if parsed.weight_map.is_empty() {
        return Err(CheckpointError::Index {
            path: index.to_owned(),
            reason: "weight_map is empty".into(),
        });
    }
    let mut shard_of: HashMap<String, &str> = HashMap::new();
    let mut tensors = BTreeMap::new();
    let mut names: Vec<_> = parsed.weight_map.values().collect();
    names.sort();
    names.dedup();
    for name in names {
        if !is_plain_shard_name(name) {
            return Err(CheckpointError::ShardName {
                path: index.to_owned(),
                name: name.clone(),
            });
        }
        let path = folder.join(name);
        if !path.exists() {
            return Err(CheckpointError::MissingShard {
                path: index.to_owned(),
                name: name.clone(),
            });
        }
        for (tensor, view) in read_file(&path)? {
            if shard_of.insert(tensor.clone(), name).is_some() {
                return Err(CheckpointError::DuplicateTensor { path, tensor });
            }
            tensors.insert(tensor, view);
        }
    }
    for (tensor, shard) in &parsed.weight_map {
        if shard_of.get(tensor) != Some(&shard.as_str()) {
            let (tensor, shard) = (tensor.clone(), shard.clone());
            return Err(CheckpointError::NotInShard {
                path: index.to_owned(),
                tensor,
                shard,
            });
        }
    }
    Ok(tensors)
}

/// A shard is a plain file beside the index: no separator of any system, no `..`, no drive.
/// The file itself may be a link, as all files of the hub's cache are.
#[must_use]
pub fn is_plain_shard_name(name: &str) -> bool {
    name.strip_suffix(".safetensors")
        .is_some_and(|stem| !stem.is_empty())
        && name.len() <= 255
        && !name.contains(['/', '\\', ':', '\0'])
        && !name.starts_with('.')
}

fn read_file(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let io = |source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    };
    let file = fs::metadata(path).map_err(io)?;
    if file.is_dir() {
        return Err(io(io::ErrorKind::IsADirectory.into()));
    }
    let length = file.len();
    if length < 8 {
        // An empty file cannot be mapped at all.
        return Err(CheckpointError::TooShort {
            path: path.to_owned(),
            found: length,
        });
    }
    read_container(path, &Bytes::from(map::Map::open(path).map_err(io)?))
}

/// Reads one container. `path` is for messages.
fn read_container(path: &Path, bytes: &Bytes) -> Result<Vec<(String, Tensor)>> {
    let found = bytes.len() as u64;
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(CheckpointError::TooShort {
            path: path.to_owned(),
            found,
        });
    };
    let header = u64::from_le_bytes(*length);
    if header > MAX_HEADER || header > rest.len() as u64 {
        return Err(CheckpointError::HeaderLength {
            path: path.to_owned(),
            header,
            found,
        });
    }
    let data = 8 + header as usize;
    let json = &bytes[8..data];
    let bad = |reason: String| CheckpointError::Header {
        path: path.to_owned(),
        reason,
    };
    if let Some(tensor) = duplicate_key(json) {
        return Err(CheckpointError::DuplicateTensor {
            path: path.to_owned(),
            tensor,
        });
    }
    let (_, metadata) = match safetensors::SafeTensors::read_metadata(bytes) {
        Ok(read) => read,
        Err(safetensors::SafeTensorError::MetadataIncompleteBuffer) => {
            let expected = (data as u64).saturating_add(data_end(json));
            return Err(CheckpointError::FileLength {
                path: path.to_owned(),
                expected,
                found,
            });
        }
        Err(e) => return Err(bad(layout_fault(json).unwrap_or_else(|| e.to_string()))),
    };
    let none = HashMap::new();
    let notes = metadata.metadata().as_ref().unwrap_or(&none);
    let packed = packed_table(path, notes)?;
    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let info = metadata.info(&name).expect("a name of this header");
        let (start, end) = info.data_offsets;
        let offset = data + start;
        let (dtype, shape) = match (packed.get(&name), info.dtype) {
            (Some(layout), safetensors::Dtype::U8) => (
                DType::Packed(layout.format()),
                vec![layout.rows(), layout.cols()],
            ),
            (None, safetensors::Dtype::F32) => (DType::F32, info.shape.clone()),
            (None, safetensors::Dtype::F16) => (DType::F16, info.shape.clone()),
            (None, safetensors::Dtype::BF16) => (DType::Bf16, info.shape.clone()),
            (_, other) => {
                let found = format!("{other:?}");
                return Err(CheckpointError::DTypeUnsupported {
                    path: path.to_owned(),
                    tensor: name,
                    found,
                });
            }
        };
        let view = bytes.slice(offset..data + end);
        // The address is what counts; a mapped or aligned file puts it where the offset says.
        if !(view.as_ptr() as usize).is_multiple_of(dtype.align()) {
            let (path, align) = (path.to_owned(), dtype.align());
            return Err(CheckpointError::Misaligned {
                path,
                tensor: name,
                offset,
                align,
                dtype,
            });
        }
        if let Some(layout) = packed.get(&name) {
            Packed::new(*layout, &view).map_err(|source| CheckpointError::Packed {
                path: path.to_owned(),
                tensor: name.clone(),
                source,
            })?;
        }
        tensors.push((name, Tensor::new(dtype, shape, view)));
    }
    if let Some(name) = packed.keys().find(|name| metadata.info(name).is_none()) {
        return Err(bad(format!(
            "the packed table names '{name}', which is not in the file"
        )));
    }
    Ok(tensors)
}

/// The layouts of the packed tensors, from the metadata that `quantize` writes.
fn packed_table(
    path: &Path,
    notes: &HashMap<String, String>,
) -> Result<HashMap<String, PackedLayout>> {
    let Some(version) = notes.get(VERSION_KEY) else {
        return Ok(HashMap::new());
    };
    if version.parse() != Ok(packed::VERSION) {
        return Err(CheckpointError::PackedVersion {
            path: path.to_owned(),
            expected: packed::VERSION,
            found: version.clone(),
        });
    }
    let bad = |reason: String| CheckpointError::Header {
        path: path.to_owned(),
        reason,
    };
    let table = notes
        .get(PACKED_KEY)
        .ok_or_else(|| bad(format!("no {PACKED_KEY} in the metadata")))?;
    let table: BTreeMap<String, (String, usize, usize)> =
        serde_json::from_str(table).map_err(|e| bad(format!("{PACKED_KEY}: {e}")))?;
    (table.into_iter())
        .map(|(name, (format, rows, cols))| {
            let format = Format::from_name(&format).ok_or_else(|| {
                bad(format!(
                    "tensor '{name}' has unknown packed format '{format}'"
                ))
            })?;
            let layout = PackedLayout::new(format, rows, cols).map_err(|source| {
                CheckpointError::Packed {
                    path: path.to_owned(),
                    tensor: name.clone(),
                    source,
                }
            })?;
            Ok((name, layout))
        })
        .collect()
}

/// A key that stands twice in a JSON object. Parsers keep the last one silently, which would let
/// two readers of one file see different weights.
fn duplicate_key(json: &[u8]) -> Option<String> {
    struct Keys;
    impl<'de> serde::de::Visitor<'de> for Keys {
        type Value = Option<String>;
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: serde::de::MapAccess<'de>>(
            self,
            mut map: A,
        ) -> std::result::Result<Self::Value, A::Error> {
            let mut seen = std::collections::HashSet::new();
            let mut twice = None;
            while let Some(key) = map.next_key::<String>()? {
                map.next_value::<serde::de::IgnoredAny>()?;
                if !seen.insert(key.clone()) {
                    twice.get_or_insert(key);
                }
            }
            Ok(twice)
        }
    }
    let mut parser = serde_json::Deserializer::from_slice(json);
    serde::Deserializer::deserialize_map(&mut parser, Keys)
        .ok()
        .flatten()
}

/// The first tensor whose bytes are not where and as many as the container asks: without overlap or
/// hole, and as its dtype and shape say. The container's own reader refuses it, but not by name.
fn layout_fault(json: &[u8]) -> Option<String> {
    let mut header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(json).ok()?;
    header.remove("__metadata__");
    let mut tensors = Vec::new();
    for (name, value) in header {
        match serde_json::from_value::<safetensors::tensor::TensorInfo>(value) {
            Ok(info) => tensors.push((info.data_offsets, name, info)),
            Err(e) => return Some(format!("tensor '{name}': {e}")),
        }
    }
    tensors.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let mut expected = 0;
    for ((start, end), name, info) in tensors {
        if start != expected {
            let fault = if start < expected { "overlap" } else { "hole" };
            return Some(format!(
                "tensor '{name}' starts at byte {start} of the data, expected {expected} ({fault})"
            ));
        }
        let bits = (info.shape.iter()).try_fold(info.dtype.bitsize(), |n, d| n.checked_mul(*d));
        let found = end.checked_sub(start);
        if bits.is_none() || found.is_none() || found.and_then(|n| n.checked_mul(8)) != bits {
            let (dtype, shape) = (info.dtype, &info.shape);
            let bytes = bits.map_or("more than fits in memory".into(), |b| (b / 8).to_string());
            return Some(format!(
                "tensor '{name}' has bytes {start}..{end}, expected {bytes} bytes for {dtype} {shape:?}"
            ));
        }
        expected = end;
    }
    None
}

/// Where the data of a header's tensors ends, for the message about a file of the wrong length.
fn data_end(json: &[u8]) -> u64 {
    let header: HashMap<String, serde_json::Value> =
        serde_json::from_slice(json).unwrap_or_default();
    header
        .values()
        .filter_map(|t| t["data_offsets"][1].as_u64())
        .max()
        .unwrap_or(0)
}
