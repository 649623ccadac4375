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
//!
//! | module | what it is |
//! |---|---|
//! | `options` | where from, where to: the environment's variables |
//! | `names` | what may become part of a path or an address |
//! | `local` | the cache folder |
//! | `remote` | requests, redirects, what answers mean |
//! | `transfer` | the bytes of one file |
//! | `error` | everything that can be wrong |

mod error;
mod local;
mod names;
mod options;
mod remote;
mod transfer;

pub use error::HubError;
pub use names::is_model_id;
pub use options::HubOptions;

use error::at;
use local::{Found, Local};
use names::{is_commit, legal_id, legal_revision, legal_shard};
use phidias_engine::files::{MAX_INDEX_BYTES, read_at_most};
use remote::Remote;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

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
    let text = read_at_most(index, MAX_INDEX_BYTES).map_err(at(index))?;
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
