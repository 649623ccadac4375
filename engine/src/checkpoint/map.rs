//! The one place where a file is mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// A file mapped for reading.
pub struct Map {
    map: memmap2::Mmap,
    #[cfg(unix)]
    file: File,
}

impl Map {
    /// Maps the whole of `path`. Pages that are not in memory yet are asked for as huge ones.
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
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        // Where file systems cannot have them, this is refused or does nothing.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self {
            map,
            #[cfg(unix)]
            file,
        })
    }

    /// Reads the bytes from `first` on, without touching the map.
    /// # Errors
    /// The file's.
    /// # Panics
    /// When they are not inside.
    pub fn read(&self, first: usize, out: &mut [u8]) -> io::Result<()> {
        let part = &self.map[first..first + out.len()];
        #[cfg(unix)]
        {
            let _ = part;
            std::os::unix::fs::FileExt::read_exact_at(&self.file, out, first as u64)
        }
        #[cfg(not(unix))]
        {
            out.copy_from_slice(part);
            Ok(())
        }
    }

    /// Asks the system to read `range` ahead; returns before it is there. Advice only: where it is not
    /// taken, the pages are read when they are touched.
    /// # Panics
    /// When `range` is not inside.
    pub fn will_need(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.map.len());
        #[cfg(unix)]
        let _ = self
            .map
            .advise_range(memmap2::Advice::WillNeed, range.start, range.len());
    }

    /// Takes `range` out of this process's memory. The pages stay with the system, which may keep or drop
    /// them, and come back when they are touched.
    /// # Panics
    /// When `range` is not inside.
    pub fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.map.len());
        #[cfg(target_os = "linux")]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the call empties pages of memory that is a process's own. These are a file's, which
            // nobody writes here: they read the same before and after.
            let _ = unsafe {
                self.map
                    .unchecked_advise_range(advice, range.start, range.len())
            };
        }
    }

    /// Which share of `range` is in memory, from at most `samples` pages spread over it; `None` where the
    /// system does not tell. Linux tells it of files that the user owns or may write, and says of others
    /// that they are there.
    /// # Panics
    /// When `range` is not inside.
    #[must_use]
    pub fn resident_share(&self, range: Range<usize>, samples: usize) -> Option<f64> {
        assert!(range.start <= range.end && range.end <= self.map.len());
        let page = page_size()?;
        let (first, end) = (range.start / page, range.end.div_ceil(page));
        let count = samples.min(end - first);
        let mut resident = 0;
        for i in 0..count {
            // The first page and the last, and between them in equal steps.
            let at = first + (end - 1 - first) * i / (count - 1).max(1);
            resident += usize::from(self.is_resident(at * page)?);
        }
        (count > 0).then(|| resident as f64 / count as f64)
    }

    /// Whether the page that begins at this byte of the file is in memory.
    #[cfg(target_os = "linux")]
    fn is_resident(&self, at: usize) -> Option<bool> {
        let mut state = 0u8;
        let start = self.map[at..].as_ptr();
        // SAFETY: a map begins on a page, so `start` does, and one byte from there lies in the map; the
        // call writes one byte for the one page, and reads nothing of it.
        let failed = unsafe { libc::mincore(start.cast_mut().cast(), 1, &raw mut state) };
        (failed == 0).then_some(state & 1 == 1)
    }

    #[cfg(not(target_os = "linux"))]
    fn is_resident(&self, _: usize) -> Option<bool> {
        None
    }
}

/// Bytes of a page, where pages can be looked at.
fn page_size() -> Option<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a question without pointers.
        usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
    }
    #[cfg(not(target_os = "linux"))]
    None
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_resident_and_advice_changes_no_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Map::open(&path).unwrap();
        for range in [
            0..100_000,
            5..6,
            4096..8192,
            99_999..100_000,
            50_000..50_000,
        ] {
            map.will_need(range);
        }
        assert!(map.as_ref() == bytes);
        for samples in [1, 2, 8, 1000] {
            for range in [0..100_000, 5..6, 4095..4097, 99_999..100_000] {
                let share = map.resident_share(range, samples);
                let known = cfg!(target_os = "linux");
                assert_eq!(share, known.then_some(1.0));
            }
            assert_eq!(map.resident_share(50_000..50_000, 0), None);
        }
    }

    /// What a map holds of this process's memory, as the system counts it.
    #[cfg(target_os = "linux")]
    fn held(map: &Map) -> usize {
        let start = format!("{:x}-", map.0.as_ptr() as usize);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let kib = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        let kib = kib.trim().trim_end_matches("kB").trim();
        kib.parse::<usize>().unwrap() << 10
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn released_pages_are_held_no_more_and_read_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..4u32 << 20).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Map::open(&path).unwrap();
        assert!(map.as_ref() == bytes);
        assert_eq!(held(&map), 4 << 20);
        map.release((1 << 20) + 5..3 << 20);
        // What lies on one huge page with the range may go with it.
        assert!(held(&map) <= 2 << 20);
        assert!(map.as_ref() == bytes);
        assert_eq!(held(&map), 4 << 20);
        map.release(7..7);
    }

    /// Pages that the system dropped are not there, and come back when they are asked for.
    #[cfg(target_os = "linux")]
    #[test]
    fn dropped_pages_are_seen_to_be_gone() {
        use std::os::fd::AsRawFd;
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![1u8; 4 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        let map = Map::open(&path).unwrap();
        // SAFETY: advice about an open file.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if map.resident_share(0..4 << 20, 64) == Some(1.0) {
            println!("this file system keeps every page: nothing to see");
            return;
        }
        map.will_need(0..4 << 20);
        for _ in 0..500 {
            if map.resident_share(0..4 << 20, 64) == Some(1.0) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("pages that were asked for do not come");
    }
}
