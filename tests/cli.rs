//! The program as its users meet it: exit codes, answers, files. (Signals, terminals and streams that break:
//! `streams.rs`.)
//!
//! Everything runs on the built-in demonstration model or on the fixtures; nothing needs a network.
#![cfg(feature = "fable")]

mod common;

use common::program::{fail, fixture, home, phidias, ran, run, succeed};
use phidias::engine::Isa;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The logits of three tokens in q4, and what was said meanwhile.
fn q4_logits(home: &Path, model: &str, more: &[&str]) -> (Vec<u8>, String) {
    let out = home.join("logits");
    let words = ["logits", model, "--tokens", "1,2,3", "--format", "q4"];
    let to = ["--out", out.to_str().unwrap()];
    let ran = succeed(home, &[&words[..], &to, more].concat());
    (fs::read(out).unwrap(), ran.err)
}

#[test]
fn the_first_command_answers_with_no_download() {
    let home = home();
    let ran = succeed(
        home.path(),
        &["run", "-p", "Tell me a story about a fox.", "--seed", "1"],
    );
    assert!(ran.out.split_whitespace().count() > 20, "{}", ran.out);
    assert!(ran.out.ends_with('\n'));
    let demonstration: Vec<_> = ran
        .err
        .lines()
        .filter(|l| l.contains("demonstration model"))
        .collect();
    assert_eq!(demonstration.len(), 1, "{}", ran.err);
    for word in [
        "weights, ",
        " kernels, ",
        " thread",
        "memory: weights",
        "KV cache",
        "tokens/s",
    ] {
        assert!(ran.err.contains(word), "no '{word}' in:\n{}", ran.err);
    }
    let quiet = succeed(
        home.path(),
        &[
            "run",
            "-p",
            "Tell me a story about a fox.",
            "--seed",
            "1",
            "--quiet",
        ],
    );
    assert_eq!((quiet.out, quiet.err), (ran.out, String::new()));
}

#[test]
fn the_same_seed_tells_the_same_story_with_any_number_of_threads() {
    let home = home();
    let story = |more: &[&str]| {
        let arguments = [
            &["run", "-p", "Tell me about a king.", "-n", "60", "-q"],
            more,
        ]
        .concat();
        succeed(home.path(), &arguments).out
    };
    let one = story(&["--seed", "9", "--threads", "1"]);
    assert_eq!(one, story(&["--seed", "9", "--threads", "3"]));
    assert_eq!(
        one,
        story(&["--seed", "9", "--threads", "1", "--ctx", "200"])
    );
    assert_ne!(one, story(&["--seed", "10"]));
}

#[test]
fn prompts_come_from_words_files_and_stdin() {
    let home = home();
    let file = home.path().join("prompt.txt");
    fs::write(&file, "Once upon a time").unwrap();
    let common = ["--raw", "-n", "12", "--temp", "0", "-q"];
    let words = succeed(
        home.path(),
        &[&["run", "-p", "Once upon a time"], &common[..]].concat(),
    )
    .out;
    let from_file = succeed(
        home.path(),
        &[&["run", "-f", file.to_str().unwrap()], &common[..]].concat(),
    )
    .out;
    let mut child = phidias(home.path());
    let mut child = child
        .args([&["run", "-"], &common[..]].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"Once upon a time")
        .unwrap();
    let from_stdin = child.wait_with_output().unwrap();
    assert_eq!(words, from_file);
    assert_eq!(words.as_bytes(), from_stdin.stdout);
    // A raw answer continues the text, space included.
    assert!(words.starts_with([' ', ',']), "{words:?}");
}

#[test]
fn json_has_the_text_the_ids_and_the_log_probabilities() {
    let home = home();
    let arguments = [
        "run",
        "-p",
        "Tell me a story.",
        "-n",
        "5",
        "--temp",
        "0",
        "--json",
        "--logprobs",
        "2",
    ];
    let object: Value = serde_json::from_str(&succeed(home.path(), &arguments).out).unwrap();
    assert_eq!(object["generated_tokens"], 5);
    assert_eq!(object["finish"], "length");
    assert_eq!(object["ids"].as_array().unwrap().len(), 5);
    assert!(!object["text"].as_str().unwrap().is_empty());
    let first = &object["logprobs"][0];
    assert_eq!(first["top"][0]["id"], object["ids"][0]);
    assert!(first["logprob"].as_f64().unwrap() <= 0.0);
}

#[test]
fn a_stop_string_ends_the_answer_before_it() {
    let home = home();
    let plain = succeed(
        home.path(),
        &[
            "run",
            "-p",
            "Tell me a story.",
            "-n",
            "40",
            "--temp",
            "0",
            "-q",
        ],
    )
    .out;
    let word = plain.split_whitespace().nth(4).unwrap();
    let cut = succeed(
        home.path(),
        &[
            "run",
            "-p",
            "Tell me a story.",
            "-n",
            "40",
            "--temp",
            "0",
            "-q",
            "--stop",
            word,
        ],
    )
    .out;
    assert_eq!(
        cut.trim_end(),
        plain[..plain.find(word).unwrap()].trim_end()
    );
}

/// The answer is the same with and without lookup, and what it gave is told.
#[test]
fn lookup_changes_the_passes_and_nothing_else() {
    let home = home();
    let refrain = phidias::lookup::SAMPLES[0].text;
    for sampling in [&["--temp", "0"][..], &["--temp", "0.8", "--seed", "5"]] {
        let answer = |lookup: &[&str]| {
            let words = [
                "run",
                "--raw",
                "--json",
                "--logprobs",
                "2",
                "-n",
                "60",
                "-p",
            ];
            let ran = succeed(
                home.path(),
                &[&words[..], &[refrain], sampling, lookup].concat(),
            );
            let object: Value = serde_json::from_str(&ran.out).unwrap();
            (object, ran.err)
        };
        let (plain, told) = answer(&[]);
        assert_eq!(
            (&plain["passes"], &plain["proposed"]),
            (&59.into(), &0.into())
        );
        assert_eq!(plain["tokens_per_pass"], 1.0);
        assert!(!told.contains("lookup"), "{told}");
        let (with, told) = answer(&["--lookup", "8"]);
        for key in ["text", "ids", "finish", "logprobs", "generated_tokens"] {
            assert_eq!(with[key], plain[key], "{key}");
        }
        let number = |key: &str| with[key].as_u64().unwrap();
        assert_eq!(number("passes") + number("accepted"), 59);
        assert!(number("accepted") > 0 && number("accepted") <= number("proposed"));
        let rate = 59.0 / number("passes") as f64;
        assert_eq!(with["tokens_per_pass"], rate);
        let line = format!(
            "lookup: {rate:.2} tokens a pass, {} passes, {} of {} guesses right",
            number("passes"),
            number("accepted"),
            number("proposed")
        );
        assert!(told.contains(&line), "{line}: {told}");
    }
    let h = home.path();
    let words = ["--lookup", "expected 0 to 31"];
    fail(h, 2, &["run", "-p", "x", "--lookup", "1000000"], &words);

    let talk = |lookup: &str| {
        let mut child = phidias(home.path());
        let mut child = child
            .args(["chat", "-n", "60", "--temp", "0", "--lookup", lookup])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = "Tell me a story about a fox.\nTell me a story about a fox.\nAnd a bear?\n";
        child
            .stdin
            .take()
            .unwrap()
            .write_all(lines.as_bytes())
            .unwrap();
        ran(child.wait_with_output().unwrap())
    };
    let (plain, with) = (talk("0"), talk("6"));
    assert_eq!((plain.code, with.code), (Some(0), Some(0)), "{}", with.err);
    assert_eq!(with.out, plain.out);
    assert_eq!(with.err.matches("; lookup: ").count(), 3, "{}", with.err);
}

#[test]
fn bad_usage_is_exit_code_2() {
    let home = home();
    for arguments in [
        &["nonsense"][..],
        &[],
        &["run", "--nonsense"],
        &["run", "-p", "x", "-n", "many"],
        &["run", "-p", "x", "--threads", "0"],
        &["run", "-p", "x", "--threads", "99999999999999999999"],
        &["run", "-p", "x", "--isa", "sse9"],
        &["run", "-p", "x", "--format", "q3"],
        &["run", "-p", "x", "--kv", "int2"],
        &["run", "-p", "x", "--logit-bias", "5"],
        &["run", "-p", "x", "--logit-bias", "5=inf"],
        &["chat", "--logit-bias", "5=NaN"],
        &["run", "-p", "x", "--stop", ""],
        &["run", "-p", "x", "--lookup", "32"],
        &["run", "-p", "x", "--lookup", "-1"],
        &["chat", "--lookup", "99999999999999999999"],
        &["run", "-p", "x", "-f", "y"],
        &["logits", "--out", "x"],
        &["logits", "--tokens", "1,x", "--out", "x"],
        &["quantize", "somewhere"],
        &["eval"],
    ] {
        assert_eq!(run(home.path(), arguments).code, Some(2), "{arguments:?}");
    }
    // None of them looks at the model first.
    for (flag, value, expected) in [
        ("--temp", "-1", "a finite number, at least 0"),
        ("--temp", "inf", "a finite number, at least 0"),
        ("--temp", "warm", "a number"),
        ("--top-k", "-1", "0 to"),
        ("--seed", "-1", "0 to"),
        ("--max-tokens", "-1", "0 to"),
        ("--ctx", "0", "1 to"),
        ("--threads", "-1", "1 to"),
        ("--top-p", "0", "a number above 0, at most 1"),
        ("--top-p", "2", "a number above 0, at most 1"),
        ("--top-p", "NaN", "a number above 0, at most 1"),
        ("--min-p", "-0.1", "a number from 0 to 1"),
        ("--repeat-penalty", "0", "a finite number above 0"),
        ("--frequency-penalty", "-2.5", "a number from -2 to 2"),
        ("--presence-penalty", "3", "a number from -2 to 2"),
        ("--logit-bias", "5=inf", "a finite number, or -inf"),
    ] {
        for command in [
            &["run", "no/such/model", "-p", "x"][..],
            &["chat", "no/such/model"],
        ] {
            let arguments = [command, &[flag, value]].concat();
            fail(home.path(), 2, &arguments, &[flag, value, expected]);
        }
    }
    for (arguments, words) in [
        (&["run"][..], "no prompt"),
        (&["run", "-", "-p", "x"], "cannot stand beside -p or -f"),
        (&["run", "a", "b"], "'b' after the model: expected -"),
        (
            &["eval", "--text", "x", "--ctx", "1"],
            "expected at least 2",
        ),
        (
            &["logits", "--tokens", "-1", "--out", "x"],
            "'-1' is no token id",
        ),
        (
            &["logits", "--tokens", "1,,2", "--out", "x"],
            "'' is no token id",
        ),
    ] {
        fail(home.path(), 2, arguments, &[words]);
    }
    let twice = ["--logit-bias", "5=1", "--logit-bias", "5=2"];
    for command in [
        &["run", "no/such/model", "-p", "x"][..],
        &["chat", "no/such/model"],
    ] {
        let expected = [
            "logit_bias",
            "expected each token once, found token 5 twice",
            "Usage",
        ];
        fail(home.path(), 2, &[command, &twice].concat(), &expected);
    }
    let isa = ran(phidias(home.path())
        .args(["run", "-p", "x"])
        .env("PHIDIAS_ISA", "sse9")
        .output()
        .unwrap());
    assert_eq!(isa.code, Some(2));
    assert!(
        isa.err
            .contains("unknown instruction set 'sse9'; expected one of: scalar"),
        "{}",
        isa.err
    );
    // One that there is a table for, but not on this CPU.
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let arguments = ["run", "-p", "x", "--isa", isa.name()];
        fail(
            home.path(),
            1,
            &arguments,
            &[isa.name(), "this CPU cannot run it"],
        );
    }
}

#[test]
fn an_empty_variable_is_one_that_is_not_set() {
    let home = home();
    let words = ["run", "-p", "Hi", "--raw", "-n", "5", "--temp", "0"];
    let plain = run(home.path(), &words);
    let empty = ran(phidias(home.path())
        .args(words)
        .env("PHIDIAS_ISA", "")
        .env("PHIDIAS_CACHE", "")
        .output()
        .unwrap());
    assert_eq!(
        (empty.code, empty.out),
        (Some(0), plain.out),
        "{}",
        empty.err
    );
    // The one that is named still counts.
    let named = ran(phidias(home.path())
        .args(words)
        .args(["--isa", "scalar"])
        .env("PHIDIAS_ISA", "")
        .output()
        .unwrap());
    assert_eq!(named.code, Some(0), "{}", named.err);
    assert!(named.err.contains("scalar"), "{}", named.err);
}

#[test]
fn failures_are_exit_code_1_and_say_what_was_found() {
    let home = home();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("bytes"), b"caf\xe9").unwrap();
    fs::create_dir(at("empty")).unwrap();
    fs::write(at("short"), "A tale.").unwrap();
    let h = home.path();
    let long = at("short") + "/below";
    for arguments in [
        &["logits", "-p", "x", "--out", &at("no/file")][..],
        &[
            "bench",
            "--kernels",
            "--rough-peaks",
            "--plot",
            &at("no/file"),
        ],
    ] {
        let ran = run(h, arguments);
        assert_eq!(ran.code, Some(1), "{arguments:?}");
        let last = ran.err.lines().last().unwrap();
        let expected = format!("error: {}: no folder {}", at("no/file"), at("no"));
        assert_eq!(last, expected, "{arguments:?}");
    }
    let model = fixture("phi3-medium-128k-tiny").display().to_string();
    for arguments in [
        &["quantize", &model, &long, "--format", "q4"][..],
        &["synth", "phi-3.5-mini", &long],
    ] {
        fail(h, 1, arguments, &[&at("short"), "not a directory"]);
    }
    fail(
        h,
        1,
        &["run", &at("nowhere/at/all"), "-p", "x"],
        &["nowhere/at/all", "no such folder"],
    );
    fail(h, 1, &["run", &at("empty"), "-p", "x"], &["config.json"]);
    fail(h, 1, &["run", &at("short"), "-p", "x"], &["short"]);
    fail(
        h,
        1,
        &["run", "-f", &at("bytes")],
        &["bytes: not UTF-8", "at 3"],
    );
    fail(h, 1, &["run", "-f", &at("missing")], &["missing"]);
    fail(
        h,
        1,
        &["run", "-p", "Tell me a story about a fox.", "--ctx", "8"],
        &["context of 8", "found"],
    );
    fail(
        h,
        1,
        &["run", "-p", "x", "--ctx", "100000000"],
        &["context of 100000000", "expected 1 to"],
    );
    for command in [&["run", "-p", "x"][..], &["chat"]] {
        let arguments = [command, &["--logit-bias", "99999=1"]].concat();
        fail(h, 1, &arguments, &["token ids below 4096, found 99999"]);
    }
    fail(
        h,
        1,
        &["run", "-p", "x", "--device", "cuda"],
        &["--device cuda"],
    );
    fail(
        h,
        1,
        &["logits", "--tokens", "4000000", "--out", &at("l")],
        &["4000000", "vocabulary of"],
    );
    fail(
        h,
        1,
        &["logits", "--tokens", "1", "--out", &at("no/such/folder")],
        &["no/such/folder"],
    );
    fail(h, 1, &["eval", "--text", &at("missing")], &["missing"]);
    fail(h, 1, &["eval", "--text", &at("bytes")], &["not UTF-8"]);
    fail(
        h,
        1,
        &[
            "eval",
            "--text",
            &at("short"),
            "--against",
            fixture("phi35-mini-tiny").to_str().unwrap(),
        ],
        &["vocabulary"],
    );
    fail(
        h,
        1,
        &[
            "run",
            fixture("phi35-mini-tiny").to_str().unwrap(),
            "-p",
            "x",
        ],
        &["no tokenizer.json", "--tokens"],
    );
    fail(
        h,
        1,
        &["run", "some-org/some-model", "-p", "x"],
        &["some-org/some-model"],
    );
    assert!(!Path::new(&at("l")).exists());
}

/// A pipe is written to, and still is one afterwards.
#[test]
#[cfg(unix)]
fn a_pipe_is_not_replaced_by_a_file() {
    use std::os::unix::fs::FileTypeExt;
    let home = home();
    let pipe = home.path().join("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || fs::read(pipe).unwrap()
    });
    succeed(
        home.path(),
        &["logits", "--tokens", "1,2", "--out", pipe.to_str().unwrap()],
    );
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    let bytes = reader.join().unwrap();
    assert_eq!(
        SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensor("logits")
            .unwrap()
            .shape()[0],
        2
    );
}

/// The tokenizers' library panics where the JSON of a decoder is broken: one line says so, and where.
#[test]
fn a_broken_tokenizer_is_one_line() {
    let home = home();
    let model = home.path().join("model");
    fs::create_dir(&model).unwrap();
    let fable = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fable");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(fable.join(file), model.join(file)).unwrap();
    }
    let tokenizer = model.join("tokenizer.json");
    let text = fs::read_to_string(&tokenizer).unwrap();
    let decoder = text.find("\"decoder\"").unwrap();
    let comma = decoder + text[decoder..].find(',').unwrap();
    fs::write(&tokenizer, [&text[..comma], &text[comma + 1..]].concat()).unwrap();
    let ran = run(home.path(), &["run", model.to_str().unwrap(), "-p", "x"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""));
    assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
    for words in ["error: ", "tokenizer.json", "expected", "column"] {
        assert!(ran.err.contains(words), "{words}: {}", ran.err);
    }
}

#[test]
fn logits_are_written_as_documented() {
    let home = home();
    let out = home.path().join("logits.safetensors");
    let (model, path) = (fixture("phi35-mini-tiny"), out.to_str().unwrap());
    succeed(
        home.path(),
        &[
            "logits",
            model.to_str().unwrap(),
            "--tokens",
            "5,6,7,8",
            "--format",
            "f32",
            "--out",
            path,
        ],
    );
    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let ids: Vec<i64> = ids
        .data()
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(ids, [5, 6, 7, 8]);
    let logits = file.tensor("logits").unwrap();
    assert_eq!(logits.shape(), [4, 512]);
    let written: Vec<f32> = logits
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let options = phidias::OpenOptions {
        format: Some(phidias::WeightFormat::F32),
        ..Default::default()
    };
    let model = std::sync::Arc::new(phidias::Model::open(&model, options).unwrap());
    let mut session = phidias::Session::new(model, &Default::default()).unwrap();
    session
        .extend_all(&[5, 6, 7, 8], |row, logits| {
            assert_eq!(logits, &written[row * 512..][..512], "row {row}")
        })
        .unwrap();
}

#[test]
fn a_quantized_folder_runs_and_nothing_is_overwritten() {
    let home = home();
    let (source, q4) = (fixture("phi3-medium-128k-tiny"), home.path().join("q4"));
    let (source, q4) = (source.to_str().unwrap(), q4.to_str().unwrap());
    succeed(home.path(), &["quantize", source, q4, "--format", "q4"]);
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        assert!(Path::new(q4).join(file).exists(), "{file}");
    }
    let logits = |model, more: &[&str]| q4_logits(home.path(), model, more);
    let (mapped, told) = logits(q4, &[]);
    assert_eq!(
        logits(source, &[]).0,
        mapped,
        "quantizing while loading and quantizing to a folder differ"
    );
    // In memory of its own it is the same model, of which nothing is mapped.
    let (copied, told_of_copy) = logits(q4, &["--copy-weights"]);
    assert_eq!(copied, mapped);
    if cfg!(target_os = "linux") {
        assert!(told.contains("resident: "), "{told}");
    }
    assert!(!told_of_copy.contains("resident: "), "{told_of_copy}");
    fail(
        home.path(),
        1,
        &["quantize", source, q4, "--format", "q8"],
        &["q4", "already there"],
    );
    fail(
        home.path(),
        1,
        &["quantize", q4, &format!("{q4}x"), "--format", "q8"],
        &["already", "quantize the original"],
    );
    fail(
        home.path(),
        1,
        &[
            "logits", q4, "--tokens", "1", "--format", "q8", "--out", "x",
        ],
        &["q4", "q8"],
    );
    let report: Value =
        serde_json::from_str(&succeed(home.path(), &["inspect", q4, "--json"]).out).unwrap();
    assert_eq!(report["format"], "q4");
    assert_eq!(report["plan"]["fits"], true);
    assert!(
        report["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .any(|t| t["format"] == "q4")
    );
    assert!(
        succeed(home.path(), &["inspect", q4])
            .out
            .contains("qkv_proj")
    );
}

/// A full disk, played by the limit on file sizes: no half file under the final name, nothing left.
#[test]
#[cfg(unix)]
fn a_full_disk_leaves_nothing_behind() {
    let home = home();
    let folder = home.path().join("out");
    fs::create_dir(&folder).unwrap();
    let script = format!(
        "trap '' XFSZ; ulimit -f 100; exec '{}' quantize '{}' '{}' --format q8",
        env!("CARGO_BIN_EXE_phidias"),
        fixture("phi3-medium-128k-tiny").display(),
        folder.join("q8").display()
    );
    let ran = ran(Command::new("bash").args(["-c", &script]).output().unwrap());
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    assert!(
        ran.err.contains("out/q8/model.safetensors: "),
        "{}",
        ran.err
    );
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        0,
        "something is left"
    );
}

#[test]
fn hidden_keys_are_planned_dropped_and_not_missed() {
    let home = home();
    let folder = fixture("phi3-small-b64-tiny");
    let folder = folder.to_str().unwrap();
    let inspect = |more: &[&str]| succeed(home.path(), &[&["inspect", folder], more].concat()).out;
    let text = inspect(&[]);
    assert!(
        text.contains(
            "block-sparse attention: blocks of 64, the last 1 and one of 8; dense every 2 layers"
        ),
        "{text}"
    );
    assert!(text.contains("--drop-hidden-keys"), "{text}");
    let text = inspect(&["--drop-hidden-keys"]);
    assert!(
        text.contains(" dropped)") && !text.contains("--drop-hidden-keys"),
        "{text}"
    );
    let plan = |more: &[&str]| -> Value {
        serde_json::from_str(&inspect(&[more, &["--json"]].concat())).unwrap()
    };
    let (all, less) = (plan(&[]), plan(&["--drop-hidden-keys"]));
    assert_eq!(all["block_sparse"]["block_size"], 64);
    let bytes = |plan: &Value, key: &str| plan["plan"][key].as_u64().unwrap();
    assert_eq!(bytes(&all, "kv_dropped"), 0);
    assert_eq!(bytes(&all, "kv_hidden"), bytes(&less, "kv_dropped"));
    assert_eq!(
        bytes(&all, "kv_cache") - bytes(&less, "kv_cache"),
        bytes(&less, "kv_dropped")
    );

    // More than two chunks, so that something is dropped between them.
    let ids: Vec<String> = (0..1100).map(|i| (i * 7 % 512).to_string()).collect();
    let logits = |name: &str, more: &[&str]| {
        let out = home.path().join(name);
        let (ids, out) = (ids.join(","), out.to_str().unwrap());
        let arguments = ["logits", folder, "--tokens", &ids, "--out", out];
        succeed(home.path(), &[&arguments, more].concat());
        fs::read(out).unwrap()
    };
    for format in ["f32", "q4"] {
        let format = ["--format", format];
        let dropping = [&format[..], &["--drop-hidden-keys"]].concat();
        assert!(logits("all", &format) == logits("dropped", &dropping));
    }
}

/// Figures of damaged weights would be none.
#[test]
fn eval_names_the_model_whose_logits_are_no_numbers() {
    let home = home();
    let damaged = home.path().join("damaged");
    fs::create_dir(&damaged).unwrap();
    let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fable");
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        fs::copy(good.join(name), damaged.join(name)).unwrap();
    }
    let weights = damaged.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].fill(0xff); // NaN
    fs::write(&weights, bytes).unwrap();
    let text = home.path().join("text");
    fs::write(&text, "Once upon a time").unwrap();
    let [text, good, bad] = [&text, &good, &damaged].map(|path| path.to_str().unwrap());
    let words = [bad, "after token 0 of the text", "expected finite numbers"];
    fail(home.path(), 1, &["eval", bad, "--text", text], &words);
    let against = ["eval", good, "--text", text, "--against", bad];
    fail(home.path(), 1, &against, &words);
    // Quantizing them says so before. The head is tied to the embedding.
    let quantized = ["run", bad, "-p", "x", "--format", "q4"];
    let words = [
        bad,
        "tensor 'model.embed_tokens.weight' cannot be stored as q4: expected finite weights",
        "found NaN in row",
    ];
    fail(home.path(), 1, &quantized, &words);
}

#[test]
fn eval_compares_formats() {
    let home = home();
    let text = home.path().join("text");
    fs::write(
        &text,
        "Once upon a time there was a king who had three sons. The eldest went into the wood.",
    )
    .unwrap();
    let text = text.to_str().unwrap();
    let object: Value = serde_json::from_str(
        &succeed(
            home.path(),
            &[
                "eval",
                "--text",
                text,
                "--format",
                "q4",
                "--against-format",
                "f32",
                "--json",
            ],
        )
        .out,
    )
    .unwrap();
    for key in [
        "tokens",
        "bytes",
        "nll",
        "perplexity",
        "bits_per_byte",
        "kl_mean",
        "kl_p99",
        "top1_agreement",
    ] {
        assert!(object[key].is_number(), "{key}: {object}");
    }
    assert!(object["kl_mean"].as_f64().unwrap() > 0.0);
    let perplexity = object["perplexity"].as_f64().unwrap();
    assert!((perplexity.ln() - object["nll"].as_f64().unwrap()).abs() < 1e-9);
    let same: Value = serde_json::from_str(
        &succeed(
            home.path(),
            &["eval", "--text", text, "--against-format", "bf16", "--json"],
        )
        .out,
    )
    .unwrap();
    assert_eq!(
        (same["kl_mean"].as_f64(), same["top1_agreement"].as_f64()),
        (Some(0.0), Some(1.0))
    );
}

/// A small mixture of experts with the demonstration model's tokenizer.
fn mixture(folder: &Path) -> String {
    let mut config = common::moe_config();
    config["vocab_size"] = 4096.into();
    let path = folder.join("mixture");
    common::write_model(&path, &config, &common::weights(&config, "BF16", 5));
    let fable = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fable");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fable.join(file), path.join(file)).unwrap();
    }
    path.to_str().unwrap().to_owned()
}

/// Tokens of all experts, for each layer.
fn tokens_of_layers(routing: &Value) -> Vec<u64> {
    let layers = routing["tokens_per_expert"].as_array().unwrap();
    assert_eq!(
        layers.len(),
        routing["expert_reads"].as_array().unwrap().len()
    );
    let sum = |layer: &Value| {
        let experts = layer.as_array().unwrap();
        assert_eq!(experts.len(), 4);
        experts.iter().map(|n| n.as_u64().unwrap()).sum()
    };
    layers.iter().map(sum).collect()
}

/// A JSON value on each line.
fn values(lines: &str) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    lines.lines().map(parse).collect()
}

#[test]
fn statistics_tell_where_the_tokens_went() {
    let home = home();
    let model = mixture(home.path());
    let prompt = [
        "run",
        &model,
        "-p",
        "A fox met a goose.",
        "--raw",
        "-n",
        "4",
    ];
    let with = |more: &[&str]| succeed(home.path(), &[&prompt, more].concat());
    let object: Value = serde_json::from_str(&with(&["--json", "--stats", "json"]).out).unwrap();
    // The last token of an answer is not computed with; two experts for each of the others.
    let tokens = |name: &str| object[name].as_u64().unwrap();
    let computed = tokens("prompt_tokens") + tokens("generated_tokens") - 1;
    assert_eq!(tokens_of_layers(&object["routing"]), [2 * computed; 2]);
    // Without --json: on stderr, and also when nothing else is said there.
    let quiet = with(&["--stats", "json", "--quiet"]);
    let routing: Value = serde_json::from_str(&quiet.err).unwrap();
    assert_eq!(routing, object["routing"]);
    assert!(!with(&["--quiet"]).err.contains("expert"));
    // On a text.
    let text = home.path().join("text");
    fs::write(
        &text,
        "Once upon a time there was a king who had three sons.",
    )
    .unwrap();
    let text = text.to_str().unwrap();
    let eval = succeed(
        home.path(),
        &["eval", &model, "--text", text, "--json", "--stats", "json"],
    );
    let object: Value = serde_json::from_str(&eval.out).unwrap();
    let scored = object["tokens"].as_u64().unwrap();
    assert!(
        tokens_of_layers(&object["routing"])
            .iter()
            .all(|n| *n >= 2 * scored)
    );
    // Of a bench: every repetition, and nothing of the warm-up.
    let bench = "-p 8,3 -n 2 -r 2 --threads 1 --rough-peaks --stats json";
    let bench: Vec<_> = ["bench", &model[..]]
        .into_iter()
        .chain(bench.split(' '))
        .collect();
    let records = succeed(home.path(), &[&bench[..], &["--json"]].concat());
    let records = values(&records.out);
    let routings: Vec<_> = records.iter().map(|r| r["routing"].clone()).collect();
    let counted: Vec<_> = routings.iter().map(tokens_of_layers).collect();
    assert_eq!(counted, [8, 3, 2].map(|n| vec![2 * 2 * n; 2]));
    // One token reads two experts.
    assert_eq!(routings[2]["expert_reads"], json!([8, 8]));
    let table = succeed(home.path(), &[&bench[..], &["--quiet"]].concat());
    assert_eq!(values(&table.err), routings);
    let words = ["--stats", "has no experts"];
    let dense = ["bench", "--synth", "phi-3.5-mini", "--stats", "json"];
    fail(home.path(), 1, &dense, &words);
    fail(
        home.path(),
        1,
        &["run", "-p", "x", "--stats", "json"],
        &words,
    );
    fail(
        home.path(),
        1,
        &["eval", "--text", text, "--stats", "json"],
        &words,
    );
}

#[test]
fn a_mixture_is_inspected_quantized_and_benched() {
    let home = home();
    let model = mixture(home.path());
    let packed = home.path().join("q4");
    let packed = packed.to_str().unwrap();
    succeed(home.path(), &["quantize", &model, packed, "--format", "q4"]);
    let text = succeed(home.path(), &["inspect", packed]).out;
    for words in [
        "phimoe",
        "4 experts (2 for a token) of MLP 48",
        " (pageable: experts ",
        ", at least ",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let object: Value =
        serde_json::from_str(&succeed(home.path(), &["inspect", packed, "--json"]).out).unwrap();
    let plan = |name: &str| object["plan"][name].as_u64().unwrap();
    // Two of four, and all of the embedding: a full context has more rows than it.
    assert_eq!(plan("embedding"), 4096 * 32 * 2);
    assert_eq!(plan("pageable"), plan("experts") + plan("embedding"));
    assert_eq!(plan("working_set"), plan("experts") / 2 + plan("embedding"));
    assert_eq!(plan("least"), plan("total") - plan("experts") / 2);
    assert!(plan("experts") > 0 && plan("pageable") < plan("weights"));
    assert_eq!(object["num_local_experts"], 4);
    assert_eq!(object["num_experts_per_tok"], 2);
    assert_eq!(object["plan"]["runs"], true);
    let ran = succeed(home.path(), &["run", packed, "-p", "x", "--raw", "-n", "2"]);
    if cfg!(target_os = "linux") {
        // At the start and after the answer.
        assert_eq!(ran.err.matches("resident: ").count(), 2, "{}", ran.err);
    }
    let bench = [
        "bench",
        packed,
        "-p",
        "8",
        "-n",
        "2",
        "-r",
        "1",
        "--json",
        "--rough-peaks",
        "--threads",
        "1",
    ];
    let out = succeed(home.path(), &bench).out;
    let records: Vec<Value> = out
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let bytes = |i: usize| records[i]["weight_bytes_per_token"].as_u64().unwrap();
    // Of the experts half is read for a token; the head and the rest wholly. The embedding, the norms and
    // the biases (less than 64 KiB here, and the table of 4096 rows of 32 in bf16) are not counted.
    let read = plan("weights") - plan("embedding") - plan("experts") / 2;
    let decode = bytes(1);
    assert!(decode <= read && decode + 65_536 > read);
    // Eight tokens share what they read.
    assert!(bytes(0) < decode / 4, "{} {decode}", bytes(0));
}

#[test]
fn a_plan_beyond_memory_runs_only_when_that_is_wanted() {
    let home = home();
    let mut config = common::config();
    config["num_hidden_layers"] = 1024.into();
    config["intermediate_size"] = 2.into();
    config["max_position_embeddings"] = (1 << 24).into();
    let path = home.path().join("deep");
    common::write_model(&path, &config, &common::weights(&config, "BF16", 1));
    let (path, out) = (path.to_str().unwrap(), home.path().join("logits"));
    let out = out.to_str().unwrap();
    // Keys and values of 16 million positions: two terabytes.
    let asked = [
        "logits", path, "--tokens", "1,2", "--out", out, "--ctx", "16777216",
    ];
    fail(
        home.path(),
        1,
        &asked,
        &["not enough memory", "2048.00 GiB", "--allow-swap"],
    );
    assert!(!Path::new(out).exists());
    let wanted = succeed(home.path(), &[&asked[..], &["--allow-swap"]].concat());
    assert!(
        wanted.err.contains("--allow-swap: not enough memory"),
        "{}",
        wanted.err
    );
    assert!(Path::new(out).exists());
    let inspected = succeed(home.path(), &["inspect", path, "--ctx", "16777216"]).out;
    assert!(
        inspected.contains("--allow-swap runs it all the same"),
        "{inspected}"
    );
}

#[test]
fn chat_keeps_its_cache_between_turns_and_survives_nonsense() {
    let home = home();
    let mut child = phidias(home.path());
    let mut child = child
        .args(["chat", "-n", "20", "--temp", "0", "--ctx", "200"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let long = "a very long question ".repeat(100);
    let lines = format!(
        "Tell me a story about a fox.\n\n/nonsense\n/image x.png\nAnd a bear?\n{long}\nAnd a king?\n/clear\n/help\nTell me a story about a fox.\n/exit\nnot reached\n"
    );
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let ran = ran(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let turns: Vec<_> = ran
        .err
        .lines()
        .filter(|l| l.starts_with("[prompt: "))
        .collect();
    assert_eq!(turns.len(), 4, "{}", ran.err);
    let prompt = |turn: &str| {
        turn["[prompt: ".len()..]
            .split(' ')
            .next()
            .unwrap()
            .parse::<usize>()
            .unwrap()
    };
    // The second turn feeds its own tokens only, not the first turn's answer of 20.
    assert!(prompt(turns[1]) < prompt(turns[0]) + 5, "{turns:?}");
    assert!(ran.err.contains("/nonsense: no such command"));
    assert!(
        ran.err.contains("the context of 200 tokens is full"),
        "{}",
        ran.err
    );
    // After /clear the same question gets the same greedy answer.
    let answers: Vec<_> = ran.out.lines().collect();
    assert_eq!(answers.first(), answers.last());
}

/// An answer that runs into the end of the context takes all of it and no more.
#[test]
fn a_full_context_is_not_more_than_full() {
    let home = home();
    let mut child = phidias(home.path());
    let endless = [
        "chat",
        "--ctx",
        "64",
        "--seed",
        "3",
        "--logit-bias",
        "2=-100",
    ];
    let mut child = child
        .args(endless)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"A story!\nAnother!\n").unwrap();
    drop(stdin);
    let ran = ran(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    for words in [
        "; the context is full (--ctx); context 64 of 64]",
        ": 64 taken, ",
    ] {
        assert!(ran.err.contains(words), "{words}: {}", ran.err);
    }
}

// ------------------------------------------------------------------------------------ pictures

/// A small vision model of random weights with the real vocabulary, and its pictures.
fn vision_model(folder: &Path) -> PathBuf {
    let model = folder.join("vision");
    let config = fs::read(fixture("phi3v-tiny-nc4").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    for (field, value) in [
        ("vocab_size", 32064),
        ("hidden_size", 32),
        ("intermediate_size", 48),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 2),
    ] {
        config[field] = value.into();
    }
    config["rope_scaling"] = Value::Null;
    common::write_model(&model, &config, &common::weights(&config, "BF16", 3));
    let preprocessor = "preprocessor_config.json";
    fs::copy(
        fixture("phi3v-tiny-nc4").join(preprocessor),
        model.join(preprocessor),
    )
    .unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture("tokenizer").join(file), model.join(file)).unwrap();
    }
    model
}

fn picture(n: usize) -> String {
    let file = fixture("phi3v-tiny-nc4").join(format!("image{n}.png"));
    file.to_string_lossy().into_owned()
}

#[test]
fn pictures_stand_where_the_prompt_has_their_tags() {
    let home = home();
    let model = vision_model(home.path());
    let model = model.to_str().unwrap();
    let out = home.path().join("logits");
    let out_name = out.to_str().unwrap();
    let prompt = "<|image_1|>\nand\n<|image_2|>\n?";
    let (one, two) = (picture(0), picture(1));
    succeed(
        home.path(),
        &[
            "logits", model, "-p", prompt, "--image", &one, "--image", &two, "--out", out_name,
        ],
    );
    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let (ids, _) = ids.data().as_chunks::<8>();
    let ids: Vec<i64> = ids.iter().map(|b| i64::from_le_bytes(*b)).collect();
    let count = |id: i64| ids.iter().filter(|i| **i == id).count();
    // 336 x 672 and 672 x 336: the published formula.
    assert_eq!((count(-1), count(-2)), (457, 469));
    // Every piece begins with <s>.
    assert_eq!(count(1), 3);
    assert_eq!(file.tensor("logits").unwrap().shape(), [ids.len(), 32064]);

    let answer = |picture: &str| {
        let prompt = ["-p", "<|image_1|> What?", "-n", "6", "--image", picture];
        succeed(home.path(), &[&["run", model][..], &prompt].concat()).out
    };
    assert_eq!(answer(&one), answer(&one));
    // Fewer tiles, fewer positions.
    let ran = succeed(
        home.path(),
        &[
            "run",
            model,
            "-p",
            "<|image_1|>",
            "-n",
            "1",
            "--image",
            &one,
            "--num-crops",
            "1",
        ],
    );
    assert!(ran.err.contains("prompt: 3"), "{}", ran.err);
}

/// Weights of a revision are asked for, and a folder has one kind only.
#[test]
fn a_revision_of_what_is_not_fetched_is_bad_usage() {
    let home = home();
    let folder = fixture("phi3-mini-4k-tiny").display().to_string();
    let out = home.path().join("out").display().to_string();
    let commands: &[&[&str]] = &[
        &["run", &folder, "-p", "x"],
        &["chat", &folder],
        &["inspect", &folder],
        &["logits", &folder, "-p", "x", "--out", &out],
        &["quantize", &folder, &out, "--format", "q4"],
        &["eval", &folder, "--text", &out, "--against", &folder],
        &["bench", &folder],
    ];
    for command in commands {
        let arguments = [command, &["--revision", "main"][..]].concat();
        let words = [
            "--revision main: expected a model named by its Hugging Face id (org/name)",
            &format!("found the folder {folder}"),
        ];
        fail(home.path(), 2, &arguments, &words);
    }
    for command in [
        &["run", "-p", "x"][..],
        &["bench", "--peaks"],
        &["synth", "phi-3.5-mini", &out],
    ] {
        let arguments = [command, &["--revision", "main"]].concat();
        fail(
            home.path(),
            2,
            &arguments,
            &["--revision main", "found no MODEL"],
        );
    }
    // One of two is enough.
    let text = home.path().join("text").display().to_string();
    fs::write(&text, "A tale.").unwrap();
    let mixed = [
        "eval",
        "org/name",
        "--text",
        &text,
        "--against",
        &folder,
        "--revision",
        "main",
    ];
    fail(home.path(), 1, &mixed, &["org/name"]);
}

#[test]
fn embed_writes_the_features_of_one_picture() {
    let home = home();
    let model = fixture("phi3v-tiny-nc4");
    let out = home.path().join("features");
    let arguments = [
        "embed",
        model.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--image",
    ];
    succeed(home.path(), &[&arguments[..], &[&picture(2)]].concat());
    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("features").unwrap().shape(), [757, 96]);
    let words = ["--image: expected one picture", "Usage: phidias embed"];
    for pictures in [&[][..], &["--image", &picture(2), "--image", &picture(1)]] {
        let arguments = [&arguments[..4], pictures].concat();
        fail(home.path(), 2, &arguments, &words);
    }
    // How many a folder holds is no matter of the command line.
    let frames = home.path().join("frames");
    fs::create_dir(&frames).unwrap();
    for n in [1, 2] {
        fs::copy(picture(n), frames.join(format!("{n}.png"))).unwrap();
    }
    let arguments = [&arguments[..], &[frames.to_str().unwrap()]].concat();
    fail(
        home.path(),
        1,
        &arguments,
        &["expected one picture, found 2"],
    );
}

#[test]
fn wrong_pictures_and_tags_are_named() {
    let home = home();
    let model = vision_model(home.path());
    let model = model.to_str().unwrap();
    let (picture, text) = (picture(0), home.path().join("text.png"));
    fs::write(&text, "not a picture").unwrap();
    let text = text.to_str().unwrap();
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["-p", "x", "--image", &picture],
            &["<|image_1|>", "no image tag"],
        ),
        (
            &["-p", "<|image_2|>", "--image", &picture],
            &["<|image_1|>", "found <|image_2|>"],
        ),
        (&["-p", "<|image_1|>"], &["no image tag, found <|image_1|>"]),
        (
            &["-p", "<|image_1|>", "--image", text],
            &["text.png", "expected a PNG"],
        ),
        (
            &["-p", "<|image_1|>", "--image", "nowhere.png"],
            &["nowhere.png"],
        ),
        (
            &["-p", "<|image_1|>", "--image", &picture, "--ctx", "100"],
            &["100", "--ctx"],
        ),
        (
            &[
                "-p",
                "<|image_1|>",
                "--image",
                &picture,
                "--num-crops",
                "65",
            ],
            &["64", "65"],
        ),
    ];
    for (arguments, words) in cases {
        fail(
            home.path(),
            1,
            &[&["run", model][..], arguments].concat(),
            words,
        );
    }
    fail(
        home.path(),
        1,
        &["run", "-p", "<|image_1|>", "--image", &picture],
        &["phi3", "text only"],
    );
}

/// Before anything is computed: the other words of these commands are wrong too.
#[test]
fn nothing_is_written_over_what_is_read() {
    let home = home();
    let model = vision_model(home.path());
    let picture = home.path().join("picture.png");
    fs::copy(self::picture(0), &picture).unwrap();
    let weights = model.join("model.safetensors");
    let before = [&picture, &weights].map(|file| fs::read(file).unwrap());
    let [model, picture, weights] = [&model, &picture, &weights].map(|p| p.to_str().unwrap());
    let beside = format!("{model}/../picture.png");
    let embed = ["embed", model, "--image", picture, "--num-crops", "999"];
    let logits = ["logits", model, "--tokens", "999999999"];
    for (command, out, words) in [
        (
            &embed[..],
            picture,
            "another file than the one that is read",
        ),
        (&embed, &beside, "another file than the one that is read"),
        (&embed, weights, "not the model's own"),
        (&logits, weights, "not the model's own"),
        (&logits, model, "is a directory"),
        (&embed, "/no/such/folder/x", "/no/such/folder"),
    ] {
        let arguments = [command, &["--out", out]].concat();
        fail(home.path(), 1, &arguments, &[out, words]);
    }
    let after = [picture, weights].map(|file| fs::read(file).unwrap());
    assert!(before == after);
}

#[test]
fn chat_keeps_pictures_of_earlier_turns() {
    let home = home();
    let model = vision_model(home.path());
    let talk = |lines: &str| {
        let mut child = phidias(home.path())
            .args(["chat", model.to_str().unwrap(), "-n", "3", "--ctx", "2000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(lines.as_bytes()).unwrap();
        drop(stdin);
        ran(child.wait_with_output().unwrap())
    };
    let show = format!("/image {}\n", picture(0));
    let ran = talk(&format!(
        "{show}What?\nAnd?\n/image nowhere.png\n{show}{show}Both?\n/clear\nHi\n"
    ));
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    // Before there is a picture.
    let plan = ran.err.lines().find(|l| l.contains("memory: ")).unwrap();
    assert!(plan.contains(" + pictures "), "{plan}");
    let contexts: Vec<usize> = (ran.err.lines())
        .filter_map(|line| {
            line.split("context ")
                .nth(1)?
                .split(' ')
                .next()?
                .parse()
                .ok()
        })
        .filter(|n| *n != 2000)
        .collect();
    let [first, second, third, fresh] = contexts[..] else {
        panic!("four answers: {}", ran.err);
    };
    assert!(
        first > 457 && second > first && second < first + 40,
        "{contexts:?}"
    );
    assert!(third > second + 2 * 457 && fresh < 30, "{contexts:?}");
    assert!(ran.err.contains("nowhere.png"), "{}", ran.err);
    // The fifth picture does not fit beside four that wait; with a long question four do not either. The
    // conversation goes on.
    let long = "word ".repeat(200);
    let ran = talk(&format!(
        "{show}{show}{show}{show}{show}{long}\n/clear\nHi\n"
    ));
    for words in [
        "this picture takes 457 positions; the context has room for 172 (/clear",
        "the context of 2000 tokens is full",
    ] {
        assert!(ran.err.contains(words), "{}", ran.err);
    }
    assert_eq!(ran.out.lines().count(), 1, "{}", ran.out);
}

#[test]
fn a_folder_of_frames_is_its_pictures_in_order() {
    let home = home();
    let model = vision_model(home.path());
    let frames = home.path().join("frames");
    fs::create_dir(&frames).unwrap();
    for (n, name) in [(0, "f2.png"), (1, "f10.PNG")] {
        fs::copy(picture(n), frames.join(name)).unwrap();
    }
    fs::write(frames.join("notes.txt"), "no picture").unwrap();
    let frames_name = frames.to_str().unwrap();
    // The prompt that the model's authors write for frames.
    let run = |more: &[&str]| {
        let prompt = "<|image_1|>\n<|image_2|>\nWhat happens?";
        let run = ["run", model.to_str().unwrap(), "-n", "6", "-p", prompt];
        [&run[..], &["--num-crops", "4"], more].concat().join("\0")
    };
    let answer = |more: &[&str]| {
        let run = run(more);
        succeed(home.path(), &run.split('\0').collect::<Vec<_>>())
    };
    let folder = answer(&["--image", frames_name]);
    let files = answer(&["--image", &picture(0), "--image", &picture(1)]);
    assert_eq!(folder.out, files.out);
    let turned = answer(&["--image", &picture(1), "--image", &picture(0)]);
    assert_ne!(folder.out, turned.out);

    let refuse = |more: &[&str], words: &[&str]| {
        let run = run(&[more, &["--image", frames_name]].concat());
        fail(home.path(), 1, &run.split('\0').collect::<Vec<_>>(), words);
    };
    // As many as there is room for, found out on reading.
    refuse(
        &["--ctx", "900"],
        &[
            "f10.PNG: this picture and the 1 before it take 926 positions",
            "room for 900",
        ],
    );
    fs::write(frames.join("f3.png"), "no picture").unwrap();
    refuse(&[], &["f3.png: expected a PNG", "no picture"]);
    fs::remove_dir_all(&frames).unwrap();
    fs::create_dir(&frames).unwrap();
    refuse(&[], &["frames: expected a folder with PNG"]);
}

/// What `--device` does: on a machine without a GPU one sentence, and the host device in the place of one.
#[cfg(feature = "cuda")]
mod device {
    use super::*;
    use phidias::engine::kernels::cuda::{HostDevice, Order};

    /// Whether kernels can be compiled for the CPU; says so when not.
    fn there_is_a_host_device() -> bool {
        match HostDevice::new(Order::Forward) {
            Ok(_) => true,
            Err(error) => {
                let mut stderr = std::io::stderr();
                let _ = writeln!(
                    stderr,
                    "\n=== SKIPPED: the program on a device: {error} ===\n"
                );
                false
            }
        }
    }

    fn tiny(name: &str) -> String {
        fixture(name).to_str().unwrap().to_owned()
    }

    #[test]
    fn without_a_gpu_one_sentence_says_so_and_auto_takes_the_cpu() {
        let home = home();
        let asked = ["run", "-p", "Hi", "--raw", "-n", "2", "--device"];
        let refused = run(home.path(), &[&asked[..], &["cuda"]].concat());
        assert_eq!((refused.code, &*refused.out), (Some(1), ""));
        let error = refused.err.lines().last().unwrap();
        assert!(
            error.starts_with("error: --device cuda: no CUDA "),
            "{error}"
        );
        let auto = succeed(home.path(), &[&asked[..], &["auto"]].concat());
        assert!(auto.err.contains(" kernels, "), "{}", auto.err);
        assert!(!auto.err.contains("GPU"), "{}", auto.err);
    }

    /// What is planned is planned where it will run: the line that `run` prints, before anything is copied.
    #[test]
    fn a_model_is_inspected_for_the_device_it_will_run_on() {
        let home = home();
        let inspect = |device, more: &[&str]| {
            let words = ["inspect", "--device", device, "--ctx", "64"];
            run(home.path(), &[&words[..], more].concat())
        };
        let refused = inspect("cuda", &[]);
        assert_eq!((refused.code, &*refused.out), (Some(1), ""));
        let error = refused.err.lines().last().unwrap();
        assert!(
            error.starts_with("error: --device cuda: no CUDA "),
            "{error}"
        );
        let plan = |device, more: &[&str]| {
            let told = inspect(device, &[more, &["--json"]].concat());
            let object: Value = serde_json::from_str(&told.out).unwrap();
            object["plan"].clone()
        };
        // What is available differs from one moment to the next.
        let still = |device| {
            let mut plan = plan(device, &[]);
            plan["available"].take();
            plan
        };
        assert_eq!(still("auto"), still("cpu"));
        assert_eq!(still("cpu")["device"], Value::Null);
        if !there_is_a_host_device() {
            return;
        }
        let words = ["run", "-p", "Hi", "--raw", "-n", "1", "--ctx", "64"];
        let ran = run(home.path(), &[&words[..], &["--device", "host"]].concat());
        let planned = ran.err.lines().find_map(|l| l.strip_prefix("memory: "));
        let planned = planned.unwrap_or_else(|| panic!("{}", ran.err));
        let told = inspect("host", &[]).out;
        let line = format!(" on host device, threads forward: {planned}\n");
        assert!(told.contains(&line), "{line}{told}");
        let plan = plan("host", &[]);
        assert_eq!(plan["device"], "host device, threads forward");
        assert_eq!(plan["fits"], true);
        // The memory of the device, of which nothing is taken.
        assert_eq!(plan["available"], 8u64 << 30);
        for (more, want) in [
            (&["--kv", "int8"][..], "f16 or f32, not int8"),
            (&["--drop-hidden-keys"], "keeps the whole cache"),
        ] {
            let refused = inspect("host", more);
            let said = refused.err.contains(want) && refused.err.contains("--device cpu");
            assert!(refused.code == Some(1) && said, "{}", refused.err);
        }
    }

    #[test]
    fn logits_of_a_device_are_those_of_the_cpu() {
        if !there_is_a_host_device() {
            return;
        }
        let home = home();
        let out = home.path().join("logits");
        let read = |device: &str, more: &[&str]| {
            let model = tiny("phi35-mini-tiny");
            let words = [
                "logits",
                &model,
                "--tokens",
                "5,6,7,8,9",
                "--device",
                device,
            ];
            let to = ["--out", out.to_str().unwrap()];
            let ran = succeed(home.path(), &[&words[..], &to, more].concat());
            let bytes = fs::read(&out).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let data = file.tensor("logits").unwrap().data().to_vec();
            let (values, _) = data.as_chunks::<4>();
            let values: Vec<_> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
            (values, ran.err)
        };
        let (cpu, _) = read("cpu", &[]);
        let (host, said) = read("host", &[]);
        assert!(common::relative_error(&host, &cpu) < 1e-4);
        assert!(said.contains("f32 weights, host device"), "{said}");
        // Of the device's memory, and nothing of pages of files.
        assert!(said.contains("memory: weights"), "{said}");
        assert!(
            !said.contains("pageable") && !said.contains("resident"),
            "{said}"
        );
    }

    #[test]
    fn answers_come_from_a_device() {
        if !there_is_a_host_device() {
            return;
        }
        let home = home();
        let words = ["run", "-p", "Hi", "--raw", "-n", "5", "--temp", "0"];
        let of = |device: &[&str]| {
            let ran = succeed(
                home.path(),
                &[&words[..], &["--json", "--device"], device].concat(),
            );
            let object: Value = serde_json::from_str(&ran.out).unwrap();
            object["ids"].clone()
        };
        assert_eq!(of(&["host"]), of(&["cpu"]));
        let kept = [&words[..], &["--device", "host", "--drop-hidden-keys"]].concat();
        fail(
            home.path(),
            1,
            &kept,
            &["--drop-hidden-keys", "--device cpu"],
        );
        let kind = [&words[..], &["--device", "host", "--kv", "int8"]].concat();
        fail(
            home.path(),
            1,
            &kind,
            &["f16 or f32, not int8", "--device cpu"],
        );
    }

    #[test]
    fn a_device_is_measured_against_its_own_limits() {
        if !there_is_a_host_device() {
            return;
        }
        let home = home();
        let model = tiny("phi35-moe-tiny");
        let words = [
            "bench",
            &model,
            "-p",
            "9",
            "-n",
            "2",
            "-r",
            "2",
            "--rough-peaks",
        ];
        let more = ["--json", "--device", "host", "--threads", "1,2", "--format"];
        for (format, number) in [("q8", "int8"), ("bf16", "bf16"), ("f32", "f32")] {
            let ran = succeed(home.path(), &[&words[..], &more, &[format]].concat());
            let records: Vec<Value> = (ran.out.lines())
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            let kinds: Vec<_> = records.iter().map(|r| &r["kind"]).collect();
            assert_eq!(kinds, ["prefill", "decode"], "once, whatever the threads");
            for record in &records {
                let of = |name: &str| (record[name].as_str().unwrap(), record[name].clone());
                assert!(of("device").0.starts_with("host device"), "{record}");
                assert_eq!((of("isa").0, of("peak_number").0), ("cuda", number));
                assert_eq!(record["threads"], 0);
                let share = record["share_of_peak"].as_f64().unwrap();
                assert!(share > 0.0 && share.is_finite(), "{record}");
            }
        }
        let peaks = ["bench", "--peaks", "--rough-peaks", "--device", "host"];
        let ran = succeed(home.path(), &peaks);
        for word in ["host device", "mma.sync", "copied, both ways"] {
            assert!(ran.out.contains(word), "no '{word}' in {}", ran.out);
        }
        let object = succeed(home.path(), &[&peaks[..], &["--json"]].concat()).out;
        let object: Value = serde_json::from_str(&object).unwrap();
        assert!(object["read_gb_s"].as_f64().unwrap() > 0.0);
        let kernels = ["bench", "--kernels", "--device", "host"];
        fail(home.path(), 1, &kernels, &["--kernels", "--device cpu"]);
    }

    #[test]
    fn pictures_are_seen_by_a_device() {
        if !there_is_a_host_device() {
            return;
        }
        let home = home();
        let model = tiny("phi3v-tiny-nc4");
        let picture = format!("{model}/image0.png");
        let out = home.path().join("features");
        let read = |device: &str| {
            let words = ["embed", &model, "--image", &picture, "--format", "f32"];
            let to = ["--out", out.to_str().unwrap(), "--device", device];
            succeed(home.path(), &[&words[..], &to].concat());
            let bytes = fs::read(&out).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let data = file.tensor("features").unwrap().data().to_vec();
            let (values, _) = data.as_chunks::<4>();
            let values: Vec<_> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
            values
        };
        assert!(common::relative_error(&read("host"), &read("cpu")) < 1e-4);
        let words = ["bench", &model, "--image", &picture, "-r", "1"];
        let more = [
            "--rough-peaks",
            "--json",
            "--device",
            "host",
            "--num-crops",
            "1",
        ];
        let ran = succeed(home.path(), &[&words[..], &more].concat());
        let record: Value = serde_json::from_str(&ran.out).unwrap();
        assert!(record["encode_s"]["median"].as_f64().unwrap() > 0.0);
    }
}
