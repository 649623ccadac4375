//! Memory and files on huge pages.
//!
//! A core that reads ordinary pages of 4 KiB looks up an address for every 4 KiB, and its prefetchers
//! stop at the end of each. In pages of 2 MiB the same memory is read faster (`docs/performance.md` has
//! figures). Linux gives them to anonymous maps that ask for it, where
//! `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`; elsewhere the pages are
//! ordinary ones and nothing else differs.
//!
//! A piece need not be as large as a huge page. Maps taken one after the other lie side by side, Linux
//! joins those that ask for the same, and a huge page may reach from one into the next; what a piece
//! occupied is given back when it is dropped.
//!
//! Files have them too where the file system can (Linux: XFS, and since 6.16 ext4): pages that are written
//! 2 MiB at a time, from a multiple of 2 MiB on, lie together ([`HugeWriter`]), and so do pages that are read
//! through a map that asked for it. A file that came into memory otherwise stays in small pages until the
//! system drops it.

use bytemuck::Pod;
use memmap2::MmapMut;
use phidias_quant::{ALIGN, Line};
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::{fmt, io};

/// Bytes of a huge page on every machine that has them (x86-64, AArch64 with 4 KiB pages).
pub const HUGE_PAGE: usize = 2 << 20;

/// Smaller pieces come from the heap: the system allows a process only so many maps (65,530 by
/// default), should they not be joined.
const SMALLEST_MAP: usize = 256 << 10;

/// A boxed slice, on huge pages where they can be had.
pub(crate) enum HugeBox<T> {
    /// As many bytes as the elements have, from the start of a page on.
    Map(MmapMut),
    Heap(Box<[T]>),
}

impl<T: Pod> HugeBox<T> {
    /// `len` zeros.
    ///
    /// Pages are taken when they are first written, so whoever writes first decides which memory node
    /// they lie on.
    /// # Errors
    /// The system does not promise that much memory.
    pub(crate) fn zeroed(len: usize) -> io::Result<Self> {
        let refused = || io::Error::from(io::ErrorKind::OutOfMemory);
        let bytes = (len.checked_mul(size_of::<T>())).ok_or_else(refused)?;
        if bytes < SMALLEST_MAP {
            let heap = bytemuck::allocation::try_zeroed_slice_box(len);
            return heap.map(Self::Heap).map_err(|()| refused());
        }
        let map = MmapMut::map_anon(bytes)?;
        // A refusal leaves ordinary pages.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self::Map(map))
    }
}

impl<T: Pod> Deref for HugeBox<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            Self::Map(map) => bytemuck::cast_slice(map),
            Self::Heap(heap) => heap,
        }
    }
}

impl<T: Pod> DerefMut for HugeBox<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Map(map) => bytemuck::cast_slice_mut(map),
            Self::Heap(heap) => heap,
        }
    }
}

impl<T: Pod> fmt::Debug for HugeBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Map(_) => "mapped",
            Self::Heap(_) => "heap",
        };
        write!(f, "{} elements, {kind}", self.len())
    }
}

/// Bytes of this process, from a multiple of 64 on, on huge pages where they can be had.
pub struct OwnedBytes {
    lines: HugeBox<Line>,
    len: usize,
}

impl OwnedBytes {
    /// `len` zeros; pages are taken when they are first written.
    /// # Errors
    /// The system does not promise that much memory.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let lines = HugeBox::zeroed(len.div_ceil(ALIGN))?;
        Ok(Self { lines, len })
    }

    /// A copy of `bytes`.
    /// # Errors
    /// As [`OwnedBytes::zeroed`].
    pub fn copy(bytes: &[u8]) -> io::Result<Self> {
        let mut copy = Self::zeroed(bytes.len())?;
        copy.copy_from_slice(bytes);
        Ok(copy)
    }
}

impl Deref for OwnedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for OwnedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

/// Hands on what is written in pieces of a huge page, each from a multiple of its size on, so that a file
/// written from its start lies in the page cache on huge pages. The rest is written by `flush`, once, at
/// the end.
pub struct HugeWriter<W> {
    out: W,
    piece: Vec<u8>,
}

impl<W: Write> HugeWriter<W> {
    /// Of a file at its start.
    pub fn new(out: W) -> Self {
        let piece = Vec::with_capacity(HUGE_PAGE);
        Self { out, piece }
    }
}

impl<W: Write> Write for HugeWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (now, _) = bytes.split_at(bytes.len().min(HUGE_PAGE - self.piece.len()));
        self.piece.extend_from_slice(now);
        if self.piece.len() == HUGE_PAGE {
            self.out.write_all(&self.piece)?;
            self.piece.clear();
        }
        Ok(now.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.write_all(&self.piece)?;
        self.piece.clear();
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_bytes_start_on_a_line_and_keep_their_length() {
        for len in [0, 1, 63, 64, 65, SMALLEST_MAP - 1, SMALLEST_MAP + 65] {
            let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let copy = OwnedBytes::copy(&bytes).unwrap();
            assert!(*copy == bytes[..], "{len}");
            assert_eq!(copy.as_ptr() as usize % ALIGN, 0);
        }
        assert!(OwnedBytes::zeroed(usize::MAX / 2).is_err());
    }

    /// Notes the lengths of what it is given.
    #[derive(Default)]
    struct Pieces(Vec<usize>, Vec<u8>);

    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.push(bytes.len());
            self.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_file_is_written_in_whole_huge_pages() {
        let bytes: Vec<u8> = (0..2 * HUGE_PAGE + 12_345)
            .map(|i| (i % 251) as u8)
            .collect();
        for step in [1000, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, bytes.len()] {
            let mut out = Pieces::default();
            let mut writer = HugeWriter::new(&mut out);
            for piece in bytes.chunks(step) {
                writer.write_all(piece).unwrap();
            }
            writer.flush().unwrap();
            assert!(out.1 == bytes, "{step}");
            assert_eq!(out.0, [HUGE_PAGE, HUGE_PAGE, 12_345], "{step}");
        }
    }

    #[test]
    fn zeros_that_can_be_written() {
        let map = SMALLEST_MAP / size_of::<f32>();
        for len in [0, 1, map - 1, map, map + 1, 10 * map + 7] {
            let mut memory = HugeBox::<f32>::zeroed(len).unwrap();
            assert_eq!(matches!(memory, HugeBox::Map(_)), len >= map);
            assert_eq!(memory.len(), len);
            assert!(memory.iter().all(|v| v.to_bits() == 0));
            memory.fill(1.0);
            assert_eq!(memory.iter().sum::<f32>(), len as f32);
        }
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        for len in [usize::MAX, usize::MAX / 8, usize::MAX / 16] {
            assert!(HugeBox::<f64>::zeroed(len).is_err(), "{len}");
        }
    }
}
