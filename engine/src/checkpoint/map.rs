//! The one place where a file is mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

/// A file mapped for reading.
pub struct Map(memmap2::Mmap);

impl Map {
    /// Maps the whole of `path`.
    ///
    /// The file must not be shortened while the program runs: reading past the new end of a
    /// mapped file is a bus error that cannot be caught. Downloads and `quantize` therefore write
    /// under a temporary name and rename.
    /// # Errors
    /// When the file cannot be opened or mapped; an empty file cannot.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the bytes are only ever read, and as plain data for which every bit pattern is
        // valid; another process changing them changes values, not memory safety. Shortening the
        // file is excluded by the documentation above.
        unsafe { memmap2::Mmap::map(&file) }.map(Self)
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
