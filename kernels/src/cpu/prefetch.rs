//! Asking for weights before they are needed.
//!
//! A GEMV reads each weight once, at the speed of memory, and computes on it for a third to a half of the
//! time that it takes to arrive; the two overlap only when what is needed next was asked for long ago.
//! For few products a line an AMD's hardware does that best, if it is given what it expects: one run of lines, each
//! line after the one before it. That is the packed order, and each panel is read alone. What is asked for beside
//! it takes the places that a core has for requests (some two dozen lines), so all that is done is to name one
//! line of each page, six pages ahead, in the second-level cache: the translation of its address is there when
//! the run comes to that page. Many products take more time a line than the hardware looks ahead, so for them
//! each line 2 KiB ahead is asked for, into the first level.
//!
//! One core of a Zen 4, packed matrices of 9216 x 3072 and 3072 x 8192 larger than the caches, in pages of 2 MiB, of
//! what plain reading gave in turn (27 to 34 GB/s; medians of 21 or 31 runs, several rounds where there are two figures):
//!
//! | ahead | q4, one token | q8, one token (256-bit registers) | q4, two | q8, four | q4, four | q4, eight |
//! |---|---|---|---|---|---|---|
//! | nothing | 0.94, 0.96; 0.89 to 0.94 | 0.93, 0.98; 0.90, 0.99 | | | | |
//! | one line in four, 8 KiB, second level (as it was) | 0.92 to 0.97; 0.88 to 0.92 | 0.92, 0.98; 0.92, 0.96 | | | | |
//! | one line a page, 24 KiB, second level | 0.95 to 0.99; 0.92 to 0.96 | 0.99, 1.00; 0.97, 0.99 | 0.68; 0.81 | 0.66; 0.67 | 0.46; 0.51 | 0.31; 0.29 |
//! | every line, 2 KiB, first level | | | 0.67; 0.65 | 0.61; 0.60 | 0.55; 0.56 | 0.44; 0.41 |
//!
//! 16, 32 and 64 KiB were within 0.03 of 24, 8 KiB up to 0.07 below it with 8192 columns; into the first level one
//! line a page gave 0.75 to 0.8. On a file in small pages one line a page read at 0.93 to 1.04 of plain reading.
//!
//! **That is AMD's prefetcher.** Intel's (a Xeon of 2024 with AMX, one core, plain reading 15 to 16 GB/s in turn) does better
//! when each line is asked for, whatever the products; one a page even costs it speed:
//!
//! | ahead | q4, one token | q8, one token | q4, two | AVX2: q4; q8 |
//! |---|---|---|---|---|
//! | nothing | 10.2 GB/s | 14.7 | | |
//! | one line a page, 24 KiB, second level | 10.8 to 12.6 | 11.5 | 9.2 to 10.2 | 9.0 to 10.4; 9.1 |
//! | every line, 2 KiB, first level | 13.1 to 13.4 | 15.7 | 11.8 | 13.5; 14.8 |
//!
//! (3072 columns; with 8192 the same order, and 13.0 and 15.7.) 1, 1.5 and 3 KiB were within 0.05 of 2; 4 to 24 KiB ahead
//! into the second level gave q4 the same and q8 0.9 of it; both at once 0.9 of it for q8. And it reads faster in four
//! runs than in one (17.9 GB/s instead of 15.7), so few tokens meet four panels side by side, and what a panel's last
//! lines ask for is behind the other three. One run of lines and then four, in turn, medians of 7, GB/s (3072 columns,
//! huge pages; several versions, so several hours):
//!
//! | tokens | 1 | 2 | 3 | 4 | 6 | 8 | 16 |
//! |---|---|---|---|---|---|---|---|
//! | q4 | 15.4, 16.4 | 10.2, 17.3 | 9.9, 16.4 | 11.7, 15.4 | 10.7, 14.0 | 10.2, 13.4 | 6.0, 7.5 |
//! | q8 | 16.1, 16.4 | 14.4, 17.2 | 13.5, 17.1 | 13.0, 17.6 | 11.8, 17.6 | 11.2, 16.2 | 7.9, 10.0 |
//! | AVX2: q4 | 13.8, 16.7 | 11.9, 17.0 | 12.2, 15.2 | 10.7, 13.5 | | 5.6, 6.5 | 2.9, 3.2 |
//! | AVX2: q8 | 15.6, 16.4 | 14.3, 18.0 | 13.2, 16.9 | 11.6, 14.4 | | 6.3, 7.8 | 3.5, 3.9 |
//!
//! From the second-level cache q4 is multiplied at 42 GB/s for one and for two tokens and at 18 for eight: in one run the
//! times of reading and of computing added up. So the vendor decides.
//!
//! With the scales of a panel before all of its quants, as the packed order was once, nothing of this helped:
//! 0.46 of plain reading with one panel, 0.70 with four panels side by side, two cores and one alike.

use phidias_quant::packed::Panel;
use std::arch::x86_64::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Products a line and row up to which the hardware looks ahead far enough.
const FEW: usize = 4;
/// For few products: bytes from what is read to what is asked for, once a page.
const FAR: usize = 24 << 10;
const PAGE: usize = 4 << 10;
/// For many: the same, each line.
const NEAR: usize = 2 << 10;
const LINE: usize = 64;

/// Whether a run of lines is left to the hardware where there are few products.
static HARDWARE: AtomicBool = AtomicBool::new(false);

/// Decides that for this CPU; without it each line is asked for.
pub(super) fn ask_the_vendor() {
    HARDWARE.store(super::vendor::is_amd(), Ordering::Relaxed);
}

/// Decides it for a test.
#[cfg(test)]
pub(super) fn choose(several: bool) {
    HARDWARE.store(!several, Ordering::Relaxed);
}

/// Whether several panels are best read together.
#[inline(always)]
pub(super) fn several_runs() -> bool {
    !HARDWARE.load(Ordering::Relaxed)
}

/// Panels that are.
pub(super) const RUNS: usize = 4;

/// Asks for some of what lies ahead of block `b` of a panel for `T` tokens, which is one of `R` that are read together.
/// It may belong to other weights, or to nothing at their end: a prefetch never faults.
#[inline(always)]
pub(super) fn ahead<const T: usize, const LINES: usize, const R: usize>(
    b: usize,
    panel: Panel<'_>,
    quants: &[[u8; LINE]; LINES],
) {
    // A line of nibbles has two groups of columns.
    if R > 1 || T * 8 / LINES > FEW || !HARDWARE.load(Ordering::Relaxed) {
        // Behind the last blocks of one of several lies what is being read already, and what comes next behind that.
        let last = panel.blocks().saturating_sub(NEAR / (LINES * LINE));
        let others = if b < last { 0 } else { (R - 1) * panel.bytes() };
        // The line of scales stands before the quants of two blocks.
        if several_runs() && b.is_multiple_of(2) {
            let scales = after(&quants[0], NEAR + others - LINE);
            // SAFETY: SSE is part of x86-64, and the instruction reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(scales) };
        }
        for line in quants {
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(after(line, NEAR + others)) };
        }
        return;
    }
    // Of two blocks and their line of scales, one begins in the first bytes of each page.
    let pair = (2 * LINES + 1) * LINE;
    if b.is_multiple_of(2) && quants.as_ptr().addr() % PAGE < pair {
        let far = after(&quants[0], FAR);
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(far) };
    }
}

/// What lies so many bytes behind a line.
#[inline(always)]
fn after(line: &[u8; LINE], bytes: usize) -> *const i8 {
    line.as_ptr().cast::<i8>().wrapping_add(bytes)
}
