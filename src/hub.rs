//! Models by name: `org/name` is fetched from the Hugging Face hub into its usual cache folder.
//!
//! The folder has the layout that every Hugging Face library shares, so a model that another one
//! downloaded is used as it is, and the other way round:
//!
//! ```text
//! models--org--name/
//!   blobs/<etag>               the files; <etag>.part one that is not complete yet, <etag>.lock its lock
//!   snapshots/<commit>/<file>  links to the blobs
//!   refs/<revision>            the commit that a branch or tag stood for
//!   .no_exist/<commit>/<file>  an empty mark: the repository has no such file
//! ```
//!
//! Paths and URLs are built by `hf-hub`; the transfer is done here, because hf-hub 0.5 has no
//! timeouts, does not compare the size of what arrived, appends to a partial file even when the
//! server ignores the range that was asked for, and uses the server's ETag as a file name unseen.
//!
//! A revision is resolved to its commit once and every file is taken from that commit. Only what the
//! engine reads is fetched. `refs` is written last, so a revision in the cache is a complete one. What
//! is in a file is trusted to the transport (TLS) and the ETag; checkpoints are checked when opened.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

const ENDPOINT: &str = "https://huggingface.co";
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
/// What Phi-3-small has instead of a `tokenizer.json`.
const TIKTOKEN: &str = "cl100k_base.tiktoken";

/// Files that are taken along if the repository has them.
const OPTIONAL: [&str; 7] = [
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
];

/// An index names some hundreds of tensors; nothing honest comes near this.
const INDEX_LIMIT: u64 = 64 << 20;
const REDIRECTS: usize = 5;

/// Where to fetch from, where to, and how patiently.
#[derive(Clone)]
pub struct HubOptions {
    /// `http://` or `https://` address of the hub.
    pub endpoint: String,
    /// The cache: the folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// Access token for private and gated models; sent to the endpoint and nobody else.
    pub token: Option<String>,
    /// Use the cache and make no connection.
    pub offline: bool,
    /// How often a transfer that broke off is taken up again, counted anew whenever bytes came.
    pub retries: u32,
    /// How long connecting, a response or the next bytes of a file may take. A transfer that moves
    /// may take any time in all.
    pub timeout: Duration,
}

impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "(not shown)"))
            .field("offline", &self.offline)
            .field("retries", &self.retries)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl HubOptions {
    /// The public hub and this cache, without a token.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: ENDPOINT.into(),
            cache: cache.into(),
            token: None,
            offline: false,
            retries: 5,
            timeout: Duration::from_secs(30),
        }
    }

    /// As the environment says, in the way of `huggingface_hub`: the endpoint from `HF_ENDPOINT`; the
    /// cache from `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in `huggingface` in `XDG_CACHE_HOME` or in
    /// `~/.cache`; the token from `HF_TOKEN`, or the file `HF_TOKEN_PATH`, or `token` beside `hub`;
    /// offline with `HF_HUB_OFFLINE=1`. A variable that is empty counts as not set.
    ///
    /// # Errors
    /// When nothing says where the cache is.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_vars(|name| std::env::var_os(name), std::env::home_dir())
    }

    fn from_vars(
        var: impl Fn(&str) -> Option<OsString>,
        user: Option<PathBuf>,
    ) -> Result<Self, HubError> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| var(name).map(|value| value.to_string_lossy().trim().to_string());
        let path = |name: &str| var(name).map(PathBuf::from);
        let home = path("HF_HOME").or_else(|| {
            path("XDG_CACHE_HOME")
                .or_else(|| user.map(|user| user.join(".cache")))
                .map(|cache| cache.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
            .ok_or(HubError::NoCache)?;
        let mut options = Self::new(cache);
        options.endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        options.token = text("HF_TOKEN")
            .or_else(|| Some(fs::read_to_string(token_file?).ok()?.trim().to_string()))
            .filter(|token| !token.is_empty());
        options.offline = text("HF_HUB_OFFLINE").is_some_and(|value| {
            ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
        });
        Ok(options)
    }
}

/// How far a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Its name in the repository.
    pub file: &'a str,
    /// Bytes that are here, those of an earlier run included.
    pub done: u64,
    /// Its size, if the server says.
    pub total: Option<u64>,
}

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

/// Whether `s` names a model on the hub rather than a folder: `org/name` in the hub's own rules, and
/// no file or folder of that name here.
pub fn is_model_id(s: &str) -> bool {
    legal_id(s) && !Path::new(s).exists()
}

/// The hub's rules: letters, digits, `-`, `_`, `.`; no `--` or `..`; no `-` or `.` at either end of a
/// part; at most 96 characters.
fn legal_id(s: &str) -> bool {
    let part = |part: &str| {
        name_like(part)
            && !part.starts_with('-')
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    s.len() <= 96
        && s.split_once('/')
            .is_some_and(|(org, name)| part(org) && part(name))
}

/// Letters, digits, `-`, `_`, `.`, and no leading dot: safe as one component of a path and of a URL
/// on every system.
fn name_like(s: &str) -> bool {
    !s.is_empty()
        && s.len() <= 255
        && !s.starts_with('.')
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Branches and tags may have several components (`refs/pr/1`).
fn legal_revision(s: &str) -> bool {
    s.len() <= 255 && s.split('/').all(name_like)
}

fn is_commit(s: &str) -> bool {
    s.len() == 40 && s.bytes().all(|b| b.is_ascii_hexdigit())
}

fn legal_shard(s: &str) -> bool {
    name_like(s) && s.ends_with(".safetensors") && s.len() > ".safetensors".len()
}

/// Fetches what is needed of model `id` at `revision` (a branch, tag or commit; `main` if absent) and
/// returns the folder that holds it. What is in the cache already is not fetched again, an
/// interrupted file continues where it stopped, and without a connection a complete copy in the cache
/// is used.
///
/// # Errors
/// See [`HubError`]. No incomplete file is ever left under its final name.
pub fn fetch(
    id: &str,
    revision: Option<&str>,
    options: &HubOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, HubError> {
    let revision = revision.unwrap_or("main");
    if !legal_id(id) {
        return Err(HubError::Id { found: id.into() });
    }
    if !legal_revision(revision) {
        return Err(HubError::Revision {
            found: revision.into(),
        });
    }
    let local = Local::new(id, revision, &options.cache);
    if is_commit(revision) && local.knows_all(revision) {
        return Ok(local.cache.pointer_path(revision)); // a commit never changes
    }
    if options.offline {
        return local.stand_in("HF_HUB_OFFLINE is set".into());
    }
    let remote = Remote::new(options)?;
    match download(&local, &remote, progress) {
        Err(error @ HubError::Unreachable { .. }) => local.stand_in(error.to_string()),
        result => result,
    }
}

fn download(
    local: &Local,
    remote: &Remote<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, HubError> {
    let missing = |file: &str| HubError::MissingFile {
        id: local.id.clone(),
        revision: local.revision.clone(),
        file: file.into(),
    };
    let head = remote.metadata(local, &local.revision, CONFIG)?;
    let head = head.ok_or_else(|| missing(CONFIG))?;
    let commit = head.commit.clone();
    let mut get = |file: &str, found: Found| match found {
        Found::Here => Ok(()),
        Found::There(meta) => local.fetch(remote, &commit, file, &meta, progress),
    };
    get(CONFIG, Found::There(head))?;
    let find = |file: &str| local.find(remote, &commit, file);

    for file in OPTIONAL {
        match find(file)? {
            Some(found) => get(file, found)?,
            None if file == TOKENIZER => {
                if let Some(found) = find(TIKTOKEN)? {
                    get(TIKTOKEN, found)?;
                }
            }
            None => {}
        }
    }
    if let Some(found) = find(WEIGHTS)? {
        get(WEIGHTS, found)?;
    } else {
        let none = || missing(&format!("{WEIGHTS} or {INDEX}"));
        get(INDEX, find(INDEX)?.ok_or_else(none)?)?;
        // Every shard is looked for before the first gigabyte is fetched.
        let mut shards = Vec::new();
        for shard in shards_of(&local.cache.pointer_path(&commit).join(INDEX))? {
            let found = find(&shard)?.ok_or_else(|| missing(&shard))?;
            shards.push((shard, found));
        }
        for (shard, found) in shards {
            get(&shard, found)?;
        }
    }
    local.remember(&commit)?;
    Ok(local.cache.pointer_path(&commit))
}

/// The shards an index names, each a plain file name.
fn shards_of(index: &Path) -> Result<BTreeSet<String>, HubError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let file = index.display().to_string();
    let bad = |reason: String| HubError::Index {
        file: file.clone(),
        reason,
    };
    let mut text = Vec::new();
    let reader = File::open(index).map_err(at(index))?;
    reader
        .take(INDEX_LIMIT + 1)
        .read_to_end(&mut text)
        .map_err(at(index))?;
    if text.len() as u64 > INDEX_LIMIT {
        return Err(bad(format!("expected at most {INDEX_LIMIT} bytes")));
    }
    let parsed: Index = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if let Some(found) = shards.iter().find(|name| !legal_shard(name)) {
        return Err(HubError::ShardName {
            index: file,
            found: found.clone(),
        });
    }
    if shards.is_empty() {
        return Err(bad("expected at least one shard, found none".into()));
    }
    Ok(shards)
}

/// Says which path an I/O error is about.
fn at(path: &Path) -> impl FnOnce(io::Error) -> HubError + '_ {
    move |source| HubError::Io {
        path: path.into(),
        source,
    }
}

/// What the hub says about a file before sending it.
#[derive(Clone, Debug)]
struct Metadata {
    commit: String,
    etag: String,
    size: Option<u64>,
}

/// Where a file is.
enum Found {
    Here,
    There(Metadata),
}

/// The model's folder in the cache.
struct Local {
    id: String,
    revision: String,
    root: PathBuf, // <cache>/models--org--name
    cache_dir: PathBuf,
    cache: CacheRepo,
}

impl Local {
    fn new(id: &str, revision: &str, cache_dir: &Path) -> Self {
        let repo = Repo::with_revision(id.into(), RepoType::Model, revision.into());
        Self {
            id: id.into(),
            revision: revision.into(),
            root: cache_dir.join(repo.folder_name()),
            cache_dir: cache_dir.into(),
            cache: Cache::new(cache_dir.into()).repo(repo),
        }
    }

    /// The commit that the revision stood for when it was last fetched.
    fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let text = fs::read_to_string(self.root.join("refs").join(&self.revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| name_like(commit))
    }

    fn remember(&self, commit: &str) -> Result<(), HubError> {
        if self.commit().as_deref() == Some(commit) {
            return Ok(());
        }
        let refs = self.root.join("refs").join(&self.revision);
        self.cache.create_ref(commit).map_err(at(&refs))
    }

    /// The first file without which a model cannot be opened, if the snapshot lacks one.
    fn lacks(&self, commit: &str) -> Option<String> {
        let folder = self.cache.pointer_path(commit);
        let lacks = |file: &str| !folder.join(file).is_file();
        if lacks(CONFIG) {
            return Some(CONFIG.into());
        }
        if !lacks(WEIGHTS) {
            return None;
        }
        if lacks(INDEX) {
            return Some(WEIGHTS.into());
        }
        match shards_of(&folder.join(INDEX)) {
            Ok(shards) => shards.into_iter().find(|shard| lacks(shard)),
            Err(_) => Some(format!("a readable {INDEX}")),
        }
    }

    /// Whether the snapshot is complete and every optional file is either here or known not to exist.
    fn knows_all(&self, commit: &str) -> bool {
        let folder = self.cache.pointer_path(commit);
        let known =
            |file: &str| folder.join(file).is_file() || self.no_exist(commit, file).exists();
        self.lacks(commit).is_none() && OPTIONAL.iter().all(|file| known(file))
    }

    /// What the cache has of the revision, in place of a connection.
    fn stand_in(&self, reason: String) -> Result<PathBuf, HubError> {
        let missing = match self.commit() {
            None => "all of it".into(),
            Some(commit) => match self.lacks(&commit) {
                None => return Ok(self.cache.pointer_path(&commit)),
                Some(file) => file,
            },
        };
        Err(HubError::Offline {
            reason,
            cache: self.cache_dir.clone(),
            id: self.id.clone(),
            revision: self.revision.clone(),
            missing,
        })
    }

    fn no_exist(&self, commit: &str, file: &str) -> PathBuf {
        self.root.join(".no_exist").join(commit).join(file)
    }

    /// Looks for a file, here first; `None` if the repository lacks it.
    fn find(
        &self,
        remote: &Remote<'_>,
        commit: &str,
        file: &str,
    ) -> Result<Option<Found>, HubError> {
        if self.cache.pointer_path(commit).join(file).is_file() {
            return Ok(Some(Found::Here));
        }
        let mark = self.no_exist(commit, file);
        if mark.exists() {
            return Ok(None);
        }
        let found = remote.metadata(self, commit, file)?;
        if found.is_none() {
            // Only saves asking again, so a cache that cannot be written to is no fault here.
            let _ = mark.parent().map(fs::create_dir_all);
            let _ = File::create(&mark);
        }
        Ok(found.map(Found::There))
    }

    /// Brings a file into the snapshot: nothing to do if it is there in its full size.
    fn fetch(
        &self,
        remote: &Remote<'_>,
        commit: &str,
        file: &str,
        meta: &Metadata,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), HubError> {
        let folder = self.cache.pointer_path(commit);
        let pointer = folder.join(file);
        let whole = |path: &Path| {
            path.metadata()
                .is_ok_and(|here| here.is_file() && meta.size.is_none_or(|size| here.len() == size))
        };
        if whole(&pointer) {
            return Ok(());
        }
        let blob = self.cache.blob_path(&meta.etag);
        let blobs = self.root.join("blobs");
        fs::create_dir_all(&blobs).map_err(at(&blobs))?;
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let beside = |ending: &str| blobs.join(format!("{}.{ending}", meta.etag));
        let _lock = lock(file, &beside("lock"), remote.options.timeout)?;
        if !whole(&blob) {
            let part = beside("part");
            let url = remote.url(self, commit, file);
            remote.transfer(self, &url, file, meta.size, &part, progress)?;
            fs::rename(&part, &blob).map_err(at(&blob))?;
        }
        link(&meta.etag, &blob, &pointer).map_err(at(&pointer))
    }
}

/// Waits for the lock of a file; it is released when dropped, or when the process ends.
fn lock(file: &str, path: &Path, patience: Duration) -> Result<File, HubError> {
    let handle = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(at(path))?;
    let deadline = Instant::now() + patience;
    loop {
        match handle.try_lock() {
            Ok(()) => return Ok(handle),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(HubError::Busy {
                    file: file.into(),
                    lock: path.into(),
                });
            }
            Err(TryLockError::Error(error)) => return Err(at(path)(error)),
        }
    }
}

/// Puts the blob under its name in the snapshot, replacing a link that led nowhere.
#[cfg(unix)]
fn link(etag: &str, _blob: &Path, pointer: &Path) -> io::Result<()> {
    let target = Path::new("../../blobs").join(etag);
    let mut new = pointer.as_os_str().to_owned();
    new.push(format!(".{}.link", std::process::id()));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new)?;
    fs::rename(&new, pointer)
}

/// Puts the blob under its name in the snapshot. Without links, as hf-hub does: the file itself.
#[cfg(not(unix))]
fn link(_etag: &str, blob: &Path, pointer: &Path) -> io::Result<()> {
    fs::rename(blob, pointer)
}

/// A connection to the hub.
struct Remote<'a> {
    options: &'a HubOptions,
    endpoint: String,
    agent: Agent,
}

/// The end of a chain of redirects, and what the hub itself said on the way.
struct Reply {
    response: Response<Body>,
    commit: Option<String>,
    etag: Option<String>,
    size: Option<u64>,
}

impl<'a> Remote<'a> {
    fn new(options: &'a HubOptions) -> Result<Self, HubError> {
        let endpoint = options.endpoint.trim_end_matches('/').to_string();
        let bad = || HubError::Endpoint {
            found: options.endpoint.clone(),
        };
        let uri: Uri = endpoint.parse().map_err(|_| bad())?;
        let host = uri.host().ok_or_else(bad)?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(bad());
        }
        let token = options.token.as_deref().unwrap_or_default();
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(HubError::Token);
        }
        let wait = Some(options.timeout);
        let mut config = Agent::config_builder()
            .user_agent(concat!("phidias/", env!("CARGO_PKG_VERSION")))
            // Sizes are those of the files, not of something compressed on the way.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(wait)
            .timeout_connect(wait)
            .timeout_send_request(wait)
            .timeout_recv_response(wait)
            .timeout_per_read(wait);
        let address = host.trim_start_matches('[').trim_end_matches(']');
        let loopback = address
            .parse()
            .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
        if loopback || host == "localhost" {
            config = config.proxy(None); // no proxy knows this machine by that name
        }
        Ok(Self {
            options,
            endpoint,
            agent: config.build().into(),
        })
    }

    fn url(&self, local: &Local, revision: &str, file: &str) -> String {
        let repo = Repo::with_revision(local.id.clone(), RepoType::Model, revision.into());
        let (id, revision) = (repo.url(), repo.url_revision());
        format!("{}/{id}/resolve/{revision}/{file}", self.endpoint)
    }

    fn unreachable(&self, reason: impl ToString) -> HubError {
        HubError::Unreachable {
            endpoint: self.endpoint.clone(),
            reason: reason.to_string(),
        }
    }

    /// Sends a request and follows redirects: with the token as long as they stay with the hub,
    /// without it beyond, and never from https to http. A `HEAD` stops at the door of the hub once
    /// it knows enough, because addresses of storage are often signed for `GET` only.
    fn send(&self, url: &str, from: Option<u64>, head: bool) -> Result<Reply, HubError> {
        let bad = |url: &str, expected, found: String| HubError::Response {
            url: url.into(),
            expected,
            found,
        };
        let (mut commit, mut etag, mut size) = (None, None, None);
        let origin = |uri: &Uri| (uri.scheme().cloned(), uri.authority().cloned());
        let first: Uri = url
            .parse()
            .map_err(|_| bad(url, "an address", url.to_string()))?;
        let mut uri = first.clone();
        for _ in 0..=REDIRECTS {
            let at_hub = origin(&uri) == origin(&first);
            let mut request = if head {
                self.agent.head(&uri)
            } else {
                self.agent.get(&uri)
            };
            if let Some(token) = self.options.token.as_ref().filter(|_| at_hub) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| self.unreachable(error))?;
            let headers = response.headers();
            if at_hub {
                commit = commit.or_else(|| header(headers, "x-repo-commit"));
                size = size.or_else(|| header(headers, "x-linked-size")?.parse().ok());
                etag = header(headers, "x-linked-etag").or(etag);
            }
            let done = |response| Reply {
                response,
                commit: commit.clone(),
                etag: etag.clone(),
                size,
            };
            let location =
                header(headers, "location").filter(|_| response.status().is_redirection());
            let Some(location) = location else {
                return Ok(done(response));
            };
            let to = if location.starts_with('/') && !location.starts_with("//") {
                let (scheme, authority) = origin(&uri);
                Uri::builder()
                    .scheme(scheme.map_or_else(String::new, |s| s.to_string()).as_str())
                    .authority(authority.map_or_else(String::new, |a| a.to_string()))
                    .path_and_query(location.as_str())
                    .build()
                    .ok()
            } else {
                location.parse().ok()
            };
            let secure = |uri: &Uri| uri.scheme_str() == Some("https");
            let to = to
                .filter(|to: &Uri| to.host().is_some() && (secure(to) || !secure(&uri)))
                .ok_or_else(|| bad(url, "a redirect to a safe address", location))?;
            if head && origin(&to) != origin(&first) && etag.is_some() && size.is_some() {
                return Ok(done(response));
            }
            uri = to;
        }
        Err(bad(url, "at most 5 redirects", "more".into()))
    }

    /// Asks about a file; `None` if the repository has no such file.
    fn metadata(
        &self,
        local: &Local,
        revision: &str,
        file: &str,
    ) -> Result<Option<Metadata>, HubError> {
        let url = self.url(local, revision, file);
        let reply = self.send(&url, None, true)?;
        let status = reply.response.status();
        if !status.is_success() && !status.is_redirection() {
            return match self.refusal(local, &url, &reply.response) {
                HubError::MissingFile { .. } => Ok(None),
                error => Err(error),
            };
        }
        let headers = reply.response.headers();
        let bad = |expected, found: Option<String>| HubError::Response {
            url: url.clone(),
            expected,
            found: found.unwrap_or_else(|| "none".into()),
        };
        // Both become names in the cache.
        let commit = reply.commit.filter(|commit| name_like(commit));
        let commit = commit.ok_or_else(|| bad("the header X-Repo-Commit with a commit", None))?;
        let etag = reply.etag.or_else(|| header(headers, "etag"));
        let name = etag.as_deref().map(|etag| {
            let etag = etag.strip_prefix("W/").unwrap_or(etag);
            etag.trim_matches('"').to_string()
        });
        let name = name
            .filter(|name| name_like(name) && name.len() <= 128)
            .ok_or_else(|| bad("an ETag of letters and digits", etag))?;
        let size = reply
            .size
            .or_else(|| header(headers, "content-length")?.parse().ok());
        Ok(Some(Metadata {
            commit,
            etag: name,
            size,
        }))
    }

    /// What a status that is no success means.
    fn refusal(&self, local: &Local, url: &str, response: &Response<Body>) -> HubError {
        let status = response.status().as_u16();
        let code = header(response.headers(), "x-error-code").unwrap_or_default();
        let file = url.rsplit('/').next().unwrap_or_default();
        match (status, code.as_str()) {
            (404, "RepoNotFound") => HubError::NoRepository {
                endpoint: self.endpoint.clone(),
                id: local.id.clone(),
            },
            (404, "RevisionNotFound") => HubError::NoRevision {
                id: local.id.clone(),
                revision: local.revision.clone(),
            },
            (404, _) => HubError::MissingFile {
                id: local.id.clone(),
                revision: local.revision.clone(),
                file: file.into(),
            },
            (401 | 403, _) => HubError::Denied {
                endpoint: self.endpoint.clone(),
                id: local.id.clone(),
                status,
                token: self.options.token.is_some(),
            },
            (429 | 500..=599, _) => self.unreachable(format!("it answers with status {status}")),
            _ => HubError::Response {
                url: url.into(),
                expected: "status 200 or 206",
                found: format!("status {status}"),
            },
        }
    }

    /// Fetches a file to `part`, continuing what is there, until it has its full size.
    fn transfer(
        &self,
        local: &Local,
        url: &str,
        file: &str,
        size: Option<u64>,
        part: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), HubError> {
        let mut out = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(part)
            .map_err(at(part))?;
        let mut attempt = 0;
        loop {
            let before = out.metadata().map_err(at(part))?.len();
            let mut piece = Piece {
                file,
                size,
                part,
                out: &mut out,
                progress: &mut *progress,
            };
            match piece.fetch(self, local, url) {
                Ok(()) => break,
                Err(error @ (HubError::Interrupted { .. } | HubError::Unreachable { .. })) => {
                    let now = out.metadata().map_err(at(part))?.len();
                    attempt = if now > before { 1 } else { attempt + 1 };
                    if attempt > self.options.retries {
                        return Err(match error {
                            HubError::Unreachable { reason, .. } if now > 0 => {
                                HubError::Interrupted {
                                    file: file.into(),
                                    done: now,
                                    total: size,
                                    reason,
                                }
                            }
                            error => error,
                        });
                    }
                    std::thread::sleep(Duration::from_millis(250 << attempt.min(5)));
                }
                Err(error) => {
                    if out.metadata().is_ok_and(|here| here.len() == 0) {
                        let _ = fs::remove_file(part); // nothing to continue from
                    }
                    return Err(error);
                }
            }
        }
        // The rename must not be on the disk before the data.
        out.sync_data().map_err(at(part))
    }
}

/// One attempt at the rest of a file.
struct Piece<'a> {
    file: &'a str,
    size: Option<u64>,
    part: &'a Path,
    out: &'a mut File,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Piece<'_> {
    fn report(&mut self, done: u64) {
        (self.progress)(Progress {
            file: self.file,
            done,
            total: self.size,
        });
    }

    fn wrong(&self, expected: u64, found: u64) -> HubError {
        HubError::WrongSize {
            file: self.file.into(),
            expected,
            found,
        }
    }

    fn cut(&mut self, len: u64) -> Result<(), HubError> {
        self.out.set_len(len).map_err(at(self.part))
    }

    fn fetch(&mut self, remote: &Remote<'_>, local: &Local, url: &str) -> Result<(), HubError> {
        let mut done = self.out.metadata().map_err(at(self.part))?.len();
        if self.size.is_some_and(|size| done > size) {
            self.cut(0)?; // not the beginning of this file
            done = 0;
        }
        if self.size == Some(done) {
            self.report(done);
            return Ok(());
        }
        let reply = remote.send(url, Some(done).filter(|&done| done > 0), false)?;
        let response = reply.response;
        match response.status().as_u16() {
            200 => done = 0, // the whole file, whether or not a part was asked for
            206 => {
                let range = header(response.headers(), "content-range").unwrap_or_default();
                let (start, total) = parse_range(&range).ok_or_else(|| HubError::Response {
                    url: url.into(),
                    expected: "a Content-Range",
                    found: format!("{range:?}"),
                })?;
                if start != done {
                    return Err(HubError::Response {
                        url: url.into(),
                        expected: "the range that was asked for",
                        found: format!("{range:?} for a part from {done}"),
                    });
                }
                if let (Some(size), Some(total)) = (self.size, total)
                    && size != total
                {
                    return Err(self.wrong(size, total));
                }
            }
            416 if done > 0 => {
                self.cut(0)?; // not the beginning of this file either
                return Err(HubError::Interrupted {
                    file: self.file.into(),
                    done: 0,
                    total: self.size,
                    reason: "the server refused to continue the part that was here".into(),
                });
            }
            _ => return Err(remote.refusal(local, url, &response)),
        }
        let length =
            header(response.headers(), "content-length").and_then(|n| n.parse::<u64>().ok());
        let end = length.map(|length| done.saturating_add(length));
        if let (Some(size), Some(end)) = (self.size, end)
            && size != end
        {
            return Err(self.wrong(size, end));
        }
        let end = self.size.or(end);
        self.cut(done)?;
        self.out
            .seek(SeekFrom::Start(done))
            .map_err(at(self.part))?;
        self.report(done);
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 256 << 10];
        let reason = loop {
            match body.read(&mut buffer) {
                Ok(0) => break None,
                Ok(n) => {
                    done += n as u64;
                    if let Some(end) = end.filter(|&end| done > end) {
                        self.cut(0)?;
                        return Err(self.wrong(end, done));
                    }
                    self.out.write_all(&buffer[..n]).map_err(at(self.part))?;
                    self.report(done);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error.to_string()),
            }
        };
        // Without a size from anywhere, an orderly end is all there is to go by.
        let complete = end.map_or(reason.is_none(), |end| done == end);
        if complete {
            return Ok(());
        }
        Err(HubError::Interrupted {
            file: self.file.into(),
            done,
            total: end,
            reason: reason.unwrap_or_else(|| "the server closed it".into()),
        })
    }
}

/// Start and total of `bytes 5-9/10`; the total may be `*`.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_ids_follow_the_rules_of_the_hub() {
        for id in ["microsoft/Phi-3.5-mini-instruct", "a/b", "a_b/c.d-e"] {
            assert!(is_model_id(id), "{id}");
        }
        let long = format!("a/{}", "b".repeat(95));
        for id in [
            "",
            "a",
            "/",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "./b",
            "a/.b",
            "a/b.",
            "-a/b",
            "a/b-",
            "a--x/b",
            "a/b..c",
            "a b/c",
            "a/b\\c",
            "a/b\0",
            "ä/b",
            "a/b:c",
            "a/b%2f",
            &long,
            // A folder of this package: a path, not a model.
            "src/hub.rs",
        ] {
            assert!(!is_model_id(id), "{id}");
        }
    }

    #[test]
    fn revisions_and_shards_cannot_leave_their_folder() {
        for revision in ["main", "refs/pr/1", "v1.0_a-b"] {
            assert!(legal_revision(revision), "{revision}");
        }
        for revision in [
            "", "/", "a//b", "..", "a/../b", "/a", "a/", ".a", "a b", "a\\b", "a?b",
        ] {
            assert!(!legal_revision(revision), "{revision}");
        }
        assert!(legal_shard("model-00001-of-00002.safetensors"));
        for shard in [
            "../x.safetensors",
            "/x.safetensors",
            "a/x.safetensors",
            "a\\x.safetensors",
            "x.bin",
            ".safetensors",
            "..safetensors",
            "",
            "C:x.safetensors",
        ] {
            assert!(!legal_shard(shard), "{shard}");
        }
    }

    #[test]
    fn the_environment_decides_where_and_how() {
        let options = |vars: &[(&str, &str)], user: Option<&str>| {
            let find = |name: &str| {
                let value = vars.iter().find(|var| var.0 == name)?.1;
                Some(OsString::from(value))
            };
            HubOptions::from_vars(find, user.map(PathBuf::from))
        };
        let plain = options(&[("HF_HOME", ""), ("HF_TOKEN", "")], Some("/none")).unwrap();
        assert_eq!(plain.cache, Path::new("/none/.cache/huggingface/hub"));
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!((plain.token, plain.offline), (None, false));
        let xdg = options(&[("XDG_CACHE_HOME", "/x")], Some("/none")).unwrap();
        assert_eq!(xdg.cache, Path::new("/x/huggingface/hub"));

        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let path = home.path().to_str().unwrap();
        let full = [
            ("HF_HOME", path),
            ("HF_ENDPOINT", "http://localhost:1"),
            ("HF_HUB_OFFLINE", "1"),
        ];
        let set = options(&full, None).unwrap();
        assert_eq!(set.cache, home.path().join("hub"));
        assert_eq!(set.endpoint, "http://localhost:1");
        assert!(set.offline);
        assert!(!format!("{set:?}").contains("hf_file"));
        assert_eq!(set.token.as_deref(), Some("hf_file"));
        let set = options(&[("HF_TOKEN", "hf_var"), ("HF_HOME", path)], None).unwrap();
        assert_eq!(set.token.as_deref(), Some("hf_var"));
        let set = options(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", path)], None).unwrap();
        assert_eq!(set.cache, Path::new("/c"));
        assert!(matches!(options(&[], None), Err(HubError::NoCache)));
    }

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        for bad in [
            "",
            "bytes",
            "bytes */10",
            "bytes 5/10",
            "5-9/10",
            "bytes a-9/10",
        ] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }
}
