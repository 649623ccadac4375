//! Ctrl-C ends the work at hand: an answer after its current token, a file without leaving half of it.
//! SIGTERM and SIGHUP do the same and then end the program. Where there is no work to end, because the
//! program waits for somebody ([`waiting`]), each of them ends it at once, and the terminal is as it was found.
//!
//! On Unix the signals are blocked in all threads and one thread takes them, so that nothing has to be
//! done inside a signal handler.

use phidias::engine::Cancel;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// What a shell would show for a program that died of signal `n`: `128 + n`.
type ExitCode = i32;

struct State {
    /// The terminal as it was before it was waited at; `None`: there is work at hand.
    waiting: Option<terminal::Saved>,
    /// Set when the program has to end once the work has.
    ending: Option<ExitCode>,
}

static STATE: Mutex<State> = Mutex::new(State {
    waiting: None,
    ending: None,
});

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What signals cancel from now on. To be called before there are other threads.
pub fn cancelling() -> Cancel {
    static INSTALLED: Once = Once::new();
    let cancel = Cancel::default();
    INSTALLED.call_once(|| listen(cancel.clone()));
    cancel
}

/// Waits for something of which no half would be left behind: a line, a prompt and its tokens, a download that
/// is taken up again the next time. A signal meanwhile, or an earlier one that asked for the end, ends the program.
pub fn waiting<R>(wait: impl FnOnce() -> R) -> R {
    {
        let mut state = state();
        if let Some(code) = state.ending {
            std::process::exit(code);
        }
        state.waiting = Some(terminal::Saved::now());
    }
    let result = wait();
    state().waiting = None;
    result
}

/// Whether a signal asks for the end of the work at hand only, or of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    Work,
    Program,
}

fn obey(code: ExitCode, asks: Asks, cancel: &Cancel) {
    let mut state = state();
    if let Some(terminal) = &state.waiting {
        terminal.restore();
    } else if !cancel.is_cancelled() {
        if asks == Asks::Program {
            state.ending = Some(code);
        }
        cancel.cancel();
        return;
    }
    // Nothing to end, or the second signal while the first is being obeyed.
    std::process::exit(code);
}

#[cfg(unix)]
fn listen(cancel: Cancel) {
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    if ignores(Signal::SIGHUP) {
        signals.remove(Signal::SIGHUP);
    }
    // Signals that are not blocked end the program at once, which is no reason not to run.
    if signals.thread_block().is_err() {
        return;
    }
    let take = move || {
        while let Ok(signal) = signals.wait() {
            let asks = match signal {
                Signal::SIGINT => Asks::Work,
                _ => Asks::Program,
            };
            obey(128 + signal as ExitCode, asks, &cancel);
        }
    };
    let started = std::thread::Builder::new()
        .name("signals".into())
        .spawn(take);
    if started.is_err() {
        let _ = signals.thread_unblock();
    }
}

/// Whether a signal was ignored when the program started, as `nohup` has it. No, where the system does not tell.
#[cfg(unix)]
fn ignores(signal: nix::sys::signal::Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut fields = status.lines().filter_map(|line| line.split_once(':'));
    // Signal n is bit n - 1.
    fields
        .find(|(name, _)| *name == "SigIgn")
        .and_then(|(_, bits)| u64::from_str_radix(bits.trim(), 16).ok())
        .is_some_and(|bits| bits >> (signal as u32 - 1) & 1 == 1)
}

#[cfg(not(unix))]
fn listen(cancel: Cancel) {
    const INTERRUPTED: ExitCode = 130;
    // Without the handler Ctrl-C ends the program at once, which is no reason not to run.
    let _ = ctrlc::set_handler(move || obey(INTERRUPTED, Asks::Work, &cancel));
}

/// The settings of the terminal, which editing a line changes.
#[cfg(unix)]
mod terminal {
    use super::super::console::Stdout;
    use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
    use std::io::{self, Write};

    pub struct Saved(Option<Termios>);

    impl Saved {
        /// Those of stdin, where it is a terminal.
        pub fn now() -> Self {
            Self(tcgetattr(io::stdin()).ok())
        }

        /// Puts them back where they were changed.
        pub fn restore(&self) {
            let Some(saved) = &self.0 else { return };
            if tcgetattr(io::stdin()).is_ok_and(|now| now != *saved) {
                let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, saved);
                // Pasted text is no longer to be marked; what was typed stands on a line of its own.
                let _ = writeln!(Stdout, "\x1b[?2004l");
            }
        }
    }
}

/// The settings of the terminal: nothing is known of them here.
#[cfg(not(unix))]
mod terminal {
    pub struct Saved;

    impl Saved {
        pub fn now() -> Self {
            Self
        }

        pub fn restore(&self) {}
    }
}
