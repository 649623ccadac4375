//! An allocator whose blocks end at a page that must not be touched.
//!
//! Kernels read whole registers; one that reads past its slice gets away with it almost always,
//! until the slice ends at the last page of a mapped file. Here every allocation made inside
//! [`guarded`] ends right before a page without access, so the first byte too far ends the test
//! with a segmentation fault. Being the allocator of the test program, it guards also what a test
//! cannot place itself: the vectors inside `Activations` and `AttentionState`. Freed pages lose
//! their access too. On systems other than Unix the blocks are ordinary ones.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

#[global_allocator]
static ALLOCATOR: Guard = Guard;

struct Guard;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `make`; what it allocates ends at a guard page, as long as it lives.
///
/// A vector that grows keeps the capacity that the standard library chooses, so its last element
/// is at the page only where it was made in one go: by `to_vec`, or by `resize` from empty to at
/// least 8 bytes or 4 wider elements.
pub fn guarded<T>(make: impl FnOnce() -> T) -> T {
    struct Reset(bool);
    impl Drop for Reset {
        fn drop(&mut self) {
            GUARDED.set(self.0);
        }
    }
    let _reset = Reset(GUARDED.replace(true));
    make()
}

/// A copy whose end is a guard page.
pub fn page_end<T: Copy>(values: &[T]) -> Vec<T> {
    guarded(|| values.to_vec())
}

// SAFETY: both halves hand out distinct, writable blocks of the size and alignment asked for:
// `System` by its own contract, `pages` as argued there; a block goes back to where it came from.
unsafe impl GlobalAlloc for Guard {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if GUARDED.try_with(Cell::get).unwrap_or(false)
            && let Some(block) = pages::alloc(layout)
        {
            return block;
        }
        // SAFETY: the caller's contract is the one of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if pages::owns(block) {
            pages::free(block, layout);
        } else {
            // SAFETY: not ours, so `System` gave it out, with this layout.
            unsafe { System.dealloc(block, layout) }
        }
    }
}

#[cfg(unix)]
mod pages {
    use std::alloc::Layout;
    use std::ptr::null_mut;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Addresses set aside, never used twice. No memory is taken until a block is.
    const ARENA: usize = 1 << 34;
    static START: OnceLock<usize> = OnceLock::new();
    static USED: AtomicUsize = AtomicUsize::new(0);

    fn page() -> usize {
        // SAFETY: asks for a constant of the system.
        unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
    }

    /// Maps `len` bytes of fresh zeros with that access, at `at` when it is not null.
    fn map(at: *mut u8, len: usize, access: libc::c_int) -> *mut u8 {
        let fixed = if at.is_null() { 0 } else { libc::MAP_FIXED };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE | fixed;
        // SAFETY: only addresses inside the arena are passed, whole pages of one block.
        let mapped = unsafe { libc::mmap(at.cast(), len, access, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            null_mut()
        } else {
            mapped.cast()
        }
    }

    /// The arena; 0 when the system does not give one.
    fn start() -> usize {
        *START.get_or_init(|| map(null_mut(), ARENA, libc::PROT_NONE) as usize)
    }

    /// Bytes of whole pages that hold a block, its end on their end.
    ///
    /// A size is a multiple of the alignment for every vector, so its start is aligned too.
    fn span(layout: Layout) -> usize {
        layout.pad_to_align().size().next_multiple_of(page())
    }

    pub fn alloc(layout: Layout) -> Option<*mut u8> {
        let (start, len) = (start(), span(layout));
        let used = USED.fetch_add(len + page(), Ordering::Relaxed);
        let fits = start != 0 && layout.align() <= page() && used + len < ARENA;
        assert!(fits, "the arena of guarded blocks is used up");
        let block = map(
            (start + used) as *mut u8,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
        );
        (!block.is_null()).then(|| block.wrapping_add(len - layout.pad_to_align().size()))
    }

    pub fn owns(block: *mut u8) -> bool {
        START
            .get()
            .is_some_and(|s| *s != 0 && (*s..*s + ARENA).contains(&(block as usize)))
    }

    pub fn free(block: *mut u8, layout: Layout) {
        let first = block as usize / page() * page();
        map(first as *mut u8, span(layout), libc::PROT_NONE);
    }
}

#[cfg(not(unix))]
mod pages {
    use std::alloc::Layout;
    pub fn alloc(_: Layout) -> Option<*mut u8> {
        None
    }
    pub fn owns(_: *mut u8) -> bool {
        false
    }
    pub fn free(_: *mut u8, _: Layout) {}
}

/// The guard guards: a child process that reads one byte too many is killed for it.
#[cfg(unix)]
#[test]
fn one_byte_too_many_is_fatal() {
    let block = page_end(&[7u8; 100]);
    for (bytes, survives) in [(100, true), (101, false)] {
        // SAFETY: the child reads memory and leaves by `_exit`; it takes no lock and allocates
        // nothing, so that other threads existed does not matter to it.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
                for i in 0..bytes {
                    block.as_ptr().wrapping_add(i).read_volatile();
                }
                libc::_exit(0);
            }
            assert!(child > 0, "fork");
            let mut status = 0;
            libc::waitpid(child, &mut status, 0);
            status
        };
        assert_eq!(libc::WIFEXITED(status), survives, "{bytes} bytes");
    }
}
