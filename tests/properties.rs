//! What must hold for every model: results that do not depend on how the work was cut, regimes that
//! depend on the length of the sequence alone, formats that agree, files that appear whole or not.

mod common;

use common::*;
use phidias::engine::backend::{Cpu, ExpertScratch, Input, Routes};
use phidias::engine::kv_cache::KvType;
use phidias::engine::memory::Pageable;
use phidias::engine::pool::Pool;
use phidias::engine::sampling::{Sampler, SamplingParams};
use phidias::engine::tensor::{Buffer, Linear, Matrix};
use phidias::engine::{Cancel, Kernels};
use phidias::models::Placement;
use phidias::models::image::Picture;
use phidias::models::quantize::quantize_folder;
use phidias::models::session::Crossing;
use phidias::models::transformer::{FeedForward, Layer};
use phidias::models::vision::Scratch;
use phidias::models::weights::{HEAD, Role};
use phidias::models::{Source, WeightBytes};
use phidias::{Error, Model, OpenOptions, SessionOptions, WeightFormat};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tempfile::TempDir;

/// The tolerance of the comparison with the reference.
const REFERENCE_TOLERANCE: f64 = 1e-4;

fn run(chunk: usize, threads: usize, context: usize) -> SessionOptions {
    SessionOptions {
        context: Some(context),
        chunk,
        threads: Some(threads),
        ..SessionOptions::default()
    }
}

fn bits(logits: &[Vec<f32>]) -> Vec<Vec<u32>> {
    logits
        .iter()
        .map(|row| row.iter().map(|v| v.to_bits()).collect())
        .collect()
}

fn assert_same(a: &[Vec<f32>], b: &[Vec<f32>], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in bits(a).iter().zip(bits(b)).enumerate() {
        assert!(*a == b, "{what}: logits differ at {i} of them");
    }
}

fn original(model: &Model) -> Option<usize> {
    let long = model.config().rope.long.as_ref()?;
    Some(long.original_max_position_embeddings)
}

fn prompt(model: &Model, n: usize, seed: u64) -> Vec<u32> {
    let config = model.config();
    Random(seed).ids(n.min(config.max_position_embeddings), config.vocab_size)
}

/// Every fixture in every format.
fn every_model() -> impl Iterator<Item = (String, Arc<Model>)> {
    text_fixtures().into_iter().flat_map(|folder| {
        WeightFormat::ALL.map(|format| {
            let name = folder.file_name().unwrap().to_string_lossy();
            (format!("{name} in {format}"), open(&folder, format))
        })
    })
}

/// The fixtures with LongRoPE, in f32, and their original length.
fn long_fixtures() -> Vec<(PathBuf, Arc<Model>, usize)> {
    let found: Vec<_> = (text_fixtures().into_iter())
        .filter_map(|folder| {
            let model = open(&folder, WeightFormat::F32);
            let original = original(&model)?;
            Some((folder, model, original))
        })
        .collect();
    assert!(found.len() >= 3, "fixtures with LongRoPE");
    found
}

// ------------------------------------------------------------------------- how the work is cut

#[test]
fn chunks_threads_and_context_do_not_change_a_bit() {
    for (name, model) in every_model() {
        let max = model.config().max_position_embeddings;
        // Within the original length, beyond it, and in q4 beyond a block of 256 of the KV cache.
        let long = if model.format() == WeightFormat::Q4 {
            270
        } else {
            50
        };
        for (n, kv_type) in [
            (24, None),
            (long.min(max), None),
            (24, Some(KvType::Int8)),
            (long.min(max), Some(KvType::Int8)),
        ] {
            let run = |chunk, threads, context| SessionOptions {
                kv_type,
                ..run(chunk, threads, context)
            };
            let ids = prompt(&model, n, 1);
            let base = all_logits(&model, run(512, 1, max), &ids);
            assert_eq!(base.len(), n);
            let variants = [
                (1, 2, n),
                (3, 2, max),
                (16, 2, n),
                (512, 2, n),
                (16, 3, max),
                (7, 4, n),
            ];
            for (chunk, threads, context) in variants {
                let cache = kv_type.map_or("default", KvType::name);
                let what = format!(
                    "{name}, {cache} cache, {n} tokens by {chunk}, {threads} threads, context {context}"
                );
                let got = all_logits(&model, run(chunk, threads, context), &ids);
                assert_same(&got, &base, &what);
            }
        }
    }
}

/// The threads of a forward pass wait for each other many times a layer; where some of them have no
/// core of their own, the scheduler decides which comes first. It must not show.
#[test]
fn more_threads_than_cores_do_not_change_a_bit() {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut counts = vec![4, 7];
    if cores >= 7 {
        counts.push(cores + 3);
    }
    const PROMPT: usize = 21;
    for (name, model) in every_model() {
        let ids = prompt(&model, PROMPT + 4, 21);
        let logits = |threads| {
            let mut session = session(&model, run(16, threads, ids.len()));
            let mut all = Vec::new();
            let keep = |_: usize, row: &[f32]| all.push(row.to_vec());
            session.extend_all(&ids[..PROMPT], keep).unwrap();
            for token in ids[PROMPT..].chunks(1) {
                all.push(session.extend(token).unwrap().to_vec());
            }
            all
        };
        let base = logits(1);
        for &threads in &counts {
            let what = format!("{name}, {threads} threads on {cores} cores");
            assert_same(&logits(threads), &base, &what);
        }
    }
}

#[test]
fn prefill_is_decoding_one_by_one() {
    for (name, model) in every_model() {
        let max = model.config().max_position_embeddings;
        // All within the original length; and all beyond it, after a prompt that is.
        let short = original(&model).unwrap_or(max).min(32);
        let mut cases = vec![(0, short)];
        cases.extend(original(&model).map(|o| (o + 1, o + 20)));
        for (start, n) in cases {
            let ids = prompt(&model, n, 2);
            let whole = all_logits(&model, run(16, 2, max), &ids);
            let mut session = session(&model, run(16, 2, max));
            if start > 0 {
                session.extend(&ids[..start]).unwrap();
            }
            let single: Vec<Vec<f32>> = (start..n)
                .map(|i| session.extend(&ids[i..=i]).unwrap().to_vec())
                .collect();
            assert_same(&single, &whole[start..], &format!("{name} from {start}"));
        }
    }
}

#[test]
fn what_was_truncated_leaves_no_trace() {
    for (name, model) in every_model() {
        let max = model.config().max_position_embeddings;
        let border = original(&model).unwrap_or(30);
        let (first, second) = (prompt(&model, border + 10, 3), prompt(&model, 12, 4));
        // Both before the original length, from beyond it to before it, both beyond it.
        for (held, kept) in [
            (border - 4, border - 14),
            (border + 10, border - 14),
            (border + 10, border + 2),
            (border + 10, 0),
        ] {
            let mut session = session(&model, run(16, 2, max));
            session.extend(&first[..held]).unwrap();
            session.truncate(kept);
            assert_eq!(session.ids(), &first[..kept]);
            let got = session.extend(&second).unwrap().to_vec();
            let sequence = [&first[..kept], &second].concat();
            let fresh = all_logits(&model, run(512, 1, max), &sequence);
            let what = format!("{name}: {held} tokens cut to {kept}");
            assert_same(&[got], &fresh[sequence.len() - 1..], &what);
        }
    }
}

#[test]
fn a_failed_extension_leaves_the_sequence_as_it_was() {
    for (folder, model, original) in long_fixtures() {
        let max = model.config().max_position_embeddings;
        let ids = prompt(&model, original + 6, 5);
        let mut session = session(&model, run(4, 2, max));
        session.extend(&ids[..original - 3]).unwrap();
        // Cancelled in the middle of computing the cache again, beyond the original length.
        let cancel = Cancel::default();
        let switch = cancel.clone();
        session.set_cancel(cancel.clone());
        session.set_progress(move |p| {
            if p.recomputing.is_some() && p.done >= 8 {
                switch.cancel();
            }
        });
        let error = session.extend(&ids[original - 3..]).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        assert_eq!(session.ids(), &ids[..original - 3]);
        cancel.reset();
        session.set_progress(|_| {});
        let got = session
            .extend(&ids[original - 3..original])
            .unwrap()
            .to_vec();
        let fresh = all_logits(&model, run(512, 1, max), &ids[..original]);
        let what = format!("{}", folder.display());
        assert_same(&[got], &fresh[original - 1..], &what);
    }
}

// ------------------------------------------------------------------------------------ LongRoPE

#[test]
fn crossing_the_original_length_is_a_fresh_prefill_of_the_whole() {
    for (name, model) in every_model() {
        let Some(original) = original(&model) else {
            continue;
        };
        let max = model.config().max_position_embeddings;
        let ids = prompt(&model, original + 3, 6);
        let mut session = session(&model, run(16, 2, max));
        session.extend(&ids[..original - 2]).unwrap();
        for n in original - 1..=original + 3 {
            let got = session.extend(&ids[n - 1..n]).unwrap().to_vec();
            let fresh = all_logits(&model, run(512, 1, max), &ids[..n]);
            assert_same(&[got], &fresh[n - 1..], &format!("{name}, length {n}"));
        }
    }
}

#[test]
fn rotating_the_cache_corrects_the_keys_of_the_first_layer() {
    for (folder, model, original) in long_fixtures() {
        let max = model.config().max_position_embeddings;
        let ids = prompt(&model, original + 1, 7);
        let run = |crossing| SessionOptions {
            crossing,
            ..run(16, 2, max)
        };
        let mut rotated = session(&model, run(Crossing::Rotate));
        rotated.extend(&ids[..original]).unwrap();
        let got = rotated.extend(&ids[original..]).unwrap().to_vec();
        let mut fresh = session(&model, run(Crossing::Exact));
        let want = fresh.extend(&ids).unwrap().to_vec();
        assert!(got.iter().all(|v| v.is_finite()), "{}", folder.display());
        assert!(relative_error(&got, &want) > 1e-3, "it is an approximation");

        let half = model.config().head_dim / 2;
        let mut keys_moved = false;
        for head in 0..model.config().num_key_value_heads {
            let keys = |s: &phidias::Session| -> Vec<f32> {
                (0..original)
                    .flat_map(|p| s.cache().read(0, head, p).unwrap().0)
                    .collect()
            };
            let [a, b] = [keys(&rotated), keys(&fresh)];
            for (a, b) in a.chunks_exact(2 * half).zip(b.chunks_exact(2 * half)) {
                for i in 0..half {
                    // Each key: cosine and sine rounded, times the factor, two products and a sum,
                    // 4 roundings of 2^-24 of the two components' magnitudes; the rotated one once
                    // more without the factor, 3; rotation changes |x| + |y| by sqrt(2) at most.
                    let size = b[i].abs() + b[i + half].abs();
                    let bound = 11.0 * 2f32.powi(-24) * size * 1.42;
                    for i in [i, i + half] {
                        let error = (a[i] - b[i]).abs();
                        assert!(
                            error <= bound,
                            "{}: {} for {}",
                            folder.display(),
                            a[i],
                            b[i]
                        );
                    }
                }
            }
            // And they were somewhere else before.
            let mut before = session(&model, run(Crossing::Rotate));
            before.extend(&ids[..original]).unwrap();
            keys_moved |= relative_error(&keys(&before), &b) > 0.01;
        }
        assert!(keys_moved);
    }
}

/// The factors in force are those of the sequence's length: the other list has no effect at all,
/// whatever context is allocated.
#[test]
fn the_length_of_the_sequence_chooses_the_factors() {
    for (folder, model, original) in long_fixtures() {
        let max = model.config().max_position_embeddings;
        let spoiled = |field: &str| {
            let target = TempDir::new().unwrap();
            changed_fixture(&folder, target.path(), |config| {
                for factor in config["rope_scaling"][field].as_array_mut().unwrap() {
                    *factor = json!(factor.as_f64().unwrap() * 1.5);
                }
            });
            // Maps stay when the folder of links is gone.
            open(target.path(), WeightFormat::F32)
        };
        let (other_long, other_short) = (spoiled("long_factor"), spoiled("short_factor"));
        for n in [original - 1, original] {
            let ids = prompt(&model, n, 8);
            let want = all_logits(&model, run(16, 2, n), &ids);
            for context in [original, original + 1, max] {
                let got = all_logits(&other_long, run(16, 2, context), &ids);
                assert_same(
                    &got,
                    &want,
                    &format!("{n} tokens in a context of {context}"),
                );
            }
            let got = all_logits(&other_short, run(16, 2, n), &ids);
            assert!(
                relative_error(&got[n - 1], &want[n - 1]) > 1e-3,
                "short factors at {n}"
            );
        }
        let n = original + 1;
        let ids = prompt(&model, n, 8);
        let want = all_logits(&model, run(16, 2, n), &ids);
        for context in [n, max] {
            let got = all_logits(&other_short, run(16, 2, context), &ids);
            assert_same(
                &got,
                &want,
                &format!("{n} tokens in a context of {context}"),
            );
        }
        let got = all_logits(&other_long, run(16, 2, n), &ids);
        assert!(
            relative_error(&got[n - 1], &want[n - 1]) > 1e-3,
            "long factors at {n}"
        );
    }
}

// ------------------------------------------------------------- block-sparse layers, dropped keys

/// Models with block-sparse layers and one with a window, long enough that keys are hidden, and how many
/// tokens of them.
fn with_hidden_keys() -> Vec<(String, TempDir)> {
    let mut windowed = config();
    windowed["sliding_window"] = json!(70);
    windowed["max_position_embeddings"] = json!(640);
    let mut all_sparse = small_config();
    all_sparse["dense_attention_every_n_layers"] = json!(0);
    all_sparse["blocksparse_homo_head_pattern"] = json!(true);
    [
        ("window", windowed),
        ("small", small_config()),
        ("all sparse", all_sparse),
    ]
    .map(|(name, config)| {
        let folder = TempDir::new().unwrap();
        write_model(folder.path(), &config, &weights(&config, "F32", 31));
        (name.to_owned(), folder)
    })
    .into()
}

const FORMATS: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::Q8, WeightFormat::Q4];

#[test]
fn blocks_that_some_see_are_computed_alike_however_the_work_is_cut() {
    for (name, folder) in with_hidden_keys() {
        for format in FORMATS {
            let model = open(folder.path(), format);
            let ids = prompt(&model, 420, 32);
            let base = all_logits(&model, run(512, 1, 512), &ids);
            // Of 16 threads each tile is divided, of one none is.
            for (chunk, threads, context) in [(512, 16, 420), (5, 2, 512), (100, 3, 420)] {
                let got = all_logits(&model, run(chunk, threads, context), &ids);
                assert_same(&got, &base, &format!("{name} in {format} by {chunk}"));
            }
            for threads in [1, 16] {
                let mut session = session(&model, run(64, threads, 512));
                session.extend(&ids[..400]).unwrap();
                let single: Vec<_> = (400..420)
                    .map(|i| session.extend(&ids[i..=i]).unwrap().to_vec())
                    .collect();
                assert_same(
                    &single,
                    &base[400..],
                    &format!("{name} in {format}, decoding"),
                );
            }
        }
    }
}

#[test]
fn dropped_keys_are_seen_by_nobody() {
    for (name, folder) in with_hidden_keys() {
        for format in FORMATS {
            let model = open(folder.path(), format);
            let ids = prompt(&model, 420, 33);
            let what = format!("{name} in {format}");
            let base = all_logits(&model, run(512, 1, 512), &ids);
            let mut kept = session(&model, run(32, 2, 512));
            kept.extend(&ids).unwrap();
            let options = SessionOptions {
                drop_hidden: true,
                ..run(32, 2, 512)
            };
            let mut dropping = session(&model, options.clone());
            let mut logits = Vec::new();
            let keep = |_: usize, row: &[f32]| logits.push(row.to_vec());
            dropping.extend_all(&ids[..400], keep).unwrap();
            for i in 400..420 {
                logits.push(dropping.extend(&ids[i..=i]).unwrap().to_vec());
            }
            assert_same(&logits, &base, &what);
            let cache = dropping.cache();
            assert!(cache.dropped_bytes() > kept.cache().bytes() / 8, "{what}");
            assert_eq!(cache.bytes() + cache.dropped_bytes(), kept.cache().bytes());
            // What was planned for a full context is never too little.
            let plan = phidias::Session::plan(&model, &options).unwrap();
            assert!(plan.dropped > 0 && plan.dropped == plan.hidden, "{what}");
            assert!(cache.bytes() <= plan.kv_cache, "{what}");

            // A pass drops nothing that it may take back itself, as lookup does with wrong guesses.
            let ran = Arc::new(AtomicBool::new(false));
            let told = Arc::clone(&ran);
            dropping.set_progress(move |p| {
                told.fetch_or(p.recomputing.is_some(), Ordering::Relaxed);
            });
            let held = dropping.cache().bytes();
            dropping.extend(&ids[..30]).unwrap();
            dropping.truncate(420);
            assert_eq!(dropping.cache().len(), 420, "{what}");
            dropping.truncate(419);
            let again = dropping.extend(&ids[419..]).unwrap().to_vec();
            assert_same(&[again], &base[419..], &what);
            assert!(!ran.load(Ordering::Relaxed), "{what}");
            assert!(dropping.cache().bytes() >= held, "{what}");
            // Back to where dropped keys are seen: computed again, and right.
            for back in [300, 100, 17, 0] {
                dropping.truncate(back);
                let tokens = &ids[back..back + 90];
                let again = dropping.extend(tokens).unwrap().to_vec();
                assert_same(
                    &[again],
                    &base[back + 89..back + 90],
                    &format!("{what} {back}"),
                );
            }
            assert!(ran.load(Ordering::Relaxed), "{what}");
        }
    }
}

#[test]
fn a_layout_or_a_factor_that_is_wrong_is_noticed() {
    let sparse = |folder: &PathBuf| {
        let model = open(folder, WeightFormat::F32);
        model.config().block_sparse.is_some()
    };
    let mut fixtures = 0;
    for folder in text_fixtures().into_iter().filter(sparse) {
        fixtures += 1;
        let model = open(&folder, WeightFormat::F32);
        let n = 300.min(model.config().max_position_embeddings);
        let field = |name: &str, change: &dyn Fn(f64) -> f64| {
            moves(&folder, n, |config| {
                let value = change(config[name].as_f64().unwrap());
                config[name] = match config[name].is_u64() {
                    true => json!(value as u64),
                    false => json!(value),
                };
            })
        };
        let doubled = |v: f64| 2.0 * v;
        let half = |v: f64| v / 2.0;
        let more = |v: f64| v + 1.0;
        for (what, moved) in [
            ("stride", field("blocksparse_vert_stride", &more)),
            ("local blocks", field("blocksparse_num_local_blocks", &more)),
            (
                "dense layers",
                field("dense_attention_every_n_layers", &more),
            ),
            ("attention", field("mup_attn_multiplier", &doubled)),
            ("embedding", field("mup_embedding_multiplier", &doubled)),
            ("logits", field("mup_width_multiplier", &half)),
            ("positions", field("rope_position_scale", &half)),
            ("base", field("rope_embedding_base", &half)),
            (
                "head offsets",
                moves(&folder, n, |c| {
                    c["blocksparse_homo_head_pattern"] = json!(true)
                }),
            ),
        ] {
            let name = folder.display();
            assert!(
                moved > 10.0 * REFERENCE_TOLERANCE,
                "{name}: {what} {moved:e}"
            );
        }
    }
    assert!(fixtures >= 2, "fixtures with block-sparse layers");
}

/// As Phi-3-small-128k: LongRoPE with factors on cosine and sine in the file, over block-sparse layers.
#[test]
fn phi_3_small_crosses_its_original_length_exactly() {
    const ORIGINAL: usize = 100;
    let factors = |at: &dyn Fn(usize) -> f64| json!((0..8).map(at).collect::<Vec<_>>());
    let mut config = small_config();
    config["rope_scaling"] = json!({
        "type": "su", "original_max_position_embeddings": ORIGINAL,
        "short_factor": factors(&|i| 1.0 + i as f64 / 50.0),
        "long_factor": factors(&|i| 1.0 + i as f64 * 2.0),
        "short_mscale": 1.1, "long_mscale": 1.3,
    });
    let folder = TempDir::new().unwrap();
    write_model(folder.path(), &config, &weights(&config, "F32", 34));
    for format in FORMATS {
        let model = open(folder.path(), format);
        let long = model.config().rope.long.as_ref().unwrap();
        assert_eq!((long.short_multiplier, long.long_multiplier), (1.1, 1.3));
        let ids = prompt(&model, ORIGINAL + 3, 35);
        for drop_hidden in [false, true] {
            let options = SessionOptions {
                drop_hidden,
                ..run(16, 2, 512)
            };
            let mut session = session(&model, options);
            session.extend(&ids[..ORIGINAL - 2]).unwrap();
            for n in ORIGINAL - 1..=ORIGINAL + 3 {
                let got = session.extend(&ids[n - 1..n]).unwrap().to_vec();
                let fresh = all_logits(&model, run(512, 1, 512), &ids[..n]);
                assert_same(&[got], &fresh[n - 1..], &format!("length {n} in {format}"));
            }
        }
    }
    // Both factors are in force, each in its regime, and nowhere else.
    for (field, n) in [("short_mscale", ORIGINAL), ("long_mscale", ORIGINAL + 1)] {
        let moved = |n: usize| {
            moves(folder.path(), n, |config| {
                config["rope_scaling"][field] = json!(1.2);
            })
        };
        assert!(moved(n) > 10.0 * REFERENCE_TOLERANCE, "{field}");
        let other = if n == ORIGINAL { n + 1 } else { n - 1 };
        assert_eq!(moved(other), 0.0, "{field}");
    }
}

/// Ids without a token have the lowest logit there is: no sampling finds them.
#[test]
fn ids_that_are_no_tokens_are_never_chosen() {
    let mut config = small_config();
    config["vocab_size"] = json!(100_300);
    config["num_hidden_layers"] = json!(1);
    let folder = TempDir::new().unwrap();
    write_model(folder.path(), &config, &weights(&config, "BF16", 36));
    for format in FORMATS {
        let model = open(folder.path(), format);
        let mut session = session(&model, run(16, 2, 64));
        let logits = session.extend(&[5, 100_261, 7]).unwrap().to_vec();
        let unused = |id: usize| {
            [100_256, 100_264, 100_265].contains(&id)
                || (100_258..=100_260).contains(&id)
                || id >= 100_267
        };
        for (id, logit) in logits.iter().enumerate() {
            assert_eq!(*logit == f32::MIN, unused(id), "{id}");
        }
        let params = SamplingParams {
            temperature: 0.2,
            top_k: 0,
            repeat_penalty: 1.3,
            logit_bias: (100_000..100_257).map(|id| (id, 30.0)).collect(),
            seed: 3,
            ..SamplingParams::default()
        };
        let mut sampler = Sampler::new(params, logits.len()).unwrap();
        for _ in 0..20 {
            let id = sampler.sample(&logits, &[100_256, 5]).unwrap().id;
            assert!(!unused(id as usize), "{id}");
        }
    }
}

// --------------------------------------------- mistakes that the reference comparison would notice

/// How far the logits move when the configuration is changed.
fn moves(folder: &Path, n: usize, change: impl Fn(&mut Value)) -> f64 {
    let target = TempDir::new().unwrap();
    changed_fixture(folder, target.path(), change);
    let (model, changed) = (
        open(folder, WeightFormat::F32),
        open(target.path(), WeightFormat::F32),
    );
    let ids = prompt(&model, n, 9);
    let context = model.config().max_position_embeddings;
    let want = all_logits(&model, run(16, 2, context), &ids);
    let got = all_logits(&changed, run(16, 2, context), &ids);
    (got.iter().zip(&want))
        .map(|(a, b)| relative_error(a, b))
        .fold(0.0, f64::max)
}

#[test]
fn a_window_that_is_off_by_one_or_ignored_is_noticed() {
    let mut windows = 0;
    for folder in text_fixtures() {
        let model = open(&folder, WeightFormat::F32);
        let config = model.config();
        let n = config.max_position_embeddings.min(60);
        let Some(window) = config.sliding_window.filter(|w| *w < n) else {
            continue;
        };
        windows += 1;
        for value in [json!(window - 1), json!(window + 1), json!(null)] {
            let moved = moves(&folder, n, |config| {
                config["sliding_window"] = value.clone()
            });
            assert!(
                moved > 10.0 * REFERENCE_TOLERANCE,
                "window {value}: {moved:e}"
            );
        }
    }
    assert!(windows > 0, "no fixture with a window in reach");
}

/// Sets the factors on cosine and sine, as the family calls them.
fn set_factors(config: &mut Value, short: f32, long: f32) {
    let scaling = &mut config["rope_scaling"];
    if scaling["short_mscale"].is_number() {
        scaling["short_mscale"] = json!(short);
        scaling["long_mscale"] = json!(long);
    } else {
        assert_eq!(short, long, "there is but one");
        scaling["attention_factor"] = json!(short);
    }
}

#[test]
fn a_forgotten_attention_factor_is_noticed_in_both_regimes() {
    for (folder, model, original) in long_fixtures() {
        let long = model.config().rope.long.as_ref().unwrap();
        let (short_factor, long_factor) = (long.short_multiplier, long.long_multiplier);
        for (n, factor) in [(original - 1, short_factor), (original + 5, long_factor)] {
            assert!(factor > 1.0);
            let set = |value: f32| moves(&folder, n, |config| set_factors(config, value, value));
            assert_eq!(
                set(factor),
                0.0,
                "the factor is what the formula or the file gives"
            );
            let moved = set(1.0);
            assert!(
                moved > 10.0 * REFERENCE_TOLERANCE,
                "{}: {moved:e}",
                folder.display()
            );
        }
    }
}

#[test]
fn an_original_length_off_by_one_is_noticed() {
    for (folder, model, original) in long_fixtures() {
        let long = model.config().rope.long.as_ref().unwrap();
        for (n, other) in [(original, original - 1), (original + 1, original + 1)] {
            let moved = moves(&folder, n, |config| {
                let name = "original_max_position_embeddings";
                config[name] = json!(other);
                if config["rope_scaling"][name].is_number() {
                    config["rope_scaling"][name] = json!(other);
                }
                set_factors(config, long.short_multiplier, long.long_multiplier);
            });
            assert!(
                moved > 10.0 * REFERENCE_TOLERANCE,
                "{}: {moved:e}",
                folder.display()
            );
        }
    }
}

// ------------------------------------------------------------------------------------- formats

/// All matrices that take a format, by name, as layers without a bias. Those of a layer come in the order of
/// its tensors, and after all layers their experts.
fn matrices(model: &Model) -> Vec<(String, Linear)> {
    let (config, t) = (model.config(), model.transformer());
    let specs = config.specs();
    let of = |roles: &'static [Role]| {
        let specs = specs.iter().filter(|spec| roles.contains(&spec.role));
        specs.filter(|spec| spec.name != HEAD)
    };
    let mut names = vec![(HEAD.to_owned(), Role::Matrix)];
    let named = of(&[Role::Matrix, Role::Router]).chain(of(&[Role::Expert]));
    names.extend(named.map(|spec| (spec.name.clone(), spec.role)));
    let experts = t.layers.iter().flat_map(|layer| layer.experts());
    let head = std::iter::once(&t.lm_head.linear.weight);
    let matrices: Vec<_> = head
        .chain(t.layers.iter().flat_map(Layer::matrices))
        .chain(experts.flat_map(|expert| expert.matrices()))
        .collect();
    assert_eq!(names.len(), matrices.len());
    let layer = |weight: &Matrix| Linear {
        weight: weight.clone(),
        bias: None,
    };
    (names.into_iter().zip(matrices))
        .filter(|((_, role), _)| role.takes_format())
        .map(|((name, _), w)| (name, layer(w)))
        .collect()
}

/// Dequantized, row-major.
fn dequantized(m: &Matrix) -> Vec<f32> {
    let mut values = vec![0.0; m.rows() * m.cols()];
    for (r, row) in values.chunks_exact_mut(m.cols()).enumerate() {
        m.row(r, row);
    }
    values
}

/// A linear layer against dequantize-then-multiply in f64.
///
/// An activation is off by at most half a step of its block, and a step is below `2 amax / 127`, so the
/// product is off by at most `sum |w| * amax / 127`; the f32 sums add
/// `(blocks + 2) * 2^-24` of the sum of the blocks' magnitudes, bounded by `sum |w| * amax`.
#[test]
fn quantized_layers_are_dequantize_then_multiply() {
    for folder in text_fixtures() {
        for format in [WeightFormat::Q8, WeightFormat::Q4] {
            let model = open(&folder, format);
            let pool = Arc::new(Pool::new(Some(2)).unwrap());
            let cpu = Cpu::new(Kernels::best(), pool);
            for (name, linear) in matrices(&model) {
                let matrix = &linear.weight;
                let (rows, cols) = (matrix.rows(), matrix.cols());
                let mut random = Random(10);
                let mut x = Buffer::default();
                x.reshape(3, cols);
                x.data_mut().iter_mut().for_each(|v| *v = random.value());
                let mut y = Buffer::default();
                let mut input = Input::default();
                cpu.enter(|ops| {
                    ops.input(&x, matrix, &mut input);
                    ops.linear(&linear, &input, &mut y);
                });
                let weights = dequantized(matrix);
                let mut used = 0.0f64;
                for t in 0..3 {
                    for (r, w) in weights.chunks_exact(cols).enumerate() {
                        let (mut value, mut bound) = (0.0, 0.0);
                        for (w, x) in w.chunks(32).zip(x.row(t).chunks(32)) {
                            let amax = x.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
                            let size: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
                            let roundings = (cols.div_ceil(32) + 5) as f64 * 2f64.powi(-24);
                            bound += size * amax * (1.0 / 127.0 + roundings);
                            let products = w.iter().zip(x);
                            value += products
                                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                                .sum::<f64>();
                        }
                        let error = (f64::from(y.row(t)[r]) - value).abs();
                        assert!(
                            error <= bound,
                            "{name} row {r} in {format}: {error} over {bound}"
                        );
                        used = used.max(error / bound);
                    }
                }
                assert!(
                    rows * 3 > 0 && used > 0.05,
                    "a bound {used} full cannot fail"
                );
            }
        }
    }
}

/// A whole model against the f32 run of its dequantized weights: all that differs is the activations'
/// eight bits.
///
/// How much a model amplifies a small error is its own affair (the fixtures' random weights do it
/// about tenfold), so the yardstick is the same model with its weights rounded to bf16. That puts
/// `2^-8 / sqrt(3)` times 0.72, the mean over a binade, or 0.16 %, on every linear layer; eight bits put
/// `amax / 127 / sqrt(12)` on it, 0.4 % to 0.8 % for blocks of 32 whose largest value is 1.7 (uniform)
/// to 3.5 (products) times their deviation: 2.5 to 5 times as much. Measured: 3.4 to 4.0 on the
/// fixtures. A forgotten scale or a swapped block is off by hundreds of times.
///
/// Not for a mixture of experts: there the smallest error can send a token to another expert, and the
/// logits are then as far away as they can be, in bf16 no less than in q4. See
/// [`quantized_experts_agree_with_their_dequantized_weights`].
#[test]
fn quantized_models_agree_with_their_dequantized_weights() {
    for folder in text_fixtures() {
        let source = open(&folder, WeightFormat::F32);
        if source.config().moe.is_some() {
            continue;
        }
        let ids = prompt(&source, 40, 11);
        let options = || SessionOptions {
            kv_type: Some(KvType::F32),
            ..run(16, 2, 64)
        };
        for format in [WeightFormat::Q8, WeightFormat::Q4] {
            let model = open(&folder, format);
            let target = TempDir::new().unwrap();
            let t = model.transformer();
            let mut tensors: Vec<Tensor> = matrices(&model)
                .iter()
                .map(|(name, Linear { weight, .. })| {
                    let shape = [weight.rows(), weight.cols()];
                    Tensor::f32(name, &shape, &dequantized(weight))
                })
                .collect();
            let embed = &t.embed_tokens;
            let shape = [embed.rows(), embed.cols()];
            tensors.push(Tensor::f32(
                "model.embed_tokens.weight",
                &shape,
                &dequantized(embed),
            ));
            let checkpoint = phidias::engine::checkpoint::Checkpoint::open(&folder).unwrap();
            let config = model.config();
            for spec in config.specs() {
                if matches!(spec.role, Role::Norm | Role::Bias) {
                    let values = checkpoint.vector(&spec.name, spec.shape[0]).unwrap();
                    tensors.push(Tensor::f32(&spec.name, &spec.shape, &values));
                }
            }
            let config = fs::read(folder.join("config.json")).unwrap();
            let mut config: Value = serde_json::from_slice(&config).unwrap();
            // A head that was quantized is no longer the embedding table.
            config["tie_word_embeddings"] = json!(false);
            write_model(target.path(), &config, &tensors);
            let twin = open(target.path(), WeightFormat::F32);
            let error = |a: &Arc<Model>, b: &Arc<Model>| {
                let (a, b) = (
                    all_logits(a, options(), &ids),
                    all_logits(b, options(), &ids),
                );
                let errors = a.iter().zip(&b).map(|(a, b)| relative_error(a, b));
                errors.sum::<f64>() / a.len() as f64
            };
            let yardstick = error(&open(target.path(), WeightFormat::Bf16), &twin);
            let (activations, all) = (error(&model, &twin), error(&model, &source));
            let ratio = activations / yardstick;
            println!(
                "{} {format}: activations {activations:.4}, {ratio:.1} times bf16; with weights {all:.4}",
                folder.display()
            );
            assert!(
                (2.0..7.0).contains(&ratio),
                "{format}: {ratio} times the error of bf16"
            );
        }
    }
}

/// A layer's experts, with routes that are given, against the f32 product of their dequantized weights.
///
/// The activations' eight bits put 0.4 % to 0.8 % (see above) on each of three products, of which two meet
/// in one: `sqrt(3)` times that, 0.7 % to 1.4 %, if all add as they do at random. Twice is allowed, as a
/// block of another spread may have it.
#[test]
fn quantized_experts_agree_with_their_dequantized_weights() {
    let mut checked = 0;
    for folder in text_fixtures() {
        for format in [WeightFormat::Q8, WeightFormat::Q4] {
            let model = open(&folder, format);
            let hidden = model.config().hidden_size;
            for layer in &model.transformer().layers {
                let FeedForward::Moe(moe) = &layer.feed_forward else {
                    continue;
                };
                let mut random = Random(31);
                let mut draw = |rows: usize, cols: usize| {
                    let mut buffer = Buffer::default();
                    buffer.reshape(rows, cols);
                    buffer
                        .data_mut()
                        .iter_mut()
                        .for_each(|v| *v = random.value());
                    buffer
                };
                let (x, scores) = (draw(37, hidden), draw(37, moe.experts.len()));
                let (mut routes, mut y) = (Routes::default(), Buffer::default());
                let cpu = Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(2)).unwrap()));
                cpu.enter(|ops| {
                    ops.route(&scores, moe.jitter, &mut routes);
                    let mut scratch = ExpertScratch::default();
                    ops.experts(&moe.experts, &routes, &x, &mut y, &mut scratch);
                });
                for (t, picks) in routes.picks().iter().enumerate() {
                    let mut want = vec![0.0f32; hidden];
                    for pick in picks {
                        let matrices = moe.experts[pick.expert].matrices();
                        let [w1, w3, w2]: [Vec<f32>; 3] = matrices
                            .map(dequantized)
                            .collect::<Vec<_>>()
                            .try_into()
                            .unwrap();
                        let times = |w: &[f32], x: &[f32]| -> Vec<f32> {
                            let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum();
                            w.chunks_exact(x.len()).map(dot).collect()
                        };
                        let (gate, up) = (times(&w1, x.row(t)), times(&w3, x.row(t)));
                        let silu = |v: f32| v / (1.0 + (-v).exp());
                        let gated: Vec<f32> =
                            gate.iter().zip(&up).map(|(g, u)| silu(*g) * u).collect();
                        let out = times(&w2, &gated);
                        want.iter_mut()
                            .zip(out)
                            .for_each(|(w, o)| *w += pick.weight * o);
                    }
                    let error = relative_error(y.row(t), &want);
                    assert!(
                        (1e-4..0.028).contains(&error),
                        "{} in {format}, token {t}: {error}",
                        folder.display()
                    );
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 0, "no fixture with experts");
}

/// Experts and embedding of a packed folder are mapped and need not be in memory; what was quantized while
/// loading is.
#[test]
fn weights_are_pageable_where_they_are_mapped() {
    let target = TempDir::new().unwrap();
    for folder in text_fixtures() {
        let loaded = open(&folder, WeightFormat::Q4);
        let moe = loaded.config().moe.is_some();
        let out = target.path().join(folder.file_name().unwrap());
        quantize(&folder, &out, WeightFormat::Q4).unwrap();
        let mapped = open(&out, WeightFormat::Q4);
        assert_eq!(loaded.weight_bytes().pageable, Pageable::default());
        let experts = mapped.transformer().layers.iter().flat_map(|l| l.experts());
        let bytes: usize = experts.map(|expert| expert.bytes()).sum();
        assert_eq!(bytes > 0, moe);
        // A head that is tied to the embedding was packed into a matrix of its own.
        let expected = Pageable {
            experts: bytes,
            embedding: mapped.transformer().embed_tokens.bytes(),
            encoder: 0,
        };
        assert_eq!(mapped.weight_bytes().pageable, expected);
        let plan = phidias::Session::plan(&mapped, &run(16, 1, 16)).unwrap();
        assert_eq!(plan.pageable, expected);
        // Two experts of sixteen, and what sixteen short rows may lie on: two pages each.
        let rows = expected.embedding.min(16 * 8192);
        assert_eq!(plan.working_set, bytes / 8 + rows);
        let rest = expected.embedding - rows + bytes - bytes / 8;
        assert_eq!(plan.total() - plan.least(), rest);
        let source = Source::open(&out).unwrap();
        assert_eq!(source.planned(None).unwrap().1, mapped.weight_bytes());
        if cfg!(target_os = "linux") {
            let now = mapped.residency().expect("mapped weights");
            assert!(now.resident <= now.mapped);
            // Every tensor of the file, once: the embedding, and a head that is tied to it, too.
            assert_eq!(now.mapped, mapped.weight_bytes().all);
            // It was written a moment ago, and run.
            session(&mapped, run(16, 1, 16)).extend(&[1, 2, 3]).unwrap();
            assert!(mapped.residency().unwrap().resident > 0);
        }
    }
}

/// A file may have a head beside the table that serves as one: in no format is it read.
#[test]
fn the_head_of_a_tied_model_is_the_table_whatever_the_file_brings() {
    let target = TempDir::new().unwrap();
    let mut tied = config();
    tied["tie_word_embeddings"] = json!(true);
    for dtype in ["BF16", "F32"] {
        let [without, with] = ["without", "with"].map(|name| target.path().join(dtype).join(name));
        let mut tensors = weights(&tied, dtype, 14);
        write_model(&without, &tied, &tensors);
        let mut own = weights(&config(), dtype, 15);
        own.retain(|tensor| tensor.name == HEAD);
        let own_bytes = own[0].data.len();
        tensors.append(&mut own);
        write_model(&with, &tied, &tensors);
        for format in WeightFormat::ALL {
            let [plain, model] = [&without, &with].map(|folder| open(folder, format));
            let ids = prompt(&plain, 20, 16);
            let [want, got] = [&plain, &model].map(|m| all_logits(m, run(16, 1, 32), &ids));
            assert_same(&got, &want, &format!("{dtype} in {format}"));
            let read = |model: &Model| model.transformer().bytes_per_token();
            assert_eq!(read(&plain), read(&model));
            // What is mapped is counted, read or not; what is made of a file has no second head. The table is
            // read for every token where it serves as the head.
            let made = format.packed().is_some() || (dtype, format) == ("F32", WeightFormat::Bf16);
            let unread = if made { 0 } else { own_bytes };
            let counted = |bytes: WeightBytes| WeightBytes {
                all: bytes.all + unread,
                ..bytes
            };
            let what = format!("{dtype} in {format}");
            assert_eq!(
                model.weight_bytes(),
                counted(plain.weight_bytes()),
                "{what}"
            );
            let [plain, told] = [&without, &with].map(|folder| {
                let source = Source::open(folder).unwrap();
                source.planned(Some(format)).unwrap().1
            });
            assert_eq!(told, counted(plain), "{what}");
            let out = target.path().join(format!("{dtype}-{format}"));
            quantize(&with, &out, format).unwrap();
            let packed = open(&out, format);
            assert_same(
                &all_logits(&packed, run(16, 1, 32), &ids),
                &want,
                &format!("{dtype} kept in {format}"),
            );
        }
    }
}

/// The encoder of a packed folder is counted like every mapped weight, may be paged, and comes back after it
/// was released.
#[test]
fn an_encoder_is_pageable_where_it_is_mapped() {
    let target = TempDir::new().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/phi3v-tiny-nc4");
    let out = target.path().join("q8");
    quantize(&folder, &out, WeightFormat::Q8).unwrap();
    let model = open(&out, WeightFormat::Q8);
    let bytes = model.weight_bytes();
    let source = Source::open(&out).unwrap();
    let encoder = (source.checkpoint.tensors())
        .filter(|(name, _)| name.contains(".vision_embed_tokens."))
        .map(|(_, tensor)| tensor.bytes().len());
    assert_eq!(bytes.pageable.encoder, encoder.sum::<usize>());
    assert!(bytes.pageable.encoder > 0);
    assert_eq!(source.planned(None).unwrap().1, bytes);
    if cfg!(target_os = "linux") {
        assert_eq!(model.residency().unwrap().mapped, bytes.all);
    }
    let (vision, processor) = model.vision().unwrap();
    let picture = Picture::open(&folder.join("image0.png")).unwrap();
    let picture = processor.process(&picture).unwrap();
    let cpu = Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(2)).unwrap()));
    let features = || {
        let (mut scratch, cancel) = (Scratch::default(), Cancel::default());
        let rows = vision.encode(&cpu, &picture, &cancel, &mut |_, _| {}, &mut scratch);
        rows.unwrap()
    };
    let before = features();
    model.release_encoder();
    assert_eq!(features().data(), before.data());
}

#[test]
fn routing_is_counted_from_call_to_call() {
    let mut checked = 0;
    for folder in text_fixtures() {
        let model = open(&folder, WeightFormat::F32);
        let layers = model.config().num_hidden_layers;
        let mut session = session(&model, run(16, 2, 64));
        assert!(session.take_routing().unwrap().is_empty());
        let ids = prompt(&model, 24, 41);
        session.extend(&ids[..20]).unwrap();
        let prefill = session.take_routing().unwrap();
        assert_eq!(prefill.len(), layers);
        ids[20..].chunks(1).for_each(|id| {
            session.extend(id).unwrap();
        });
        let decode = session.take_routing().unwrap();
        for (prefill, decode) in prefill.iter().zip(&decode) {
            let experts = model.config().moe.map_or(0, |moe| moe.experts);
            assert_eq!(prefill.tokens.len(), experts);
            let picks = if experts > 0 { 2 } else { 0 };
            assert_eq!(prefill.tokens.iter().sum::<u64>(), 20 * picks);
            // Two passes, of 16 tokens and of 4.
            assert!(prefill.reads <= 2 * experts as u64 && prefill.reads >= picks);
            // A token reads two experts, and no more.
            assert_eq!(decode.tokens.iter().sum::<u64>(), 4 * picks);
            assert_eq!(decode.reads, 4 * picks);
            checked += experts;
        }
    }
    assert!(checked > 0, "no fixture with experts");
}

// --------------------------------------------------------------------------------------- files

/// Names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn quantize(folder: &Path, out: &Path, format: WeightFormat) -> Result<(), Error> {
    quantize_folder(folder, out, format, &mut options(format))
}

#[test]
fn a_prepacked_folder_is_the_folder_quantized_while_loading() {
    let target = TempDir::new().unwrap();
    let mut folders = text_fixtures();
    let mut tied = config();
    tied["tie_word_embeddings"] = json!(true);
    for (name, dtype) in [("tied-bf16", "BF16"), ("tied-f32", "F32")] {
        folders.push(target.path().join(name));
        write_model(folders.last().unwrap(), &tied, &weights(&tied, dtype, 12));
    }
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for format in WeightFormat::ALL {
            let out = target.path().join(format!("{name}-{format}"));
            quantize(&folder, &out, format).unwrap();
            let loaded = open(&folder, format);
            // Without asking for a format: the folder says what it is.
            let packed = Arc::new(Model::open(&out, OpenOptions::default()).unwrap());
            if format.packed().is_some() {
                assert_eq!(packed.format(), format);
                assert_eq!(packed.weight_bytes().all, loaded.weight_bytes().all);
            }
            let packed = open(&out, format);
            let ids = prompt(&loaded, 30, 13);
            let [a, b] = [&loaded, &packed].map(|m| all_logits(m, run(16, 2, 64), &ids));
            assert_same(&a, &b, &format!("{name} in {format}"));
            // The small files came along, the index of the shards did not.
            assert!(
                out.join("config.json").exists()
                    && !out.join("model.safetensors.index.json").exists()
            );
            let small = "generation_config.json";
            assert_eq!(out.join(small).exists(), folder.join(small).exists());
            #[cfg(unix)]
            {
                // As readable as any file that this process makes, not private like temporary ones.
                use std::os::unix::fs::PermissionsExt;
                let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
                fs::create_dir_all(target.path().join("any")).unwrap();
                fs::write(target.path().join("any/file"), "").unwrap();
                assert_eq!(mode(&out), mode(&target.path().join("any")));
                let weights = out.join("model.safetensors");
                assert_eq!(mode(&weights), mode(&target.path().join("any/file")));
            }
        }
    }
    let left: Vec<_> = (names(target.path()).into_iter())
        .filter(|n| n.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A model of some tens of MB, as it would come from the hub.
fn large_model(folder: &Path) {
    let mut config = config();
    for (field, value) in [
        ("vocab_size", 2048),
        ("hidden_size", 512),
        ("intermediate_size", 1536),
        ("num_hidden_layers", 5),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 8),
    ] {
        config[field] = json!(value);
    }
    write_model(folder, &config, &weights(&config, "BF16", 14));
}

/// Runs one test of this program again in a process of its own, started by `sh` after `prelude`.
#[cfg(unix)]
fn in_a_process(test: &str, prelude: &str, folder: &Path) {
    let output = Command::new("sh")
        .args(["-c", &format!("{prelude} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("PHIDIAS_TEST_FOLDER", folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    print!("{text}");
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

/// The folder that [`in_a_process`] names, in the process that it starts.
fn folder_of_child() -> Option<PathBuf> {
    std::env::var_os("PHIDIAS_TEST_FOLDER").map(PathBuf::from)
}

#[cfg(target_os = "linux")]
#[test]
fn mapped_weights_take_no_memory_of_their_own() {
    let target = TempDir::new().unwrap();
    let folder = target.path().join("model");
    large_model(&folder);
    quantize(&folder, &target.path().join("q8"), WeightFormat::Q8).unwrap();
    in_a_process("child_measures_resident_memory", "", target.path());
}

/// Anonymous memory is this process's own; file pages are shared and can be dropped at any time.
#[cfg(target_os = "linux")]
#[test]
fn child_measures_resident_memory() {
    let Some(target) = folder_of_child() else {
        return;
    };
    const MIB: usize = 1 << 20;
    let resident = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let bytes = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
            let kib = line.trim().trim_end_matches("kB").trim();
            kib.parse::<usize>().unwrap() * 1024
        };
        // A file on a file system in memory counts as shared.
        [bytes("RssAnon:"), bytes("RssFile:") + bytes("RssShmem:")]
    };
    // Runs a token through the model, so that every page of it was read.
    let grown = |folder: &str, format| {
        let before = resident();
        let model = open(&target.join(folder), format);
        session(&model, run(1, 2, 4)).extend(&[1]).unwrap();
        let after = resident();
        let weights = model.weight_bytes().all;
        let [anonymous, file] = [0, 1].map(|i| after[i].saturating_sub(before[i]));
        println!(
            "{folder} in {format}: {} MiB of weights, {} MiB anonymous, {} MiB of files",
            weights / MIB,
            anonymous / MIB,
            file / MIB
        );
        (weights, anonymous, file)
    };
    for (folder, format) in [("model", WeightFormat::Bf16), ("q8", WeightFormat::Q8)] {
        let (weights, anonymous, file) = grown(folder, format);
        assert!(weights > 16 * MIB);
        // Every weight but the embedding of other tokens was read, where it lies in the file.
        assert!(file > weights * 3 / 4, "{file} of {weights}");
        // The session's own: cache, activations, threads, norms.
        assert!(anonymous < 6 * MIB, "{anonymous} beside {weights}");
    }
    // The measure can fail: quantized while loading, one copy is this process's own, and not two.
    let (weights, anonymous, _) = grown("model", WeightFormat::Q8);
    assert!(anonymous > weights * 3 / 4, "{anonymous} of {weights}");
    assert!(anonymous < weights + 14 * MIB, "{anonymous} of {weights}");
}

/// Where the weights lie changes no bit, and a copy leaves nothing mapped.
#[test]
fn weights_in_memory_of_ones_own_are_the_same_weights() {
    let target = TempDir::new().unwrap();
    let (source, packed) = (target.path().join("model"), target.path().join("packed"));
    large_model(&source);
    quantize(&source, &packed, WeightFormat::Q8).unwrap();
    for (folder, format) in [(&source, WeightFormat::Bf16), (&packed, WeightFormat::Q8)] {
        let at = |placement| {
            let mut told = Vec::new();
            let mut progress = |done: usize, total: usize| told.push((done, total));
            let model = Model::open(
                folder,
                OpenOptions {
                    placement,
                    progress: Some(&mut progress),
                    ..options(format)
                },
            );
            let model = Arc::new(model.unwrap());
            let mapped = model.residency().is_some();
            let logits = all_logits(&model, run(4, 2, 8), &[1, 2, 3]);
            (logits, mapped, told)
        };
        let (mapped, copied) = (at(Placement::Mapped), at(Placement::Copied));
        assert_eq!((mapped.1, copied.1), (true, false));
        assert_same(&mapped.0, &copied.0, "mapped and copied");
        assert_eq!(mapped.2, []);
        let (done, total) = *copied.2.last().unwrap();
        assert!(done == total && copied.2.is_sorted(), "{:?}", copied.2);
    }
    // Cancelled before the first piece.
    let cancel = Cancel::default();
    cancel.cancel();
    let cancelled = Model::open(
        &packed,
        OpenOptions {
            placement: Placement::Copied,
            cancel,
            ..options(WeightFormat::Q8)
        },
    );
    let error = cancelled.err().unwrap();
    assert_eq!(error.to_string(), "cancelled");
}

fn with_cache(cache: &Path) -> OpenOptions<'static> {
    OpenOptions {
        cache: Some(cache.to_owned()),
        ..options(WeightFormat::Q8)
    }
}

#[test]
fn quantized_weights_are_kept_and_found_again() {
    let target = TempDir::new().unwrap();
    let (folder, cache) = (
        target.path().join("model"),
        target.path().join("cache/deep"),
    );
    large_model(&folder);
    let logits = |model: Model| all_logits(&Arc::new(model), run(4, 2, 8), &[1, 2, 3]);
    let open = |expected: &str| {
        let model = Model::open(&folder, with_cache(&cache)).unwrap();
        let note = model.note().unwrap().to_owned();
        assert!(note.contains(expected) && note.contains("q8"), "{note}");
        logits(model)
    };
    let first = open("kept in");
    let files = names(&cache);
    assert_eq!(files.len(), 1, "{files:?}");
    assert!(
        files[0].starts_with("model-") && files[0].contains("q8-v"),
        "{files:?}"
    );
    assert_same(&open("from"), &first, "the second start");
    assert_eq!(names(&cache), files);
    // Without a cache: the same, and nothing to say.
    let plain = Model::open(&folder, options(WeightFormat::Q8)).unwrap();
    assert_eq!(plain.note(), None);
    assert_same(&logits(plain), &first, "without a cache");

    // A cached file that is damaged is written again: cut, another file, one without the tensors.
    let cached = cache.join(&files[0]);
    let whole = fs::read(&cached).unwrap();
    let other = container(&weights(&config(), "F32", 1));
    for damaged in [
        &whole[..whole.len() / 2],
        &[],
        b"no container",
        &raw("{}", &[]),
        &other,
    ] {
        fs::remove_file(&cached).unwrap();
        fs::write(&cached, damaged).unwrap();
        assert_same(&open("kept in"), &first, "written again");
        assert!(fs::read(&cached).unwrap() == whole);
        assert_eq!(names(&cache), files);
    }

    // Another time of change is another source.
    let weights = fs::File::options()
        .append(true)
        .open(folder.join("model.safetensors"))
        .unwrap();
    let time = weights.metadata().unwrap().modified().unwrap();
    weights
        .set_modified(time + std::time::Duration::from_secs(1))
        .unwrap();
    open("kept in");
    assert_eq!(names(&cache).len(), 2);
    weights.set_modified(time).unwrap();
    open("from");

    // A cache that cannot be written is said and does no harm.
    let model = Model::open(&folder, with_cache(&cached)).unwrap();
    let note = model.note().unwrap().to_owned();
    assert!(note.contains("could not be kept"), "{note}");
    assert_same(&logits(model), &first, "without a place for it");
}

#[test]
fn a_place_that_cannot_be_written_is_an_error_and_stays_empty() {
    let target = TempDir::new().unwrap();
    let folder = target.path().join("model");
    write_model(&folder, &config(), &weights(&config(), "F32", 1));
    let before = names(target.path());
    // The parent is a file.
    let out = folder.join("config.json").join("out");
    let error = quantize(&folder, &out, WeightFormat::Q4).unwrap_err();
    assert!(
        matches!(&error, Error::Io { path, .. } if Some(path.as_path()) == out.parent()),
        "{error}"
    );
    // It is there already: a folder, a file, a link to nothing.
    let out = target.path().join("there");
    let refused = || {
        let error = quantize(&folder, &out, WeightFormat::Q4).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
    };
    fs::create_dir(&out).unwrap();
    refused();
    assert!(names(&out).is_empty(), "it is as it was");
    fs::remove_dir(&out).unwrap();
    fs::write(&out, "mine").unwrap();
    refused();
    assert_eq!(fs::read(&out).unwrap(), b"mine");
    fs::remove_file(&out).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", &out).unwrap();
        refused();
        fs::remove_file(&out).unwrap();
    }
    assert_eq!(names(target.path()), before, "nothing is left");
}

#[test]
fn a_cancelled_quantization_leaves_nothing() {
    let target = TempDir::new().unwrap();
    let folder = target.path().join("model");
    write_model(&folder, &config(), &weights(&config(), "F32", 1));
    let out = target.path().join("out");
    let cancel = Cancel::default();
    let switch = cancel.clone();
    let mut seen = Vec::new();
    let mut progress = |done: usize, all: usize| {
        seen.push((done, all));
        if done > all / 2 {
            switch.cancel();
        }
    };
    let mut options = OpenOptions {
        cancel,
        progress: Some(&mut progress),
        ..options(WeightFormat::Q4)
    };
    let error = quantize_folder(&folder, &out, WeightFormat::Q4, &mut options).unwrap_err();
    assert!(error.to_string().contains("cancelled"), "{error}");
    assert_eq!(names(target.path()), ["model"]);
    assert!(seen.len() > 1 && seen.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 == w[1].1));
    assert!(
        seen.last().unwrap().0 < seen[0].1,
        "it stopped before the end"
    );
}

/// A full disk, as a process sees it whose files may not grow beyond some blocks.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_half_file() {
    let target = TempDir::new().unwrap();
    large_model(&target.path().join("model"));
    // Blocks are of 512 or 1024 bytes; the signal would end the process before the error is seen.
    let prelude = "trap '' XFSZ; ulimit -f 8192;";
    in_a_process("child_writes_to_a_full_disk", prelude, target.path());
    assert_eq!(names(target.path()), ["cache", "model"]);
    assert!(
        names(&target.path().join("cache")).is_empty(),
        "nothing is left"
    );
}

#[cfg(unix)]
#[test]
fn child_writes_to_a_full_disk() {
    let Some(target) = folder_of_child() else {
        return;
    };
    let (folder, out) = (target.join("model"), target.join("out"));
    let error = quantize(&folder, &out, WeightFormat::Q8)
        .unwrap_err()
        .to_string();
    println!("{error}");
    assert!(
        error.contains("model.safetensors") && error.contains("too large"),
        "{error}"
    );
    assert_eq!(names(&target), ["model"]);
    // While loading: said, and the model runs from memory.
    let cache = target.join("cache");
    let model = Model::open(&folder, with_cache(&cache)).unwrap();
    let note = model.note().unwrap();
    assert!(
        note.contains("could not be kept") && note.contains("too large"),
        "{note}"
    );
    assert!(names(&cache).is_empty());
    session(&Arc::new(model), run(4, 1, 8))
        .extend(&[1, 2])
        .unwrap();
}
