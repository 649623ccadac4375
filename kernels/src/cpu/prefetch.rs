//! Asking for weights before they are needed.
//!
//! A GEMV reads each weight once, at the speed of memory, and computes on it for a third of the time
//! that it takes to arrive; the two overlap only when what is needed next was asked for long ago.
//! 1. 32 KiB ahead, into the second-level cache: far enough for the latency of memory, and over the
//!    page boundaries at which the hardware's own prefetcher stops. Into the first level would not do:
//!    it can wait for about 24 lines at a time, which is 15 GB/s at 100 ns.
//! 2. 2 KiB ahead, into the first level.
//! 3. For one or two tokens, several panels at once: the activations are broadcast once for all of them, and
//!    the hardware follows several runs through memory at a time. For bytes (q8) that alone is best; for
//!    nibbles, which take twice the instructions a line, the same place of the panels that come next is
//!    asked for, and 1 KiB.
//!
//! On a Zen 4 core, weights in 4 KiB pages and 64-byte loads, of what plain reading gives: 0.72 with the
//! hardware alone, 0.65 with a page ahead into the first level, 0.81 with 1, 0.89 with both; 0.98 with
//! both and 32-byte loads. Then several panels at once, over that, in GB/s on one core whose best plain
//! reading was 33 to 38 in pages of 2 MiB and 28 to 32 in pages of 4 KiB:
//!
//! | | q4, 2 MiB | q4, 4 KiB | q8, 2 MiB | q8, 4 KiB |
//! |---|---|---|---|---|
//! | one panel, 1 and 2 | 33.6 | 18.7 | 23.6 | 17.8 |
//! | four, nothing asked for | 24.1 | 18.5 | 30.0 | 22.8 |
//! | four, the same place of the next four and 1 KiB | 35.8 | 25.7 | 25.2 | 21.4 |
//!
//! The last line is not quite what is done: the next four of a long row lie further off than the
//! second-level cache is large, so 8 KiB took their place. That was measured in a whole model only
//! (`docs/performance.md`).

use phidias_quant::packed::Panel;
use std::arch::x86_64::*;

/// Distances in bytes.
const FAR: usize = 32 << 10;
const NEAR: usize = 2 << 10;
/// The same in each of several streams.
const STREAM_FAR: usize = 8 << 10;
const STREAM_NEAR: usize = 1 << 10;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for what lies ahead of `at` when panels are read one after the other, as many lines as it has.
#[inline(always)]
pub(super) fn ahead<T>(at: &T) {
    ask(at, FAR, NEAR);
}

/// Asks for the lines at these distances from those of `at`; 0: for none. They may belong to other weights,
/// or to nothing at their end: a prefetch never faults.
#[inline(always)]
fn ask<T>(at: &T, far: usize, near: usize) {
    let mut offset = 0;
    while offset < size_of::<T>() {
        let line = std::ptr::from_ref(at).cast::<i8>().wrapping_add(offset);
        // SAFETY: SSE is part of x86-64, and the instructions read nothing.
        unsafe {
            if far > 0 {
                _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(far));
            }
            if near > 0 {
                _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(near));
            }
        }
        offset += LINE;
    }
}

/// What is asked for while `P` panels are read side by side.
#[derive(Clone, Copy)]
pub(super) struct Streams<const P: usize, const LINES: usize> {
    /// Bytes from a panel to the one that follows in its stream.
    next: usize,
    /// Blocks in a panel.
    blocks: usize,
}

/// The same at one block.
#[derive(Clone, Copy)]
pub(super) struct At<const P: usize, const LINES: usize> {
    /// From quants to those that are asked for.
    quants: usize,
    /// From scales likewise.
    scales: usize,
}

impl<const P: usize, const LINES: usize> Streams<P, LINES> {
    /// Of panels like this one.
    #[inline(always)]
    pub(super) fn new(panel: &Panel<'_>) -> Self {
        let blocks = panel.quants.len() / (LINES * LINE);
        let scales = size_of_val(panel.scales).next_multiple_of(LINE);
        Self {
            next: P * (scales + panel.quants.len()),
            blocks,
        }
    }

    /// At block `b`. What lies ahead may be beyond the panel: then it is in the next of its stream.
    #[inline(always)]
    pub(super) fn at(self, b: usize) -> At<P, LINES> {
        let block = LINES * LINE;
        let beyond = b + STREAM_FAR / block >= self.blocks;
        let jump = if beyond {
            self.next - self.blocks * block
        } else {
            0
        };
        At {
            quants: STREAM_FAR + jump,
            scales: self.next,
        }
    }
}

impl<const P: usize, const LINES: usize> At<P, LINES> {
    /// For the quants of a block.
    #[inline(always)]
    pub(super) fn of_quants<T>(self, at: &T) {
        match (P, LINES) {
            (1, _) => ahead(at),
            (_, 8) => {}
            _ => ask(at, self.quants, STREAM_NEAR),
        }
    }

    /// For its scales.
    #[inline(always)]
    pub(super) fn of_scales<T>(self, at: &T) {
        match (P, LINES) {
            (1, _) => ahead(at),
            (_, 8) => {}
            _ => ask(at, self.scales, STREAM_NEAR),
        }
    }
}
