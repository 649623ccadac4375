//! The CLIP encoder against the reference implementation, on every table of kernels.
//!
//! Runs on `tests/fixtures`, and on the folder that `PHIDIAS_FIXTURES` names when it is set.

use phidias_engine::backend::Cpu;
use phidias_engine::pool::Pool;
use phidias_engine::{Isa, Kernels};
use phidias_models::clip::Scratch;
use phidias_models::{Clip, WeightFormat};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest relative error, ||a - b|| / ||b||, of a token's hidden state in f32.
const TOLERANCE: f64 = 1e-4;

/// An encoder with its expected outputs, whose names begin with the folder's.
struct Case {
    name: String,
    clip: Clip,
    format: WeightFormat,
    /// Shape and values.
    expected: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

fn cases(format: WeightFormat) -> Vec<Case> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")];
    roots.extend(std::env::var_os("PHIDIAS_FIXTURES").map(PathBuf::from));
    let folders = |root: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let mut found: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
        found.retain(|f| f.is_dir());
        found.sort();
        found
    };
    let mut found = Vec::new();
    for set in roots.iter().flat_map(|root| folders(root)) {
        for folder in folders(&set) {
            let Ok(config) = std::fs::read_to_string(folder.join("config.json")) else {
                continue;
            };
            if !config.contains("clip_vision_model") {
                continue;
            }
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            let clip =
                Clip::open(&folder, format).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            found.push(Case {
                expected: expected(&set.join("expected.safetensors"), &format!("{name}.")),
                name: folder.display().to_string(),
                clip,
                format,
            });
        }
    }
    assert!(!found.is_empty(), "no encoder among the fixtures");
    found
}

fn expected(file: &Path, prefix: &str) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = HashMap::new();
    for (name, view) in file.tensors() {
        let Some(name) = name.strip_prefix(prefix) else {
            continue;
        };
        let (floats, _) = view.data().as_chunks::<4>();
        let values = floats.iter().map(|b| f32::from_le_bytes(*b)).collect();
        tensors.insert(name.to_owned(), (view.shape().to_vec(), values));
    }
    tensors
}

impl Case {
    /// The pictures as the encoder takes them: whole, or one value a patch.
    fn pixels(&self) -> Vec<f32> {
        if let Some((_, values)) = self.expected.get("pixel_values") {
            return values.clone();
        }
        let c = self.clip.config();
        let (grid, size) = (c.grid(), c.image_size);
        let (shape, values) = &self.expected["pixel_grid_24x24"];
        assert_eq!(shape[2..], [grid, grid]);
        let channel = |cells: &[f32]| -> Vec<f32> {
            let at = |i: usize| (i / size / c.patch_size) * grid + i % size / c.patch_size;
            (0..size * size).map(|i| cells[at(i)]).collect()
        };
        values.chunks(grid * grid).flat_map(channel).collect()
    }

    /// The hidden states from 0 to the last, and the pooled output, of all pictures.
    fn run(&self, kernels: &'static Kernels, threads: usize) -> (Vec<Vec<f32>>, Vec<f32>) {
        let cpu = Cpu::new(kernels, Arc::new(Pool::new(Some(threads)).unwrap()));
        let (mut s, mut states) = (Scratch::default(), Vec::new());
        let (layers, pixels) = (self.clip.config().num_hidden_layers, self.pixels());
        cpu.enter(|ops| {
            let mut keep =
                |_: usize, x: &phidias_engine::tensor::Buffer| states.push(x.data().to_vec());
            self.clip.forward(ops, &pixels, layers, &mut s, &mut keep);
        });
        states.push(s.hidden().data().to_vec());
        let pooled = (0..s.normed().rows()).step_by(self.clip.config().tokens());
        let pooled = pooled
            .flat_map(|row| s.normed().row(row).to_vec())
            .collect();
        (states, pooled)
    }

    /// The worst relative error of a token.
    fn error(&self, name: &str, got: &[f32]) -> f64 {
        let (shape, want) = &self.expected[name];
        assert_eq!(got.len(), want.len(), "{name}");
        let width = *shape.last().unwrap();
        let rows = got.chunks(width).zip(want.chunks(width));
        rows.map(|(a, b)| relative_error(a, b)).fold(0.0, f64::max)
    }
}

fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let pairs = a.iter().zip(b);
    let difference: f64 = pairs
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / norm).sqrt()
}

#[test]
fn hidden_states_and_the_pooled_output() {
    let mut checked = 0;
    for case in cases(WeightFormat::F32) {
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::for_isa) {
            let (states, pooled) = case.run(kernels, 2);
            let mut check = |name: &str, got: &[f32]| {
                let error = case.error(name, got);
                let isa = kernels.isa();
                assert!(
                    error <= TOLERANCE,
                    "{} {name} on {isa}: {error:e}",
                    case.name
                );
                checked += 1;
            };
            for (i, state) in states.iter().enumerate() {
                let name = format!("hidden.{i}");
                if case.expected.contains_key(&name) {
                    check(&name, state);
                }
            }
            check("hidden_m2", &states[states.len() - 2]);
            check("last_hidden_state", &states[states.len() - 1]);
            check("pooler_output", &pooled);
        }
    }
    assert!(checked > 6, "{checked} outputs compared");
}

#[test]
fn a_picture_gives_the_same_whatever_is_beside_it_and_whoever_computes() {
    for format in [WeightFormat::F32, WeightFormat::Q8, WeightFormat::Q4] {
        for case in cases(format) {
            let (states, _) = case.run(Kernels::best(), 1);
            for threads in [2, 3] {
                assert_eq!(states, case.run(Kernels::best(), threads).0, "{format}");
            }
            // The first picture alone.
            let pixels = case.pixels();
            let one = &pixels[..case.clip.config().pixels()];
            let cpu = Cpu::new(Kernels::best(), Arc::new(Pool::new(Some(2)).unwrap()));
            let mut s = Scratch::default();
            let layers = case.clip.config().num_hidden_layers;
            cpu.enter(|ops| case.clip.forward(ops, one, layers, &mut s, &mut |_, _| {}));
            let alone = s.hidden().data();
            assert_eq!(alone, &states.last().unwrap()[..alone.len()], "{format}");
        }
    }
}

#[test]
fn quantized_is_near() {
    for (format, bound) in [(WeightFormat::Q8, 0.03), (WeightFormat::Q4, 0.3)] {
        for case in cases(format) {
            let (states, _) = case.run(Kernels::best(), 2);
            let (_, want) = &case.expected["hidden_m2"];
            let error = relative_error(&states[states.len() - 2], want);
            println!("{} {}: {error:.4}", case.name, case.format);
            assert!(
                error < bound && error > 1e-4,
                "{} {format}: {error}",
                case.name
            );
        }
    }
}
