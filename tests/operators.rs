//! The kernels of single operators against the outputs of the reference implementation, on every table
//! that this CPU can run.
//!
//! Runs on `tests/fixtures`, and on the folder that `PHIDIAS_FIXTURES` names when it is set: on every
//! folder there whose manifest is of the kind `operators`, and whatever of these operators it holds.

use phidias::engine::{Isa, Kernels};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Both sides round: a few dozen roundings of 2^-24, of the result or, where the reference adds what
/// cancels (`1 + erf`), of one.
const TOLERANCE: f32 = 2e-6;

/// The epsilon of the norms' cases.
const EPS: f32 = 1e-5;

/// Name to shape and values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn operator_fixtures() -> Vec<(PathBuf, Tensors)> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")];
    roots.extend(std::env::var_os("PHIDIAS_FIXTURES").map(PathBuf::from));
    let mut found = Vec::new();
    for root in roots {
        let entries =
            std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        for folder in entries.map(|e| e.unwrap().path()) {
            let manifest = std::fs::read(folder.join("manifest.json")).unwrap_or_default();
            let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap_or_default();
            if manifest["kind"] == "operators" {
                let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
                found.push((folder, floats(&bytes)));
            }
        }
    }
    found
}

/// The tensors in f32.
fn floats(file: &[u8]) -> Tensors {
    let file = SafeTensors::deserialize(file).unwrap();
    (file.tensors().into_iter())
        .filter(|(_, view)| view.dtype() == safetensors::Dtype::F32)
        .map(|(name, view)| {
            let values = view.data().as_chunks().0;
            let values = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
            (name, (view.shape().to_vec(), values))
        })
        .collect()
}

fn check(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        // Not `>`: a NaN is never admitted.
        let near = (got - want).abs() <= TOLERANCE * (1.0 + want.abs());
        assert!(near, "{what}, value {i}: {got:e} for {want:e}");
    }
}

/// Runs `compute` on every table for each operator fixture that has `output`, and compares.
fn compare(output: &str, compute: impl Fn(&Kernels, &Tensors) -> Vec<f32>) {
    let mut compared = 0;
    for (folder, tensors) in operator_fixtures() {
        let Some((_, want)) = tensors.get(output) else {
            continue;
        };
        for k in Isa::ALL.into_iter().filter_map(Kernels::for_isa) {
            let what = format!("{}: {output}, {}", folder.display(), k.isa());
            check(&compute(k, &tensors), want, &what);
            compared += 1;
        }
    }
    assert!(compared > 0, "no fixture has {output}");
}

/// `compute(row, result)` for each row of `norm.x`.
fn norm(tensors: &Tensors, compute: impl Fn(&[f32], &mut [f32])) -> Vec<f32> {
    let (shape, x) = &tensors["norm.x"];
    let mut y = vec![f32::NAN; x.len()];
    let rows = x.chunks_exact(shape[1]).zip(y.chunks_exact_mut(shape[1]));
    rows.for_each(|(x, y)| compute(x, y));
    y
}

#[test]
fn norms() {
    compare("rms_norm.out", |k, t| {
        norm(t, |x, y| k.rms_norm(x, &t["norm.weight"].1, EPS, y))
    });
    compare("layer_norm.out", |k, t| {
        let (weight, bias) = (&t["norm.weight"].1, &t["norm.bias"].1);
        norm(t, |x, y| k.layer_norm(x, weight, bias, EPS, y))
    });
}

#[test]
fn activations() {
    compare("act.gelu_erf", |k, t| {
        let mut x = t["act.x"].1.clone();
        k.gelu(&mut x);
        x
    });
    compare("act.quick_gelu", |k, t| {
        let mut x = t["act.x"].1.clone();
        k.quick_gelu(&mut x);
        x
    });
}

#[test]
fn gates() {
    compare("act.silu", |k, t| {
        let x = &t["act.x"].1;
        let mut y = vec![f32::NAN; x.len()];
        k.silu_mul(x, &vec![1.0; x.len()], &mut y);
        y
    });
    compare("swiglu.out", |k, t| {
        let (shape, x) = &t["swiglu.gate_up"];
        let inner = shape[1] / 2;
        let mut y = vec![f32::NAN; shape[0] * inner];
        for (x, y) in x.chunks_exact(2 * inner).zip(y.chunks_exact_mut(inner)) {
            let (gate, up) = x.split_at(inner);
            k.silu_mul(gate, up, y);
        }
        y
    });
}

/// The limit is in the name of the output.
#[test]
fn gegelu() {
    const PREFIX: &str = "gegelu.out_limit";
    let mut outputs: Vec<_> = (operator_fixtures().into_iter())
        .flat_map(|(_, tensors)| tensors.into_keys())
        .filter(|name| name.starts_with(PREFIX))
        .collect();
    outputs.sort();
    outputs.dedup();
    assert!(!outputs.is_empty(), "no fixture has {PREFIX}");
    for output in outputs {
        let limit = output[PREFIX.len()..].parse().unwrap();
        compare(&output, |k, t| {
            let x = &t["gegelu.in"].1;
            let mut y = vec![f32::NAN; x.len() / 2];
            k.gegelu(x, limit, &mut y);
            y
        });
    }
}
