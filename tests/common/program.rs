//! The program, run as a user would.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The program, with its caches in `home` and no network; on the CPU, even where there is a GPU, for which each
/// test would compile the kernels anew.
pub fn phidias(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phidias"));
    command
        .env("PHIDIAS_CACHE", home.join("cache"))
        .env("HF_HOME", home.join("hf"))
        .env("HF_HUB_OFFLINE", "1")
        .env("CUDA_VISIBLE_DEVICES", "");
    for variable in ["PHIDIAS_ISA", "HF_ENDPOINT", "HF_TOKEN"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

pub fn home() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

pub fn ran(output: Output) -> Ran {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8 on every stream");
    let ran = Ran {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    };
    assert!(!ran.err.contains("panicked"), "{}", ran.err);
    ran
}

pub fn run(home: &Path, arguments: &[&str]) -> Ran {
    ran(phidias(home).args(arguments).output().unwrap())
}

pub fn succeed(home: &Path, arguments: &[&str]) -> Ran {
    let ran = run(home, arguments);
    assert_eq!(ran.code, Some(0), "{arguments:?}\n{}", ran.err);
    ran
}

/// Runs and expects an exit code and words of the message.
pub fn fail(home: &Path, code: i32, arguments: &[&str], words: &[&str]) {
    let ran = run(home, arguments);
    assert_eq!(ran.code, Some(code), "{arguments:?}\n{}", ran.err);
    assert_eq!(ran.out, "", "{arguments:?}");
    for word in words {
        assert!(
            ran.err.contains(word),
            "{arguments:?}: expected '{word}' in:\n{}",
            ran.err
        );
    }
}
