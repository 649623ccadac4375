//! `phidias bench` as its users meet it: the figures' form and arithmetic, never their size.
//!
//! Everything runs on the built-in demonstration model with limits that were measured in no time.
#![cfg(feature = "fable")]

mod common;

use phidias::engine::Isa;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

fn phidias(home: &Path, arguments: &[&str]) -> Command {
    let mut command = common::program::phidias(home);
    command.arg("bench").args(arguments);
    command
}

/// Exit code, stdout, stderr.
fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let home = tempfile::tempdir().unwrap();
    let output = phidias(home.path(), arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(!err.contains("panicked"), "{arguments:?}\n{err}");
    (output.status.code(), out, err)
}

fn json_lines(arguments: &[&str]) -> Vec<Value> {
    let (code, out, err) = run(&[arguments, &["--json", "--quiet", "--rough-peaks"]].concat());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let parse = |line| serde_json::from_str(line).unwrap();
    out.lines().map(parse).collect()
}

fn number(value: &Value, key: &str) -> f64 {
    let number = value[key].as_f64();
    number.unwrap_or_else(|| panic!("'{key}' in {value}"))
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b}");
}

#[test]
fn one_object_a_test_with_figures_that_agree_with_each_other() {
    let records = json_lines(&[
        "-p",
        "5,9",
        "-n",
        "3",
        "-d",
        "0,20",
        "-r",
        "2",
        "--threads",
        "1,2",
        "--format",
        "q8",
    ]);
    let tests: Vec<_> = (records.iter())
        .map(|r| {
            let integer = |key: &str| r[key].as_u64().unwrap();
            let kind = r["kind"].as_str().unwrap();
            (
                integer("threads"),
                kind,
                integer("tokens"),
                integer("depth"),
            )
        })
        .collect();
    let one = |threads, depth| {
        [("prefill", 5), ("prefill", 9), ("decode", 3)].map(|(k, n)| (threads, k, n, depth))
    };
    assert_eq!(
        tests,
        [one(1, 0), one(1, 20), one(2, 0), one(2, 20)].concat()
    );
    let names = [
        "model",
        "format",
        "isa",
        "threads",
        "kind",
        "tokens",
        "depth",
        "reps",
        "tok_s",
        "bytes_per_token",
        "ops_per_token",
        "gb_s",
        "gop_s",
        "peak_gb_s",
        "peak_gop_s",
        "share_of_peak",
    ];
    for r in &records {
        let keys: Vec<_> = r.as_object().unwrap().keys().collect();
        assert_eq!(keys[..names.len()], names);
        assert_eq!(
            (r["format"].as_str(), r["reps"].as_u64()),
            (Some("q8"), Some(2))
        );
        let [min, median, max] = ["min", "median", "max"].map(|k| number(&r["tok_s"], k));
        assert!(0.0 < min && min <= median && median <= max);
        near(
            number(r, "gop_s"),
            median * number(r, "ops_per_token") / 1e9,
        );
        // Bytes of a prompt's token are rounded to whole ones.
        let bytes = median * number(r, "bytes_per_token") / 1e9;
        assert!((number(r, "gb_s") / bytes - 1.0).abs() < 1e-5);
        let peak = match r["kind"].as_str() {
            Some("prefill") => number(r, "gop_s") / number(r, "peak_gop_s"),
            _ => number(r, "gb_s") / number(r, "peak_gb_s"),
        };
        near(number(r, "share_of_peak"), peak);
        let [before, after] = ["before", "after"].map(|k| number(&r["peaks"][k], "read_gb_s"));
        near(number(r, "peak_gb_s"), (before + after) / 2.0);
        let parts = number(r, "weight_bytes_per_token") + number(r, "kv_bytes_per_token");
        assert!((number(r, "bytes_per_token") - parts).abs() <= 1.0);
    }
    // The demonstration model: layers of 5 * 256 * (512 + 256 + 1024 + 512) weights, a head of
    // 4096 * 256, 34 bytes for 32 of them. The tokens at depth 20 read 21, 22 and 23 positions of keys
    // and values, 4 heads of 32 in f16.
    let (layers, head) = (5 * 256 * 2304, 4096 * 256);
    let decode = &records[5];
    let weights = (layers + head) * 34 / 32;
    let cache = (21 + 22 + 23) * (5 * 2 * 4 * 32 * 2) / 3;
    assert_eq!(decode["bytes_per_token"].as_u64(), Some(weights + cache));
    assert_eq!(decode["ops_per_token"].as_u64(), Some(2 * (layers + head)));
    let prefill = &records[0];
    let ops = 2.0 * (layers as f64 + head as f64 / 5.0);
    assert_eq!(number(prefill, "ops_per_token"), ops.round());
    // What is counted does not depend on the threads.
    for key in [
        "bytes_per_token",
        "ops_per_token",
        "attention_ops_per_token",
    ] {
        assert_eq!(records[0][key], records[6][key]);
    }
}

#[test]
fn the_table_has_a_row_a_test_and_everything_else_goes_to_stderr() {
    let (code, out, err) = run(&[
        "-p",
        "4",
        "-n",
        "2",
        "-r",
        "1",
        "--kv",
        "f32",
        "--isa",
        "scalar",
        "--rough-peaks",
    ]);
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines.len(), 4, "{out}");
    assert!(lines[0].contains("tok/s median") && lines[0].contains("share of peak"));
    assert!(
        lines[2].contains("pp4") && lines[2].contains("% of plain Rust f32"),
        "{out}"
    );
    assert!(
        lines[3].contains("tg2") && lines[3].contains("% of read"),
        "{out}"
    );
    // Progress: plain lines, each part once, where no terminal listens.
    assert_eq!(err.lines().filter(|l| *l == "pp4").count(), 1, "{err}");
    assert!(err.contains("decode is not limited by memory"), "{err}");
}

/// A share is of what the table in use could do, and says so.
#[test]
fn the_limit_is_that_of_the_table() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let asked = "-p 8,64 -n 1 -r 1 --threads 1 --format q8 --isa";
        let asked: Vec<_> = asked.split(' ').chain([isa.name()]).collect();
        let records = json_lines(&asked);
        let named: Vec<_> = (records.iter())
            .map(|r| {
                assert_eq!(r["peak_number"], "int8");
                for side in ["before", "after"] {
                    assert!(number(&r["peaks"][side], "int8_gop_s") > 0.0);
                }
                r["peak_instruction"].as_str().unwrap()
            })
            .collect();
        // Eight tokens, 64, and one. Where two are as fast, either is the limit.
        let (few, many) = match isa {
            Isa::Avx2 => ("vpmaddubsw ymm", "vpmaddubsw ymm"),
            Isa::AvxVnni => ("vpdpbusd ymm", "vpdpbusd ymm"),
            Isa::Avx512 => ("vpdpbusd", "vpdpbusd"),
            Isa::Amx => ("vpdpbusd", "tdpbusd tmm"),
            _ => ("plain Rust int8", "plain Rust int8"),
        };
        for (named, expected) in named.iter().zip([few, many, few]) {
            assert!(
                named.starts_with(expected),
                "{isa}: {named}, not {expected}"
            );
        }
    }
}

#[test]
fn the_peaks_alone() {
    let peaks = json_lines(&["--peaks", "--threads", "1,3"]);
    let threads: Vec<_> = peaks.iter().map(|p| p["threads"].as_u64()).collect();
    assert_eq!(threads, [Some(1), Some(3)]);
    for p in &peaks {
        for key in ["read_gb_s", "int8_gop_s", "f32_gop_s"] {
            assert!(number(p, key) > 0.0, "{key}");
        }
        let best = |list: &Value| {
            let medians = list
                .as_array()
                .unwrap()
                .iter()
                .map(|v| number(&v["rate"], "median"));
            medians.fold(0.0, f64::max)
        };
        assert_eq!(number(p, "read_gb_s"), best(&p["variants"]["read"]));
        assert_eq!(number(p, "int8_gop_s"), best(&p["variants"]["int8"]));
    }
    let (code, out, _) = run(&["--peaks", "--rough-peaks", "-q"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("1 stream") && out.contains('*'), "{out}");
}

#[test]
fn depths_beyond_the_original_length_are_measured_without_computing_the_cache_again() {
    // The demonstration model changes its frequencies beyond 512 positions.
    let records = json_lines(&["-p", "8", "-n", "4", "-d", "512,506,20", "-r", "2"]);
    assert_eq!(records.len(), 6);
}

#[test]
fn lookup_on_a_text_that_repeats_itself_and_on_one_that_does_not() {
    let records = json_lines(&[
        "--lookup",
        "4,0,31",
        "-r",
        "2",
        "--threads",
        "1,2",
        "--kv",
        "f32",
    ]);
    let rows: Vec<_> = (records.iter())
        .map(|r| {
            let integer = |key: &str| r[key].as_u64().unwrap();
            (
                integer("threads"),
                r["text"].as_str().unwrap(),
                integer("lookup"),
            )
        })
        .collect();
    // Without lookup first, once, whether it is asked for or not.
    let one = |threads, text| [0, 4, 31].map(|n| (threads, text, n));
    assert_eq!(
        rows,
        [
            one(1, "refrain"),
            one(1, "plain"),
            one(2, "refrain"),
            one(2, "plain")
        ]
        .concat()
    );
    for (i, r) in records.iter().enumerate() {
        assert_eq!((&r["kind"], &r["kv"]), (&json!("lookup"), &json!("f32")));
        let [min, median, max] = ["min", "median", "max"].map(|k| number(&r["tok_s"], k));
        assert!(0.0 < min && min <= median && median <= max);
        assert_eq!(r["samples"].as_array().unwrap().len(), 2);
        let none = &records[i / 3 * 3];
        near(
            number(r, "speedup"),
            median / number(&none["tok_s"], "median"),
        );
        let [passes, proposed, accepted] =
            ["passes", "proposed", "accepted"].map(|k| r[k].as_u64().unwrap());
        assert!(accepted <= proposed);
        assert_eq!(passes + accepted, r["tokens"].as_u64().unwrap());
        assert_eq!(r["tokens"], none["tokens"]);
        near(
            number(r, "tokens_per_pass"),
            (passes + accepted) as f64 / passes as f64,
        );
        assert!(number(r, "tokens_per_pass") >= 1.0);
        if i % 3 == 0 {
            assert_eq!((proposed, number(r, "tokens_per_pass")), (0, 1.0));
            assert_eq!(number(r, "speedup"), 1.0);
        }
        // What is counted does not depend on the threads.
        for key in ["passes", "proposed", "accepted"] {
            assert_eq!(r[key], records[i % 6][key]);
        }
    }
    let given = |row: usize| number(&records[row], "tokens_per_pass");
    for (refrain, plain) in [(1, 4), (2, 5)] {
        assert!(given(refrain) > 1.5 && given(plain) < 1.1, "{records:?}");
    }
    assert!(given(2) > given(1), "{records:?}");
}

#[test]
fn lookup_has_a_table_after_that_of_the_tests() {
    let (code, out, err) = run(&["-n", "2", "--lookup", "4", "-r", "1", "--rough-peaks"]);
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines.len(), 3 + 1 + 6, "{out}");
    assert!(lines[2].contains("tg2"), "{out}");
    assert_eq!(lines[3], "");
    assert!(lines[4].contains("tokens a pass") && lines[4].contains("speedup"));
    for (line, text) in lines[6..]
        .iter()
        .zip(["refrain", "refrain", "plain", "plain"])
    {
        assert!(line.contains(text), "{out}");
    }
    let named = |text: &str| err.lines().filter(|l| l.contains(text)).count();
    assert_eq!((named("'refrain'"), named("'plain'")), (1, 1), "{err}");
    // Alone: no other tests, and no limits to measure.
    let (code, out, err) = run(&["--lookup", "0", "-r", "1"]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(out.lines().count(), 4, "{out}");
    assert!(!out.contains("GB/s") && !err.contains("limits"));
}

#[test]
fn a_model_that_cannot_say_the_texts_is_one_error() {
    let target = tempfile::tempdir().unwrap();
    let model = |name: &str, change: &[(&str, Value)], tokenizer: bool| {
        let folder = target.path().join(name);
        let mut config = common::config();
        for (field, value) in change {
            config[*field] = value.clone();
        }
        common::write_model(&folder, &config, &common::weights(&config, "F32", 1));
        if tokenizer {
            let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fable/tokenizer.json");
            fs::copy(own, folder.join("tokenizer.json")).unwrap();
        }
        folder.to_str().unwrap().to_owned()
    };
    let vocab = ("vocab_size", json!(4096));
    let dumb = model("dumb", &[], false);
    let narrow = model("narrow", std::slice::from_ref(&vocab), true);
    let long = [
        vocab,
        ("max_position_embeddings", json!(1024)),
        ("original_max_position_embeddings", json!(64)),
        (
            "rope_scaling",
            json!({ "type": "longrope", "short_factor": ([1.0; 4]), "long_factor": ([2.0; 4]) }),
        ),
    ];
    let long = model("long", &long, true);
    for (folder, words) in [
        (
            dumb,
            "the folder has no tokenizer.json or .tiktoken file, and lookup",
        ),
        (narrow, "tokens, the model 128 positions"),
        (long, "outgrows the model's original length of 64"),
    ] {
        // Before any test is run.
        let (code, out, err) = run(&[&folder, "--lookup", "4", "-n", "3", "-q"]);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(
            err.contains(words) && err.lines().count() == 1,
            "expected '{words}' in\n{err}"
        );
    }
}

#[test]
fn bad_usage_is_one_error_each() {
    let cases: &[(i32, &[&str], &str)] = &[
        (2, &["-p", "0"], "expected 1 to"),
        (2, &["-n", "0"], "expected 1 to"),
        (2, &["-p", "1,,2"], "expected 1 to"),
        (2, &["-p", "-3"], "unexpected argument"),
        (2, &["-n", "99999999999999999999999"], "expected 1 to"),
        (2, &["-d", "99999999999999999999999"], "expected 0 to"),
        (2, &["-r", "0"], "expected 1 to"),
        (2, &["-r", "1000000"], "expected 1 to"),
        (2, &["--threads", "0"], "expected 1 to"),
        (2, &["--threads", "1,100000"], "expected 1 to"),
        (2, &["--format", "q5"], "unknown format"),
        (2, &["--kv", "int3"], "unknown type"),
        (2, &["--isa", "mmx"], "unknown instruction set"),
        (2, &["--layers", "2"], "--synth"),
        (
            2,
            &["folder", "--synth", "phi-3.5-mini"],
            "cannot be used with",
        ),
        (2, &["--peaks", "-p", "3"], "cannot be used with"),
        (2, &["--lookup", "32"], "expected 0 to 31"),
        (2, &["--lookup", "4,,8"], "expected 0 to 31"),
        (2, &["--lookup", "x"], "expected 0 to 31"),
        (2, &["--peaks", "--lookup", "4"], "cannot be used with"),
        (2, &["--kernels", "--lookup", "4"], "cannot be used with"),
        (1, &["--lookup", "4", "-d", "20"], "--lookup has no depth"),
        (2, &["--plot", "roof.svg"], "--kernels"),
        (2, &["--kernels", "--peaks"], "cannot be used with"),
        (2, &["--kernels", "-n", "3"], "cannot be used with"),
        (
            1,
            &["--kernels", "--plot", "roof.svg", "--threads", "1,2"],
            "--plot: draws one number of threads, 2 were given",
        ),
        (
            1,
            &["--kernels", "--plot", "no/such/folder/roof.svg"],
            "no/such/folder/roof.svg",
        ),
        (1, &["--synth", "phi-9"], "unknown preset 'phi-9'"),
        (
            1,
            &["--synth", "phi-3.5-mini", "--layers", "0"],
            "expected 1 to 32",
        ),
        (
            1,
            &["--synth", "phi-3.5-mini", "--layers", "33"],
            "expected 1 to 32",
        ),
        (
            1,
            &["--synth", "phi-3.5-mini", "-d", "131072"],
            "pp512 @ d131072: needs 131584 positions, the model has 131072",
        ),
        (
            1,
            &["-p", "1025"],
            "pp1025: needs 1025 positions, the model has 1024",
        ),
        (
            1,
            &["-p", "16777216", "-d", "16777216"],
            "the model has 1024",
        ),
        (1, &["-n", "20", "-d", "500"], "at most 492 or from 512 on"),
        (1, &["no/such/folder"], "no such folder"),
    ];
    for (code, arguments, words) in cases {
        let ran = run(arguments);
        assert_eq!(
            (ran.0, ran.1.as_str()),
            (Some(*code), ""),
            "{arguments:?}\n{}",
            ran.2
        );
        assert!(
            ran.2.contains(words),
            "{arguments:?}: expected '{words}' in\n{}",
            ran.2
        );
        assert_eq!(
            ran.2.matches("error:").count(),
            1,
            "{arguments:?}\n{}",
            ran.2
        );
    }
}

/// Before a minute of measuring, not after it.
#[test]
fn a_plot_that_cannot_be_written_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for place in [folder.path(), &folder.path().join("no/such/folder.svg")] {
        let place = place.to_str().unwrap();
        let (code, out, err) = run(&["--kernels", "--plot", place]);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.starts_with("error: ") && err.contains(place), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_it_cleanly() {
    let home = tempfile::tempdir().unwrap();
    let mut child = phidias(home.path(), &["-p", "512", "-r", "1000", "--rough-peaks"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while line != "pp512\n" {
        line.clear();
        assert_ne!(
            err.read_line(&mut line).unwrap(),
            0,
            "ended before it began"
        );
    }
    let interrupt = ["-INT", &child.id().to_string()];
    assert!(
        Command::new("kill")
            .args(interrupt)
            .status()
            .unwrap()
            .success()
    );
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        (rest.as_str(), output.stdout.len()),
        ("error: cancelled\n", 0)
    );
}

#[test]
fn a_picture_is_timed_in_stages() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/phi3v-tiny-nc4");
    let (model, picture) = (folder.to_str().unwrap(), folder.join("image2.png"));
    let picture = picture.to_str().unwrap();
    let records = json_lines(&[model, "--image", picture, "-r", "2", "--threads", "1,2"]);
    assert_eq!(records.len(), 2);
    for r in &records {
        assert_eq!(
            (&r["kind"], &r["crops"], &r["tokens"]),
            (&json!("picture"), &json!(5), &json!(757))
        );
        // 2 of 3 layers of width 32 and 80, for 577 tokens and 576 patches; attention; the projector.
        let layer = 4 * 32 * 32 + 2 * 32 * 80;
        let crop = 2 * (577 * 2 * layer + 576 * 32 * 588) + 4 * 2 * 577 * 577 * 32;
        near(
            number(r, "ops"),
            f64::from(5 * crop + 2 * 757 * (96 * 128 + 96 * 96)),
        );
        let seconds =
            r["encode_s"]["median"].as_f64().unwrap() + r["project_s"]["median"].as_f64().unwrap();
        near(number(r, "gop_s"), number(r, "ops") / 1e9 / seconds);
        near(
            number(r, "share_of_peak"),
            number(r, "gop_s") / number(r, "peak_gop_s"),
        );
    }
    let less = json_lines(&[
        model,
        "--image",
        picture,
        "-r",
        "1",
        "--num-crops",
        "1",
        "--threads",
        "1",
    ]);
    assert_eq!(less[0]["crops"], 2);
    for (arguments, word) in [
        (&[model, "--image", "nowhere.png"][..], "nowhere.png"),
        (&["--image", picture], "text only"),
    ] {
        let (code, out, err) = run(arguments);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.contains(word), "{err}");
    }
}
