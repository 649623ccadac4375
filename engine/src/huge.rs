//! Zeroed memory on huge pages.
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

use bytemuck::Pod;
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::{fmt, io};

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

#[cfg(test)]
mod tests {
    use super::*;

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
