//! Asking for lines of memory that will be read, one for each line that is.

use std::slice;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Some memory. It is asked for and never read, so nothing holds it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    start: *const u8,
    lines: usize,
}

impl Span {
    /// None.
    pub(super) const EMPTY: Self = Self {
        start: std::ptr::null(),
        lines: 0,
    };

    /// Where these are.
    #[inline(always)]
    pub(super) fn of<T>(memory: &[T]) -> Self {
        Self {
            start: memory.as_ptr().cast(),
            lines: size_of_val(memory).div_ceil(LINE),
        }
    }
}

/// What will be read, in that order, and how far it has been asked for.
#[derive(Debug)]
pub(super) struct Ahead<'a> {
    span: Span,
    /// Lines of it that were asked for.
    asked: usize,
    then: slice::Iter<'a, Span>,
    /// Bytes that were read beyond a whole number of lines.
    part: usize,
    /// Whether a span is asked for in [`RUNS`] runs, a line of each in turn.
    several: bool,
}

/// Parts of a span that are asked for side by side where the hardware wants several runs of lines. On one core of an Intel
/// Xeon of 2024, 17.8 GB/s read plainly, attention of one query read f16 at 11.8 GB/s in one run, 12.6 in two, 13.7 in four
/// and 13.9 in eight, bytes at 11.2, 11.3, 12.4 and 11.4: what a core asks for itself takes places that are few, so the
/// hardware must be led to ask too. Every second line, or every fourth, gave 0.7 to 0.9 of one run, nothing 0.8.
const RUNS: usize = 4;

/// What is told how far reading has come.
pub(super) trait Asks {
    /// The next `count` lines have been read.
    fn lines(&mut self, count: usize);
    /// So many bytes have.
    fn read(&mut self, bytes: usize);
}

/// Nobody is told. A loop that has much to compute has no registers for what [`Ahead`] remembers.
pub(super) struct Nobody;

impl Asks for Nobody {
    #[inline(always)]
    fn lines(&mut self, _: usize) {}
    #[inline(always)]
    fn read(&mut self, _: usize) {}
}

impl Asks for Ahead<'_> {
    /// Asks for as many lines as were read, or as many as there are.
    #[inline(always)]
    fn lines(&mut self, count: usize) {
        for _ in 0..count {
            match self.next() {
                Some(line) => ask(line),
                None => return,
            }
        }
    }

    #[inline(always)]
    fn read(&mut self, bytes: usize) {
        self.part += bytes;
        self.lines(self.part / LINE);
        self.part %= LINE;
    }
}

impl<'a> Ahead<'a> {
    #[inline(always)]
    pub(super) fn new(spans: &'a [Span]) -> Self {
        #[cfg(target_arch = "x86_64")]
        let several = super::prefetch::several_runs();
        #[cfg(not(target_arch = "x86_64"))]
        let several = false;
        Self {
            span: Span::EMPTY,
            asked: 0,
            then: spans.iter(),
            part: 0,
            several,
        }
    }

    /// The line to be asked for next.
    #[inline(always)]
    fn next(&mut self) -> Option<*const u8> {
        while self.asked == self.span.lines {
            (self.span, self.asked) = (*self.then.next()?, 0);
        }
        let run = self.span.lines / RUNS;
        let place = if self.several && self.asked < RUNS * run {
            self.asked % RUNS * run + self.asked / RUNS
        } else {
            self.asked
        };
        self.asked += 1;
        Some(self.span.start.wrapping_add(place * LINE))
    }
}

/// Asks for one line, into the second-level cache; see `prefetch.rs`.
#[inline(always)]
fn ask(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch reads nothing the program can see, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Asks for the line so many bytes after `at`, which need not be there, into the first-level cache.
#[inline(always)]
pub(super) fn soon<T>(at: &T, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let line = std::ptr::from_ref(at).cast::<i8>().wrapping_add(bytes);
        // SAFETY: SSE is part of x86-64; a prefetch reads nothing the program can see, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_asked_for_once_and_in_order() {
        let (a, b) = ([0u8; 3 * LINE], [0f32; 17]);
        let spans = [Span::of(&a), Span::EMPTY, Span::of(&b)];
        assert_eq!(spans.map(|s| s.lines), [3, 0, 2]);
        let mut ahead = Ahead::new(&spans);
        ahead.several = false;
        ahead.read(LINE + 40);
        ahead.read(24);
        assert_eq!((ahead.asked, ahead.part), (2, 0));
        assert_eq!(ahead.next(), Some(a[2 * LINE..].as_ptr()));
        assert_eq!(ahead.next(), Some(b.as_ptr().cast()));
        assert_eq!(ahead.next(), Some(b[LINE / 4..].as_ptr().cast()));
        ahead.lines(100);
        assert_eq!((ahead.next(), ahead.then.len()), (None, 0));
    }

    #[test]
    fn several_runs_take_turns_and_the_last_lines_follow() {
        let memory = [0u8; 11 * LINE];
        let spans = [Span::of(&memory)];
        let mut ahead = Ahead::new(&spans);
        ahead.several = true;
        let asked = std::iter::from_fn(|| ahead.next());
        let lines = asked.map(|line| (line.addr() - memory.as_ptr().addr()) / LINE);
        let order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10];
        assert_eq!(lines.collect::<Vec<_>>(), order);
    }
}
