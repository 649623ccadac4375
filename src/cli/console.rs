//! What the user sees besides the answer: notes, progress bars, errors.

use anyhow::Error;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A line on stderr, quiet or not. One that cannot be written (a full disk, a reader that went away) is no
/// reason to stop, and there is nowhere left to say so; `eprintln!` would panic.
pub fn say(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Stdout, which its errors name.
#[derive(Debug)]
pub struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().write(bytes).map_err(Self::named)
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush().map_err(Self::named)
    }
}

impl Stdout {
    /// The kind stays: it tells a closed pipe.
    fn named(error: io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("stdout: {error}"))
    }
}

/// Prints notes and bars on stderr, or not at all.
#[derive(Clone, Copy, Debug)]
pub struct Console {
    quiet: bool,
}

/// What a bar counts.
#[derive(Clone, Copy, Debug)]
pub enum Unit {
    Bytes,
    Tokens,
    Crops,
}

impl Console {
    pub fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    /// A line on stderr.
    pub fn note(self, text: impl std::fmt::Display) {
        if !self.quiet {
            say(text);
        }
    }

    /// A bar that appears only when the work takes over a second.
    pub fn bar(self, what: &str, unit: Unit) -> Bar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let template = match unit {
            Unit::Bytes => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            Unit::Crops => "{msg} [{bar:30}] {pos}/{len} crops {eta}",
            Unit::Tokens => "{msg} [{bar:30}] {pos}/{len} tokens {per_sec} {eta}",
        };
        bar.set_style(
            ProgressStyle::with_template(template)
                .expect("a constant")
                .progress_chars("=> "),
        );
        bar.set_message(what.to_owned());
        Bar {
            bar,
            quiet: self.quiet,
            start: std::time::Instant::now(),
            shown: false,
        }
    }
}

impl Console {
    /// What long work in many parts is doing: a bar on a terminal, else a line for each part.
    pub fn steps(self) -> Steps {
        let bar = (!self.quiet && io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(5));
            bar.set_style(
                ProgressStyle::with_template("{msg} {wide_bar} {elapsed}")
                    .expect("a constant")
                    .progress_chars("=> "),
            );
            bar
        });
        Steps {
            quiet: self.quiet,
            bar,
            what: Mutex::default(),
        }
    }
}

/// The parts of long work.
pub struct Steps {
    quiet: bool,
    bar: Option<ProgressBar>,
    /// The part that was named last.
    what: Mutex<String>,
}

impl Steps {
    /// Names a part and says how much of it is done; `total` 0: it has no parts of its own.
    pub fn set(&self, what: &str, done: usize, total: usize) {
        let mut last = self.what.lock().unwrap_or_else(PoisonError::into_inner);
        let new = *last != what;
        if new {
            what.clone_into(&mut last);
        }
        match &self.bar {
            _ if self.quiet => {}
            Some(bar) => {
                if new {
                    bar.set_message(what.to_owned());
                    bar.set_length(total as u64);
                }
                bar.set_position(done as u64);
            }
            None if new => say(what),
            None => {}
        }
    }

    /// Takes the bar away while `write` writes to stdout.
    pub fn suspend<R>(&self, write: impl FnOnce() -> R) -> R {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A progress bar on stderr.
pub struct Bar {
    bar: ProgressBar,
    quiet: bool,
    start: std::time::Instant,
    shown: bool,
}

impl Bar {
    pub fn set(&mut self, done: u64, total: Option<u64>) {
        if !self.shown && !self.quiet && self.start.elapsed() > Duration::from_secs(1) {
            self.bar
                .set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
            self.shown = true;
        }
        match total {
            Some(total) => self.bar.set_length(total),
            None => self.bar.unset_length(),
        }
        self.bar.set_position(done);
        if Some(done) == total {
            self.clear();
        }
    }

    pub fn clear(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Whether the reader of stdout went away, as `head` does: no error to complain about.
pub fn is_closed_pipe(error: &Error) -> bool {
    error.chain().any(|e| {
        e.downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// `1 token`, `2 tokens`.
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The error and its causes, each said once: many errors name their cause in their own text.
pub fn describe(error: &Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
