//! Everything that can be wrong between a name and a folder.

use std::io;
use std::path::{Path, PathBuf};

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Not the name of a model.
    #[error("model id: expected org/name (letters, digits, '-', '_', '.'), found {found:?}")]
    Id {
        /// What was given.
        found: String,
    },
    /// Not the name of a branch, tag or commit.
    #[error("revision: expected a branch, tag or commit, found {found:?}")]
    Revision {
        /// What was given.
        found: String,
    },
    /// Not an address.
    #[error("HF_ENDPOINT: expected an http:// or https:// address, found {found:?}")]
    Endpoint {
        /// What was given.
        found: String,
    },
    /// A token that no header can carry (it is not repeated here).
    #[error("HF_TOKEN: expected printable ASCII characters, found others")]
    Token,
    /// No home directory and no variable.
    #[error("Hugging Face cache: expected HF_HOME, HF_HUB_CACHE or a home directory, found none")]
    NoCache,
    /// The hub does not answer.
    #[error("cannot reach {endpoint} ({reason})")]
    Unreachable {
        /// The hub.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// No connection, and the cache cannot stand in.
    #[error(
        "{reason}, and the cache {} holds no complete copy of {id} (revision {revision}, {missing} is missing)",
        .cache.display()
    )]
    Offline {
        /// Why there is no connection.
        reason: String,
        /// The cache.
        cache: PathBuf,
        /// The model.
        id: String,
        /// The revision asked for.
        revision: String,
        /// What the cache lacks.
        missing: String,
    },
    /// No such repository.
    #[error("{endpoint} has no model {id}")]
    NoRepository {
        /// The hub.
        endpoint: String,
        /// The model.
        id: String,
    },
    /// No such branch, tag or commit.
    #[error("{id} has no revision {revision}")]
    NoRevision {
        /// The model.
        id: String,
        /// The revision asked for.
        revision: String,
    },
    /// 401 or 403.
    #[error(
        "{endpoint} denies access to {id} (status {status}): it does not exist, or is private or gated and HF_TOKEN {}",
        if *.token { "does not open it" } else { "is not set" }
    )]
    Denied {
        /// The hub.
        endpoint: String,
        /// The model.
        id: String,
        /// The HTTP status.
        status: u16,
        /// Whether a token was sent.
        token: bool,
    },
    /// The repository lacks a file that every model must have.
    #[error("{id} (revision {revision}) has no {file}")]
    MissingFile {
        /// The model.
        id: String,
        /// The revision asked for.
        revision: String,
        /// The file.
        file: String,
    },
    /// A response that is not one of a hub.
    #[error("{url}: expected {expected}, found {found}")]
    Response {
        /// The address asked.
        url: String,
        /// What should have come.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The list of shards cannot be read.
    #[error("{file}: {reason}")]
    Index {
        /// The index.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A shard name that could lead out of the folder.
    #[error("{index}: expected shard names like model-00001-of-00002.safetensors, found {found:?}")]
    ShardName {
        /// The index.
        index: String,
        /// The name.
        found: String,
    },
    /// The connection broke; what came is kept.
    #[error(
        "{file}: {done} of {} bytes came before the connection broke ({reason}); run again to continue",
        .total.map_or("unknown".to_string(), |n| n.to_string())
    )]
    Interrupted {
        /// The file.
        file: String,
        /// Bytes that are here.
        done: u64,
        /// Its size.
        total: Option<u64>,
        /// Why.
        reason: String,
    },
    /// The server contradicts itself about a file's size.
    #[error("{file}: expected {expected} bytes, found {found}")]
    WrongSize {
        /// The file.
        file: String,
        /// The size in the file's metadata.
        expected: u64,
        /// What was sent, or announced with it.
        found: u64,
    },
    /// Another process is fetching the same file.
    #[error("{file}: another process is downloading it (lock {})", .lock.display())]
    Busy {
        /// The file.
        file: String,
        /// The lock file.
        lock: PathBuf,
    },
    /// The disk.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// Says which path an I/O error is about.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> HubError + '_ {
    move |source| HubError::Io {
        path: path.into(),
        source,
    }
}
