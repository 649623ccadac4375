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
    then: slice::Iter<'a, Span>,
    /// Bytes that were read beyond a whole number of lines.
    part: usize,
}

impl<'a> Ahead<'a> {
    #[inline(always)]
    pub(super) fn new(spans: &'a [Span]) -> Self {
        Self {
            span: Span::EMPTY,
            then: spans.iter(),
            part: 0,
        }
    }

    /// Asks for the next `count` lines, or as many as there are.
    #[inline(always)]
    pub(super) fn lines(&mut self, count: usize) {
        for _ in 0..count {
            while self.span.lines == 0 {
                match self.then.next() {
                    Some(span) => self.span = *span,
                    None => return,
                }
            }
            ask(self.span.start);
            self.span.start = self.span.start.wrapping_add(LINE);
            self.span.lines -= 1;
        }
    }

    /// Asks for as much as is being read.
    #[inline(always)]
    pub(super) fn read(&mut self, bytes: usize) {
        self.part += bytes;
        self.lines(self.part / LINE);
        self.part %= LINE;
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
        ahead.read(LINE + 40);
        assert_eq!(ahead.span.start, a[LINE..].as_ptr());
        ahead.read(24);
        assert_eq!(ahead.span.start, a[2 * LINE..].as_ptr());
        ahead.lines(2);
        assert_eq!(ahead.span.start, b[LINE / 4..].as_ptr().cast());
        ahead.lines(100);
        assert_eq!((ahead.span.lines, ahead.then.len()), (0, 0));
    }
}
