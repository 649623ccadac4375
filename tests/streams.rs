//! What happens around the program: signals, terminals, streams that break, are full or have no end.
#![cfg(all(unix, feature = "fable"))]

mod common;

use common::program::{fail, home, phidias, ran, run};
use nix::pty::openpty;
use nix::sys::termios::tcgetattr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let home = home();
    let mut child = phidias(home.path());
    let mut child = child
        .args([
            "run",
            "-p",
            "Tell me a long story.",
            "-n",
            "300",
            "--seed",
            "3",
            "-q",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut [0; 1])
        .unwrap();
    let ran = ran(child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
}

/// The program without a model's own end, so that it runs until it is stopped.
const ENDLESS: [&str; 8] = [
    "-n",
    "100000",
    "--ctx",
    "1024",
    "--seed",
    "3",
    "--logit-bias",
    "2=-100",
];

#[test]
fn ctrl_c_ends_cleanly_after_the_current_token() {
    let home = home();
    let mut child = phidias(home.path())
        .args(["run", "-p", "Once upon a time", "--raw"])
        .args(ENDLESS)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1]).unwrap();
    send("-INT", &child);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let ran = ran(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(rest.ends_with('\n'), "{rest:?}");
    assert!(ran.err.contains("answer:"), "{}", ran.err);
}

fn send(signal: &str, child: &Child) {
    let words = [signal, &child.id().to_string()];
    assert!(Command::new("kill").args(words).status().unwrap().success());
}

/// The signals that end the program, and its exit codes. One that the tests were started to ignore, as `nohup` does,
/// is inherited, and the program keeps to it.
fn signals() -> Vec<(&'static str, i32)> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let ignored = ignored.map_or(0, |bits| u64::from_str_radix(bits.trim(), 16).unwrap());
    let mut signals = vec![("-INT", 130), ("-TERM", 143), ("-HUP", 129)];
    signals.retain(|(name, code)| {
        let number = code - 128;
        let heard = *name == "-INT" || ignored >> (number - 1) & 1 == 0;
        if !heard {
            eprintln!("\n=== SKIPPED: {name} is not tested, it is ignored here ===\n");
        }
        heard
    });
    signals
}

/// Waits for the end, but not for ever.
fn ended(child: &mut Child) -> Option<i32> {
    for _ in 0..600 {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    child.kill().unwrap();
    panic!("still running after a minute");
}

/// Starts the program with a pipe to each stream, and returns when it has said `words` on stderr.
fn started(arguments: &[&str], words: &str) -> (Child, tempfile::TempDir) {
    let home = home();
    let mut child = phidias(home.path())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut heard = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&heard).contains(words) {
        let stderr = child.stderr.as_mut().unwrap();
        assert_eq!(stderr.read(&mut byte).unwrap(), 1, "ended before '{words}'");
        heard.push(byte[0]);
    }
    (child, home)
}

#[test]
fn a_signal_ends_a_program_that_waits() {
    for (signal, code) in signals() {
        let (mut child, _home) = started(&["chat"], "/help lists the commands\n");
        // From this line to the wait are some instructions; a signal between them is obeyed at the wait,
        // but Ctrl-C, which asks for the end of an answer only.
        std::thread::sleep(Duration::from_millis(100));
        send(signal, &child);
        assert_eq!(ended(&mut child), Some(code), "{signal}");
    }
}

/// Nothing is printed before the prompt is there, so the wait is seen from outside.
#[test]
#[cfg(target_os = "linux")]
fn a_signal_ends_a_program_that_reads_its_prompt() {
    for source in [&["run", "-"][..], &["run", "-f", "/dev/stdin"]] {
        let home = home();
        let mut child = phidias(home.path())
            .args(source)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let asleep = format!("/proc/{}/syscall", child.id());
        // System call 0 (x86-64) or 63 (AArch64) of descriptor 0 or another small one: read.
        let reads = |call: &str| call.starts_with("0 0x") || call.starts_with("63 0x");
        while !reads(&fs::read_to_string(&asleep).unwrap_or("0 0x".into())) {
            std::thread::sleep(Duration::from_millis(5));
        }
        send("-INT", &child);
        assert_eq!(ended(&mut child), Some(130), "{source:?}");
    }
}

/// Megabytes of a prompt are encoded in seconds, and in so much memory that the work is seen from outside.
#[test]
#[cfg(target_os = "linux")]
fn a_signal_ends_a_program_that_encodes_its_prompt() {
    const PAGE: usize = 4 << 10;
    let home = home();
    let file = home.path().join("prompt");
    fs::write(&file, "A tale of a king. ".repeat(220_000)).unwrap();
    let file = file.to_str().unwrap();
    for command in [
        &["run", "-f", file][..],
        &["eval", "--text", file],
        &["run", "--raw", "-f", file],
    ] {
        let mut child = phidias(home.path()).args(command).spawn().unwrap();
        let pages = format!("/proc/{}/statm", child.id());
        let resident = || {
            let pages = fs::read_to_string(&pages).unwrap_or_default();
            let pages = pages.split(' ').nth(1).and_then(|n| n.parse().ok());
            pages.unwrap_or(0) * PAGE
        };
        while resident() < 100 << 20 {
            assert!(child.try_wait().unwrap().is_none(), "ended before it began");
            std::thread::sleep(Duration::from_millis(5));
        }
        send("-INT", &child);
        assert_eq!(ended(&mut child), Some(130), "{command:?}");
    }
}

#[test]
#[cfg(feature = "hub")]
fn a_signal_ends_a_download() {
    let home = home();
    // A hub that takes the request and never answers.
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut child = phidias(home.path())
        .args(["run", "org/name", "-p", "x"])
        .env(
            "HF_ENDPOINT",
            format!("http://{}", hub.local_addr().unwrap()),
        )
        .env("HF_HUB_OFFLINE", "0")
        .spawn()
        .unwrap();
    let (mut request, _) = hub.accept().unwrap();
    request.read_exact(&mut [0; 4]).unwrap();
    send("-INT", &child);
    assert_eq!(ended(&mut child), Some(130));
}

/// Ctrl-C ends the answer, SIGTERM the conversation; neither leaves a word without its line's end.
#[test]
fn a_signal_during_an_answer_ends_the_answer_or_the_conversation() {
    for (signal, code, turns) in [("-INT", 0, 2), ("-TERM", 143, 1)] {
        let chat = [&["chat"][..], &ENDLESS].concat();
        let (mut child, _home) = started(&chat, "/help lists the commands\n");
        let mut stdin = child.stdin.take().unwrap();
        // The second line waits while the first is answered, and its answer fills what is left of the context.
        stdin.write_all(b"A long story!\nAnother!\n").unwrap();
        drop(stdin);
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 1]).unwrap();
        send(signal, &child);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        let ran = ran(child.wait_with_output().unwrap());
        assert_eq!(ran.code, Some(code), "{signal}\n{}", ran.err);
        assert_eq!(ran.err.matches("[prompt: ").count(), turns, "{}", ran.err);
        assert!(ran.err.contains("; stopped; "), "{}", ran.err);
        assert!(rest.ends_with('\n'), "{rest:?}");
    }
}

/// What `nohup` turned off stays off.
#[test]
#[cfg(target_os = "linux")]
fn a_signal_that_was_ignored_before_stays_so() {
    let home = home();
    let mut command = Command::new("sh");
    let chat = phidias(home.path());
    command.args(["-c", "trap '' HUP; exec \"$0\" chat"]);
    command.arg(chat.get_program());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    while !said.ends_with(b"/help lists the commands\n") {
        let mut byte = [0];
        let stderr = child.stderr.as_mut().unwrap();
        stderr.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    send("-HUP", &child);
    child.stdin.take().unwrap().write_all(b"/exit\n").unwrap();
    assert_eq!(ended(&mut child), Some(0));
}

/// Runs a chat on a terminal: types each text at the next prompt, and then `act`s. Gives the exit code and
/// what the terminal showed.
fn on_a_terminal(typed: &[&[u8]], act: impl FnOnce(&Child)) -> (Option<i32>, String) {
    let home = home();
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let stream = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut child = phidias(home.path())
        .args(["chat", "-n", "5", "--seed", "1"])
        .env("TERM", "xterm")
        .stdin(stream())
        .stdout(stream())
        .stderr(stream())
        .spawn()
        .unwrap();
    let mut terminal = File::from(pty.master);
    let mut keyboard = terminal.try_clone().unwrap();
    let (mut shown, mut seen) = (String::new(), 0);
    let mut until = |words: &str| {
        let mut bytes = [0; 4096];
        loop {
            if let Some(at) = shown[seen..].find(words) {
                seen += at + words.len();
                return shown.clone();
            }
            let n = terminal.read(&mut bytes).unwrap();
            shown += &String::from_utf8_lossy(&bytes[..n]);
        }
    };
    for text in typed {
        until("> ");
        keyboard.write_all(text).unwrap();
    }
    act(&child);
    // What the program shows is read while it runs: a terminal takes some kilobytes only.
    let end = std::thread::spawn(move || {
        let code = ended(&mut child);
        let after = tcgetattr(&pty.slave).unwrap();
        // After the program's last words.
        File::from(pty.slave).write_all(b"(the end)").unwrap();
        (code, after)
    });
    let shown = until("(the end)");
    let (code, after) = end.join().unwrap();
    assert!(after == before, "the terminal's settings have changed");
    (code, shown)
}

#[test]
fn a_signal_at_the_prompt_leaves_the_terminal_as_it_was() {
    for (signal, code) in signals() {
        let (found, shown) = on_a_terminal(&[b"half a quest"], |child| {
            std::thread::sleep(Duration::from_millis(100));
            send(signal, child);
        });
        assert_eq!(found, Some(code), "{signal}\n{shown}");
        assert!(shown.contains("\x1b[?2004l"), "{shown:?}");
    }
}

/// Lines that are there before they are asked for, as a terminal without bracketed paste gives them, wait for
/// their turn: in the first read or in later ones.
#[test]
fn lines_that_are_typed_ahead_are_answered_one_after_the_other() {
    let empty = "\r".repeat(2000);
    let lines = format!("Hello\rWho are you?\r{empty}And again\r/exit\r");
    let (code, shown) = on_a_terminal(&[lines.as_bytes()], |_| {});
    assert_eq!(code, Some(0), "{shown}");
    assert_eq!(shown.matches("answer: 5 tokens").count(), 3, "{shown}");
}

#[test]
fn keys_that_are_no_text_are_no_end_of_the_conversation() {
    let typed = [&b"\xff\xfe\r"[..], b"Hello\r", b"/exit\r"];
    let (code, shown) = on_a_terminal(&typed, |_| {});
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("not UTF-8"), "{shown}");
    assert!(shown.contains("answer: 5 tokens"), "{shown}");
}

/// A stderr that cannot be written to takes nothing away from the answer.
#[test]
#[cfg(target_os = "linux")]
fn a_stderr_that_is_full_or_closed_is_no_failure() {
    let home = home();
    let words = ["run", "-p", "Hello", "-n", "5", "--seed", "1"];
    let expected = run(home.path(), &words).out;
    assert!(!expected.is_empty());
    let nobody = {
        let (_, writer) = std::io::pipe().unwrap();
        Stdio::from(writer)
    };
    for stderr in [Stdio::from(File::create("/dev/full").unwrap()), nobody] {
        let mut command = phidias(home.path());
        let output = command.args(words).stderr(stderr).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    }
    // A failure is one by its exit code at least.
    let mut command = phidias(home.path());
    let full = File::create("/dev/full").unwrap();
    let status = command
        .args(["run", "nowhere", "-p", "x"])
        .stderr(full)
        .status();
    assert_eq!(status.unwrap().code(), Some(1));
}

#[test]
#[cfg(target_os = "linux")]
fn a_stdout_that_is_full_is_named() {
    let home = home();
    let text = home.path().join("text");
    fs::write(&text, "Once upon a time there was a king.").unwrap();
    let text = text.to_str().unwrap();
    let run = ["run", "-p", "Hello", "-n", "5"];
    for words in [
        &run[..],
        &[&run[..], &["--json"]].concat(),
        &["inspect"],
        &["inspect", "--json"],
        &["eval", "--text", text],
        &["--help"],
        &["run", "--help"],
        &["--version"],
        &["bench", "-p", "8", "-r", "1", "--rough-peaks"],
    ] {
        let mut command = phidias(home.path());
        let full = File::create("/dev/full").unwrap();
        let ran = ran(command.args(words).stdout(full).output().unwrap());
        assert_eq!(ran.code, Some(1), "{words:?}");
        let last = ran.err.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("error: stdout: "),
            "{words:?}\n{}",
            ran.err
        );
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_text_without_an_end_is_refused() {
    let home = home();
    let words = ["/dev/zero: expected a text of at most 16777216 bytes"];
    fail(home.path(), 1, &["run", "-f", "/dev/zero"], &words);
    fail(home.path(), 1, &["eval", "--text", "/dev/zero"], &words);
    for (arguments, words) in [
        (
            ["run", "-"],
            "stdin: expected a text of at most 16777216 bytes",
        ),
        (
            ["chat", "-q"],
            "stdin: expected a line of at most 16777216 bytes",
        ),
    ] {
        let mut command = phidias(home.path());
        let zero = File::open("/dev/zero").unwrap();
        let ran = ran(command.args(arguments).stdin(zero).output().unwrap());
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""));
        assert!(ran.err.contains(words), "{}", ran.err);
    }
}
