//! Bytes that are mapped from a file, owned, or built into the program: shared, never copied.

use crate::checkpoint::map::Map;
use crate::huge::OwnedBytes;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// A cheap handle on a range of bytes. Clones share the storage.
#[derive(Clone)]
pub struct Bytes {
    storage: Arc<Storage>,
    range: Range<usize>,
}

enum Storage {
    Mapped(Map),
    Owned(OwnedBytes),
    Static(&'static [u8]),
}

impl Storage {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map.as_ref(),
            Self::Owned(bytes) => bytes,
            Self::Static(bytes) => bytes,
        }
    }
}

impl Bytes {
    fn new(storage: Storage) -> Self {
        let range = 0..storage.as_slice().len();
        Self {
            storage: Arc::new(storage),
            range,
        }
    }

    /// The part of these bytes in `range`, sharing the storage.
    /// # Panics
    /// When `range` is not inside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "{range:?} of {} bytes",
            self.len()
        );
        let start = self.range.start;
        Self {
            storage: Arc::clone(&self.storage),
            range: start + range.start..start + range.end,
        }
    }

    /// Whether the bytes are pages of a file (or of the program) and not memory of this process.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        !matches!(*self.storage, Storage::Owned(_))
    }

    /// Asks the system to read the pages of a mapped file ahead; returns before they are there.
    pub fn will_need(&self) {
        if let Storage::Mapped(map) = &*self.storage {
            map.will_need(self.range.clone());
        }
    }

    /// Copies the bytes from `first` on. Those of a file are read, not looked at through its map: pages
    /// that were not in use by this process stay so.
    /// # Errors
    /// The file's.
    /// # Panics
    /// When they are not inside.
    pub fn read(&self, first: usize, out: &mut [u8]) -> io::Result<()> {
        let part = &self[first..first + out.len()];
        match &*self.storage {
            Storage::Mapped(map) => map.read(self.range.start + first, out),
            Storage::Owned(_) | Storage::Static(_) => {
                out.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// Takes the pages of a mapped file out of this process's memory; they come back when they are touched.
    pub fn release(&self) {
        if let Storage::Mapped(map) = &*self.storage {
            map.release(self.range.clone());
        }
    }

    /// Which share of a mapped file's bytes is in memory, from `samples` pages spread over them; `None`
    /// where the system does not tell, and for bytes that are not of a file.
    #[must_use]
    pub fn resident_share(&self, samples: usize) -> Option<f64> {
        match &*self.storage {
            Storage::Mapped(map) => map.resident_share(self.range.clone(), samples),
            Storage::Owned(_) | Storage::Static(_) => None,
        }
    }
}

impl From<Map> for Bytes {
    fn from(map: Map) -> Self {
        Self::new(Storage::Mapped(map))
    }
}

impl From<OwnedBytes> for Bytes {
    fn from(bytes: OwnedBytes) -> Self {
        Self::new(Storage::Owned(bytes))
    }
}

impl From<&'static [u8]> for Bytes {
    fn from(bytes: &'static [u8]) -> Self {
        Self::new(Storage::Static(bytes))
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.storage.as_slice()[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.is_mapped() { "mapped" } else { "owned" };
        write!(f, "{} {kind} bytes", self.len())
    }
}
