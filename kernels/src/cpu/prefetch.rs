//! Asking for weights before they are needed.
//!
//! A GEMV reads each weight once, at the speed of memory, and computes on it for a third to a half of the
//! time that it takes to arrive; the two overlap only when what is needed next was asked for long ago.
//! For one token the hardware does that best, if it is given what it expects: one run of lines, each line
//! after the one before it. That is the packed order, and each panel is read alone. What is asked for beside it
//! takes the places that a core has for requests (some two dozen lines), so all that is done is to point 8 KiB
//! ahead, into the second-level cache, once in four lines: it carries the hardware over the borders of small
//! pages. Several tokens take more time a line than the hardware looks ahead, so for them each line 2 KiB
//! ahead is asked for, into the first level.
//!
//! One core of a Zen 4, a packed matrix larger than the caches, of what the best plain reading gave
//! (32 to 36 GB/s in pages of 2 MiB; medians of 12 to 40 runs in turn):
//!
//! | ahead | q4, one token | q8, one token | q4, four tokens |
//! |---|---|---|---|
//! | nothing | 0.87 to 0.95 | 0.84 to 0.92 | 0.46 to 0.55 |
//! | one line in four, 8 KiB, second level | 0.91 to 0.92 | 0.91 to 0.94 | 0.38 to 0.49 |
//! | one line in two, 4 KiB, second level | 0.93 to 0.94 | 0.88 to 0.93 | 0.32 to 0.40 |
//! | every line, 8 KiB, second level | 0.54 | 0.70 | 0.39 |
//! | every line, 2 KiB, first level | 0.77 to 0.83 | 0.77 to 0.81 | 0.56 to 0.61 |
//! | every line, 32 KiB, second, and 2 KiB, first level | 0.63 to 0.70 | 0.68 to 0.73 | 0.55 to 0.63 |
//!
//! With the scales of a panel before all of its quants, as the packed order was once, nothing of this helped:
//! 0.46 of plain reading with one panel, 0.70 with four panels side by side, two cores and one alike.

use std::arch::x86_64::*;

/// Bytes from what is read for one token to what is asked for, and of the lines of which one is.
const FAR: usize = 8 << 10;
const STEP: usize = 256;
/// The same for several tokens.
const NEAR: usize = 2 << 10;
const LINE: usize = 64;

/// Asks for some of what lies ahead of a block for `T` tokens.
/// It may belong to other weights, or to nothing at their end: a prefetch never faults.
#[inline(always)]
pub(super) fn ahead<const T: usize, const LINES: usize>(quants: &[[u8; LINE]; LINES]) {
    let (distance, step) = if T == 1 { (FAR, STEP) } else { (NEAR, LINE) };
    for line in quants.iter().step_by(step / LINE) {
        let line = line.as_ptr().cast::<i8>().wrapping_add(distance);
        // SAFETY: SSE is part of x86-64, and the instructions read nothing.
        unsafe {
            if T == 1 {
                _mm_prefetch::<_MM_HINT_T1>(line);
            } else {
                _mm_prefetch::<_MM_HINT_T0>(line);
            }
        }
    }
}
