//! The cache: what is here of a model, and putting files there.

use super::error::at;
use super::names::{is_commit, name_like};
use super::remote::{Metadata, Remote};
use super::{CONFIG, HubError, INDEX, OPTIONAL, Progress, WEIGHTS, shards_of};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where a file is.
pub(super) enum Found {
    Here,
    There(Metadata),
}

/// The model's folder in the cache.
pub(super) struct Local {
    pub(super) id: String,
    pub(super) revision: String,
    root: PathBuf, // <cache>/models--org--name
    cache_dir: PathBuf,
    pub(super) cache: CacheRepo,
}

impl Local {
    pub(super) fn new(id: &str, revision: &str, cache_dir: &Path) -> Self {
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

    pub(super) fn remember(&self, commit: &str) -> Result<(), HubError> {
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
    pub(super) fn knows_all(&self, commit: &str) -> bool {
        let folder = self.cache.pointer_path(commit);
        let known =
            |file: &str| folder.join(file).is_file() || self.no_exist(commit, file).exists();
        self.lacks(commit).is_none() && OPTIONAL.iter().all(|file| known(file))
    }

    /// What the cache has of the revision, in place of a connection.
    pub(super) fn stand_in(&self, reason: String) -> Result<PathBuf, HubError> {
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
    pub(super) fn find(
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
    pub(super) fn fetch(
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
