//! Why a model does not open or does not run.

use crate::config::ConfigError;
use crate::family::Family;
use crate::format::WeightFormat;
use crate::image::ImageError;
use crate::text::TextError;
use phidias_engine::backend::DeviceFailed;
#[cfg(feature = "cuda")]
use phidias_engine::backend::cuda::KvTypeRefused;
use phidias_engine::checkpoint::CheckpointError;
use phidias_engine::kv_cache::KvOutOfMemory;
use phidias_engine::memory::DoesNotFit;
#[cfg(feature = "cuda")]
use phidias_engine::memory::{MemoryPlan, Size};
use phidias_engine::pool::PoolError;
use std::path::PathBuf;

/// Why a model does not open or does not run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum Error {
    #[error("{}: no such folder", path.display())]
    NoFolder { path: PathBuf },
    #[error("{}: a file, expected a model folder", path.display())]
    NotAFolder { path: PathBuf },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("{}: the folder has no tokenizer.json or .tiktoken file, so it takes token ids only (phidias logits --tokens)", path.display())]
    NoTokenizer { path: PathBuf },
    #[error("{}: a {family} model reads text only; pictures need a phi3_v model", path.display())]
    NoVision { path: PathBuf, family: Family },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{}: holds {found} weights and cannot be run as {asked}; name the original folder", path.display())]
    Format {
        path: PathBuf,
        asked: WeightFormat,
        found: &'static str,
    },
    #[error("{}: the weights are {found} already; quantize the original folder", path.display())]
    AlreadyPacked { path: PathBuf, found: &'static str },
    #[error("{}: already there; name a folder that does not exist", path.display())]
    Exists { path: PathBuf },
    #[error("{}: needs {needed} bytes, the file system has {available} free", path.display())]
    DiskSpace {
        path: PathBuf,
        needed: u64,
        available: u64,
    },
    #[error("{asked} layers: expected 1 to {max}, the layers of {preset}")]
    Layers {
        preset: &'static str,
        asked: usize,
        max: usize,
    },
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "context of {asked} positions: expected 1 to {max}, the model's max_position_embeddings"
    )]
    Context { asked: usize, max: usize },
    #[error("the sequence has {tokens} tokens, the context holds {context}")]
    TooLong { tokens: usize, context: usize },
    #[error("token {id} is outside the vocabulary of {vocab}")]
    TokenId { id: u32, vocab: usize },
    #[error("no tokens")]
    NoTokens,
    #[error("{}: logits after token {position} of the text: expected finite numbers, found others", path.display())]
    NotFinite { path: PathBuf, position: usize },
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Memory(#[from] DoesNotFit),
    #[error(transparent)]
    Kv(#[from] KvOutOfMemory),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Device(#[from] DeviceFailed),
    #[cfg(feature = "cuda")]
    #[error("{}: {reason}", path.display())]
    DeviceHeads { path: PathBuf, reason: String },
    #[cfg(feature = "cuda")]
    #[error("{device}: not enough memory: the weights take {}, {} are free", Size(*needed), Size(*free))]
    DeviceWeights {
        device: String,
        needed: usize,
        free: usize,
    },
    #[cfg(feature = "cuda")]
    #[error("{device}: not enough memory: {plan}; beside the weights {} are free", Size(*free))]
    DevicePlan {
        device: String,
        plan: Box<MemoryPlan>,
        free: usize,
    },
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    DeviceKv(#[from] KvTypeRefused),
}
