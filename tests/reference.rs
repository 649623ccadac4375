//! Every text fixture against the outputs of the reference implementation, through the public
//! interface: logits at every position, hidden states where given, greedy continuations.
//!
//! Runs on `tests/fixtures`, and on the folder that `PHIDIAS_FIXTURES` names when it is set.
//! Nothing here is keyed to known values: a fixture is whatever its own files say.

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
            if phidias::models::config::SUPPORTED.contains(&kind) {
                found.push(folder);
            } else {
                println!("{}: {kind} is not supported yet", folder.display());
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

fn session(model: &Arc<Model>) -> Session {
    Session::new(
        Arc::clone(model),
        &SessionOptions {
            chunk: 16,
            ..SessionOptions::default()
        },
    )
    .unwrap()
}

fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: f64| v * v;
    let difference: f64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / norm).sqrt()
}

fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

#[test]
fn logits_at_every_position() {
    for folder in language_models() {
        let (expected, model) = (Expected::read(&folder), open(&folder));
        let mut worst = 0.0f64;
        for prompt in expected.prompts() {
            let mut rows = 0;
            session(&model)
                .extend_all(
                    &expected.ids[&format!("{prompt}.input_ids")],
                    |position, logits| {
                        let want = expected.row(&format!("{prompt}.logits"), position);
                        let error = relative_error(logits, want);
                        worst = worst.max(error);
                        let at = format!("{} {prompt} position {position}", folder.display());
                        assert!(error <= TOLERANCE, "{at}: relative error {error:e}");
                        assert_eq!(argmax(logits), argmax(want), "{at}: argmax");
                        assert_eq!(position, rows);
                        rows += 1;
                    },
                )
                .unwrap();
            assert_eq!(rows, expected.tensors[&format!("{prompt}.logits")].0[0]);
        }
        println!(
            "{}: worst relative error of logits {worst:.1e}",
            folder.display()
        );
    }
}

#[test]
fn hidden_states() {
    let mut checked = 0;
    for folder in language_models() {
        let (expected, model) = (Expected::read(&folder), open(&folder));
        for prompt in expected.prompts() {
            if !expected
                .tensors
                .keys()
                .any(|k| k.starts_with(&format!("{prompt}.hidden.")))
            {
                continue;
            }
            let mut observe =
                |point: Point, first: usize, rows: &phidias::engine::tensor::Buffer| {
                    let name = match point {
                        Point::Embed => "embed".to_owned(),
                        Point::AttentionOut(l) => format!("layer{l}_attn_out"),
                        Point::MlpOut(l) => format!("layer{l}_mlp_out"),
                        Point::LayerOut(l) => format!("layer{l}_out"),
                        Point::FinalNorm => "final_norm".to_owned(),
                    };
                    let name = format!("{prompt}.hidden.{name}");
                    if !expected.tensors.contains_key(&name) {
                        return;
                    }
                    for t in 0..rows.rows() {
                        let error = relative_error(rows.row(t), expected.row(&name, first + t));
                        assert!(
                            error <= TOLERANCE,
                            "{} {name} position {}: {error:e}",
                            folder.display(),
                            first + t
                        );
                        checked += 1;
                    }
                };
            let ids = &expected.ids[&format!("{prompt}.input_ids")];
            session(&model)
                .extend_observed(ids, |_, _| {}, &mut observe)
                .unwrap();
        }
    }
    assert!(checked > 0, "no hidden states in the fixtures");
}

#[test]
fn greedy_continuations() {
    for folder in language_models() {
        let (expected, model) = (Expected::read(&folder), open(&folder));
        for prompt in expected.prompts() {
            let want = &expected.ids[&format!("{prompt}.greedy_ids")];
            let mut session = session(&model);
            let mut next = expected.ids[&format!("{prompt}.input_ids")].clone();
            for (step, &id) in want.iter().enumerate() {
                let logits = session.extend(&next).unwrap();
                let at = format!("{} {prompt} step {step}", folder.display());
                let error = relative_error(
                    logits,
                    expected.row(&format!("{prompt}.greedy_logits"), step),
                );
                assert!(error <= TOLERANCE, "{at}: relative error {error:e}");
                assert_eq!(argmax(logits), id as usize, "{at}");
                next = vec![id];
            }
        }
    }
}
