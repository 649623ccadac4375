//! Calls into libraries that read other people's files, and may panic at them.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Calls a library with a file that somebody else wrote; `None` when it panicked, which is that file's fault
/// and not the program's.
pub(crate) fn caught<T>(call: impl FnOnce() -> T) -> Option<T> {
    let outer = CATCHING.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CATCHING.set(outer);
    result.ok()
}

/// Whether a panic on this thread becomes an error of this crate. For a panic hook, which had better say
/// nothing then: the error will name the file.
#[must_use]
pub fn panics_are_caught() -> bool {
    CATCHING.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_nothing_and_known_to_be_caught() {
        assert!(!panics_are_caught());
        assert_eq!(caught(panics_are_caught), Some(true));
        let inside = caught(|| {
            assert!(caught(|| panic!("a damaged file")).is_none());
            panics_are_caught()
        });
        assert_eq!(inside, Some(true));
        assert!(!panics_are_caught());
    }
}
