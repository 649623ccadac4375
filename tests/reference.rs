//! Every text fixture against the outputs of the reference implementation, through the public
//! interface: logits at every position, hidden states where given, greedy continuations.
//!
//! Runs on `tests/fixtures`, and on the folder that `PHIDIAS_FIXTURES` names when it is set.
//! Nothing here is keyed to known values: a fixture is whatever its own files say.

use phidias::engine::backend::{Cpu, Pick, Routes};
use phidias::engine::pool::Pool;
mod common;

use common::relative_error;
use phidias::engine::tensor::Buffer;
use phidias::engine::{Isa, Kernels};
use phidias::models::Family;
use phidias::models::transformer::Point;
use phidias::{Model, OpenOptions, Session, SessionOptions, WeightFormat};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest relative error, ||a - b|| / ||b||, of logits and hidden states in f32.
const TOLERANCE: f64 = 1e-4;

fn fixture_roots() -> Vec<PathBuf> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")];
    roots.extend(std::env::var_os("PHIDIAS_FIXTURES").map(PathBuf::from));
    roots
}

/// The folders with expected outputs of a causal language model of a supported family.
fn language_models() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for root in fixture_roots() {
        let entries =
            std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let mut folders: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
        folders.sort();
        for folder in folders
            .into_iter()
            .filter(|f| f.join("expected.safetensors").exists())
        {
            let Ok(config) = std::fs::read(folder.join("config.json")) else {
                continue;
            };
            let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
            let kind = config["model_type"].as_str().unwrap_or("");
            match Family::of(kind) {
                // Pictures have a suite of their own.
                Some(Family::Phi3V) => {}
                Some(_) => found.push(folder),
                None => println!("{}: {kind} is not a text model", folder.display()),
            }
        }
    }
    assert!(!found.is_empty(), "no fixtures");
    found
}

struct Expected {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    ids: HashMap<String, Vec<u32>>,
}

impl Expected {
    fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (mut tensors, mut ids) = (HashMap::new(), HashMap::new());
        for (name, view) in file.tensors() {
            match view.dtype() {
                safetensors::Dtype::F32 => {
                    let values = view
                        .data()
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                    tensors.insert(name, (view.shape().to_vec(), values.collect()));
                }
                safetensors::Dtype::I64 => {
                    let values = view
                        .data()
                        .chunks_exact(8)
                        .map(|b| i64::from_le_bytes(b.try_into().unwrap()));
                    ids.insert(name, values.map(|v| u32::try_from(v).unwrap()).collect());
                }
                _ => {}
            }
        }
        Self { tensors, ids }
    }

    fn prompts(&self) -> Vec<String> {
        let mut names: Vec<_> = (self.ids.keys().filter_map(|k| k.strip_suffix(".input_ids")))
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }

    fn row(&self, name: &str, row: usize) -> &[f32] {
        let (shape, values) = &self.tensors[name];
        &values[row * shape[1]..][..shape[1]]
    }
}

fn open(folder: &Path) -> Arc<Model> {
    let options = OpenOptions {
        format: Some(WeightFormat::F32),
        ..OpenOptions::default()
    };
    Arc::new(Model::open(folder, options).unwrap_or_else(|e| panic!("{}: {e}", folder.display())))
}

/// A session on every table of kernels that this CPU can run.
fn sessions(model: &Arc<Model>) -> impl Iterator<Item = Session> {
    let tables = Isa::ALL.into_iter().filter_map(Kernels::for_isa);
    tables.map(|kernels| {
        let options = SessionOptions {
            chunk: 16,
            kernels: Some(kernels),
            ..SessionOptions::default()
        };
        Session::new(Arc::clone(model), &options).unwrap()
    })
}

fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// Sessions on every device that is not the CPU, with its name.
fn device_sessions(folder: &Path) -> Vec<(String, Session)> {
    let options = SessionOptions {
        chunk: 16,
        ..SessionOptions::default()
    };
    let models = common::on_devices(folder, WeightFormat::F32).into_iter();
    models
        .map(|(device, model)| (device, Session::new(model, &options).unwrap()))
        .collect()
}

/// Every prompt of every fixture, on every table and every device.
fn each_case(mut check: impl FnMut(&str, &Expected, &str, Session)) {
    for folder in language_models() {
        let (expected, model) = (Expected::read(&folder), open(&folder));
        for prompt in expected.prompts() {
            for session in sessions(&model) {
                let isa = session.cpu().unwrap().kernels().isa();
                let name = format!("{} {prompt} on {isa}", folder.display());
                check(&name, &expected, &prompt, session);
            }
            for (device, session) in device_sessions(&folder) {
                let name = format!("{} {prompt} on {device}", folder.display());
                check(&name, &expected, &prompt, session);
            }
        }
    }
}

#[test]
fn logits_at_every_position() {
    let mut worst = 0.0f64;
    each_case(|name, expected, prompt, mut session| {
        let mut rows = 0;
        let ids = &expected.ids[&format!("{prompt}.input_ids")];
        let each = |position: usize, logits: &[f32]| {
            let want = expected.row(&format!("{prompt}.logits"), position);
            let error = relative_error(logits, want);
            worst = worst.max(error);
            assert!(
                error <= TOLERANCE,
                "{name}, position {position}: relative error {error:e}"
            );
            assert_eq!(
                argmax(logits),
                argmax(want),
                "{name}, position {position}: argmax"
            );
            assert_eq!(position, rows);
            rows += 1;
        };
        session.extend_all(ids, each).unwrap();
        assert_eq!(rows, expected.tensors[&format!("{prompt}.logits")].0[0]);
    });
    println!("worst relative error of logits: {worst:.1e}");
}

#[test]
fn hidden_states() {
    let mut checked = 0;
    each_case(|case, expected, prompt, mut session| {
        let prefix = format!("{prompt}.hidden.");
        if !expected.tensors.keys().any(|k| k.starts_with(&prefix)) {
            return;
        }
        let mut observe = |point: Point, first: usize, rows: &Buffer| {
            let name = match point {
                Point::Embed => prefix.clone() + "embed",
                Point::AttentionOut(l) => format!("{prefix}layer{l}_attn_out"),
                Point::RouterScores(l) => format!("{prompt}.layer{l}.router_logits"),
                Point::MlpOut(l) => format!("{prefix}layer{l}_mlp_out"),
                Point::LayerOut(l) => format!("{prefix}layer{l}_out"),
                Point::FinalNorm => prefix.clone() + "final_norm",
            };
            // Families with a factor on the embedding name it as what comes after that.
            let scaled = format!("{name}_scaled");
            let given = |name: &String| expected.tensors.contains_key(name);
            let Some(name) = [name, scaled].into_iter().find(given) else {
                return;
            };
            for t in 0..rows.rows() {
                let error = relative_error(rows.row(t), expected.row(&name, first + t));
                assert!(
                    error <= TOLERANCE,
                    "{case}, {name}, position {}: {error:e}",
                    first + t
                );
                checked += 1;
            }
        };
        let ids = &expected.ids[&format!("{prompt}.input_ids")];
        session
            .extend_observed(ids, |_, _| {}, &mut observe)
            .unwrap();
    });
    assert!(checked > 0, "no hidden states in the fixtures");
}

#[test]
fn greedy_continuations() {
    each_case(|name, expected, prompt, mut session| {
        let want = &expected.ids[&format!("{prompt}.greedy_ids")];
        let mut next = expected.ids[&format!("{prompt}.input_ids")].clone();
        for (step, &id) in want.iter().enumerate() {
            let logits = session.extend(&next).unwrap();
            let reference = expected.row(&format!("{prompt}.greedy_logits"), step);
            let error = relative_error(logits, reference);
            assert!(
                error <= TOLERANCE,
                "{name}, step {step}: relative error {error:e}"
            );
            assert_eq!(argmax(logits), id as usize, "{name}, step {step}");
            next = vec![id];
        }
    });
}

/// The routes of rows of scores, `[tokens, experts]`.
fn routes(scores: &Buffer, jitter: f32) -> Routes {
    let cpu = Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(1)).unwrap()));
    let mut routes = Routes::default();
    cpu.enter(|ops| ops.route(scores, jitter, &mut routes));
    routes
}

/// The same experts in the same order, and weights that differ by the last place of an f32 at most: the
/// reference sums in f32, and exponentials of f32 arguments differ by their last place.
fn assert_picks(picks: &[Pick; 2], experts: &[u32], weights: &[f32], what: &str) {
    for (pick, (expert, weight)) in picks.iter().zip(experts.iter().zip(weights)) {
        assert_eq!(pick.expert, *expert as usize, "{what}: expert");
        let error = (pick.weight - weight).abs();
        assert!(
            error <= 4.0 * f32::EPSILON * weight,
            "{what}: weight {} for {weight}",
            pick.weight
        );
    }
}

/// What is usual elsewhere, and wrong here: the two largest, their softmax.
fn renormalized(scores: &[f32]) -> [f32; 2] {
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let second = (sorted[1] - sorted[0]).exp();
    [1.0 / (1.0 + second), second / (1.0 + second)]
}

#[test]
fn sparsemixer_picks_and_weighs_as_published() {
    let mut rows = 0;
    for root in fixture_roots() {
        let folder = root.join("ops");
        if !folder.exists() {
            continue;
        }
        let expected = Expected::read(&folder);
        let (shape, values) = &expected.tensors["sparsemixer.router_logits"];
        let experts = &expected.ids["sparsemixer.experts"];
        let mut scores = Buffer::default();
        scores.reshape(shape[0], shape[1]);
        scores.data_mut().copy_from_slice(values);
        let routes = routes(&scores, 0.01);
        let (mut renormalized_errors, mut not_one) = (Vec::new(), 0);
        for (t, picks) in routes.picks().iter().enumerate() {
            let weights = expected.row("sparsemixer.weights", t);
            let what = format!("{}, row {t}", folder.display());
            assert_picks(picks, &experts[2 * t..2 * t + 2], weights, &what);
            renormalized_errors.push(relative_error(&renormalized(scores.row(t)), weights));
            not_one += usize::from((weights[0] + weights[1] - 1.0).abs() > 0.1);
            rows += 1;
        }
        // A router of the usual kind would be off by far more than any tolerance here, nearly everywhere.
        renormalized_errors.sort_by(f64::total_cmp);
        assert!(renormalized_errors[renormalized_errors.len() / 4] > 0.1);
        assert!(not_one > routes.picks().len() / 2);
    }
    assert!(rows > 0, "no fixture of the router");
}

/// In the models themselves: the scores that their layers compute, and where these send the tokens. And
/// the weights that are wrong here would move a layer's output far beyond the tolerance.
#[test]
fn tokens_go_to_the_experts_of_the_reference() {
    let mut checked = 0;
    each_case(|case, expected, prompt, mut session| {
        let Some(moe) = session.model().config().moe else {
            return;
        };
        if !expected
            .ids
            .contains_key(&format!("{prompt}.layer0.selected_experts"))
        {
            return;
        }
        let mut observe = |point: Point, first: usize, scores: &Buffer| {
            let Point::RouterScores(l) = point else {
                return;
            };
            let experts = &expected.ids[&format!("{prompt}.layer{l}.selected_experts")];
            for (t, picks) in routes(scores, moe.jitter).picks().iter().enumerate() {
                let position = first + t;
                let weights = expected.row(&format!("{prompt}.layer{l}.routing_weights"), position);
                let experts = &experts[2 * position..2 * position + 2];
                let what = format!("{case}, layer {l}, position {position}");
                // The scores are those of a model that differs by up to the tolerance: a weight between
                // those near it moves as much as a score, whose sizes are some units.
                for (pick, (expert, weight)) in picks.iter().zip(experts.iter().zip(weights)) {
                    assert_eq!(pick.expert, *expert as usize, "{what}");
                    let error = f64::from((pick.weight - weight).abs());
                    assert!(
                        error <= 10.0 * TOLERANCE,
                        "{what}: {} for {weight}",
                        pick.weight
                    );
                }
                checked += 1;
            }
        };
        let ids = &expected.ids[&format!("{prompt}.input_ids")];
        session
            .extend_observed(ids, |_, _| {}, &mut observe)
            .unwrap();
    });
    assert!(checked > 0, "no routes in the fixtures");
}
