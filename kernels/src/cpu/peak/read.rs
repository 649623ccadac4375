//! Loops that read memory and do next to nothing with it.
//!
//! ```text
//! Maths   the sum of all 64-bit words, wrapping: it proves that every byte arrived
//! Limit   memory bandwidth, when the bytes exceed the last cache. Which pattern reaches it differs
//!         from machine to machine, so all of them are tried: one run through the bytes or several
//!         at once (more pages under way), with and without asking a page ahead
//! ```

/// Bytes of a cache line.
const LINE: usize = 64;
/// Distance of the prefetch, bytes: a page, which the hardware's own prefetcher does not cross.
const AHEAD: usize = 4096;

/// What is asked for ahead of the reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// Nothing: the hardware guesses.
    None,
    /// The line a page ahead, into every cache.
    All,
    /// The line a page ahead, past the caches where the CPU can.
    Once,
}

/// A way to read memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    streams: usize,
    prefetch: Prefetch,
}

impl Reading {
    /// Every way there is.
    pub const ALL: [Self; 6] = [
        Self::new(1, Prefetch::None),
        Self::new(1, Prefetch::Once),
        Self::new(1, Prefetch::All),
        Self::new(4, Prefetch::None),
        Self::new(8, Prefetch::None),
        Self::new(8, Prefetch::All),
    ];

    const fn new(streams: usize, prefetch: Prefetch) -> Self {
        Self { streams, prefetch }
    }

    /// Parts of the memory that a thread reads in turn.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.streams
    }

    /// What it asks for ahead.
    #[must_use]
    pub fn prefetch(&self) -> Prefetch {
        self.prefetch
    }

    /// The name in reports.
    #[must_use]
    pub fn name(&self) -> String {
        let streams = match self.streams {
            1 => "1 stream".to_owned(),
            n => format!("{n} streams"),
        };
        match self.prefetch {
            Prefetch::None => streams,
            Prefetch::All => format!("{streams}, prefetch t0"),
            Prefetch::Once => format!("{streams}, prefetch nta"),
        }
    }

    /// Reads the first [`Reading::covers`] of `bytes` and returns the sum of their words.
    #[must_use]
    pub fn sum(&self, bytes: &[u8]) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the features.
            return unsafe { sum_avx2(*self, bytes) };
        }
        self.sum_here(bytes)
    }

    /// Bytes that [`Reading::sum`] reads of `len`: all but a hundred lines of each stream.
    #[must_use]
    pub fn covers(&self, len: usize) -> usize {
        stream_lines(len / LINE, self.streams) * self.streams * LINE
    }

    #[inline(always)]
    fn sum_here(self, bytes: &[u8]) -> u64 {
        match (self.streams, self.prefetch) {
            (8, Prefetch::None) => streams::<8>(bytes, |_| {}),
            (8, _) => streams::<8>(bytes, prefetch_all),
            (4, Prefetch::None) => streams::<4>(bytes, |_| {}),
            (4, _) => streams::<4>(bytes, prefetch_all),
            (_, Prefetch::None) => streams::<1>(bytes, |_| {}),
            (_, Prefetch::All) => streams::<1>(bytes, prefetch_all),
            (_, Prefetch::Once) => streams::<1>(bytes, prefetch_once),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(reading: Reading, bytes: &[u8]) -> u64 {
    reading.sum_here(bytes)
}

type Line = [u8; LINE];

/// Lines of each of `streams` streams. Not a multiple of a page where there are enough of them:
/// streams that are whole pages apart would all want the same sets of the caches, which halves
/// their speed.
fn stream_lines(lines: usize, streams: usize) -> usize {
    const PAGE: usize = 4096 / LINE;
    const OFFSET: usize = 9;
    let even = lines / streams;
    if streams == 1 || even <= 2 * PAGE {
        even
    } else {
        (even - OFFSET) / PAGE * PAGE + OFFSET
    }
}

#[inline(always)]
fn streams<const N: usize>(bytes: &[u8], prefetch: impl Fn(&Line)) -> u64 {
    let (lines, _) = bytes.as_chunks::<LINE>();
    let len = stream_lines(lines.len(), N);
    let parts: [&[Line]; N] = std::array::from_fn(|s| &lines[s * len..][..len]);
    let mut acc = [0u64; LINE / 8];
    for i in 0..len {
        for part in parts {
            prefetch(&part[i]);
            let (words, _) = part[i].as_chunks::<8>();
            for (acc, word) in acc.iter_mut().zip(words) {
                *acc = acc.wrapping_add(u64::from_le_bytes(*word));
            }
        }
    }
    acc.iter().fold(0, |sum, v| sum.wrapping_add(*v))
}

/// Asks for the line a page further on. It may be beyond the bytes: a prefetch never faults.
#[inline(always)]
fn prefetch_all(line: &Line) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch reads nothing the program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(AHEAD).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (line, AHEAD);
}

#[inline(always)]
fn prefetch_once(line: &Line) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch reads nothing the program can see.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(line.as_ptr().wrapping_add(AHEAD).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_reads_every_byte_once() {
        for reading in Reading::ALL {
            for len in [0, 63, 64, 511, 512, 513, 4096 + 8 * 64, 200_000] {
                let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
                let covered = reading.covers(len);
                assert!(len - covered < 74 * 64 * reading.streams());
                let want = (bytes[..covered].as_chunks::<8>().0.iter())
                    .fold(0u64, |sum, w| sum.wrapping_add(u64::from_le_bytes(*w)));
                assert_eq!(reading.sum(&bytes), want, "{} of {len}", reading.name());
            }
        }
    }
}
