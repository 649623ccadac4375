//! Bad input gets a clear error: one test per case, through the public interface.
//!
//! Every message is for a person with a broken file in hand: it must name the file, the tensor, what
//! was expected and what was found. Nothing here may panic, whatever the bytes are.

mod common;

use common::*;
use phidias::engine::checkpoint::CheckpointError;
use phidias::engine::generate::{Detokenize, Event, GenerateError, GenerateOptions, generate};
use phidias::engine::machine::Machine;
use phidias::engine::sampling::SampleError;
use phidias::engine::{Bytes, Cancel, OwnedBytes, PACKED_VERSION};
use phidias::models::Source;
use phidias::models::config::ConfigError;
use phidias::models::quantize::quantize_folder;
use phidias::{Error, Model, OpenOptions, Session, SessionOptions, WeightFormat};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// A good model in f32, to be spoiled.
fn good() -> TempDir {
    let folder = TempDir::new().unwrap();
    write_model(folder.path(), &config(), &weights(&config(), "F32", 1));
    folder
}

/// The error of opening `folder`, after checking that its message has all of `parts`.
fn refused(folder: &Path, format: Option<WeightFormat>, parts: &[&str]) -> Error {
    let options = OpenOptions {
        format,
        threads: Some(1),
        ..OpenOptions::default()
    };
    let error = match Model::open(folder, options) {
        Ok(_) => panic!("{} was accepted", folder.display()),
        Err(error) => error,
    };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
    assert!(!message.contains('\n'), "one line: {message}");
    error
}

/// The same for a good model whose weights file is replaced.
fn refused_weights(bytes: &[u8], parts: &[&str]) -> Error {
    let folder = good();
    let file = folder.path().join(WEIGHTS);
    fs::write(&file, bytes).unwrap();
    let mut parts = parts.to_vec();
    let file = file.to_string_lossy();
    parts.push(&file);
    refused(folder.path(), None, &parts)
}

/// The same for tensors that were changed, in a well-formed file; the message names the folder.
fn refused_tensors(change: impl FnOnce(&mut Vec<Tensor>), parts: &[&str]) -> Error {
    let folder = TempDir::new().unwrap();
    let mut tensors = weights(&config(), "F32", 1);
    change(&mut tensors);
    write_model(folder.path(), &config(), &tensors);
    let path = folder.path().to_string_lossy();
    let mut parts = parts.to_vec();
    parts.push(&path);
    refused(folder.path(), None, &parts)
}

/// A header in which something was changed, over the data of a good one.
fn changed_header(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Vec<u8> {
    let tensors = weights(&config(), "F32", 1);
    let mut header = header(&tensors);
    change(&mut header);
    let data: Vec<u8> = tensors.iter().flat_map(|t| t.data.clone()).collect();
    raw(&Value::Object(header).to_string(), &data)
}

fn find<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.name == name).unwrap()
}

// -------------------------------------------------------------------------------- the folder

#[test]
fn the_good_model_is_accepted() {
    let folder = good();
    for format in WeightFormat::ALL {
        open(folder.path(), format);
    }
}

#[test]
fn a_folder_that_is_not_there() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("nothing");
    let error = refused(&path, None, &["nothing", "no such folder"]);
    assert!(matches!(error, Error::NoFolder { .. }), "{error:?}");
}

#[test]
fn a_file_instead_of_a_folder() {
    let folder = good();
    let path = folder.path().join(WEIGHTS);
    let error = refused(&path, None, &[WEIGHTS, "a file", "expected", "folder"]);
    assert!(matches!(error, Error::NotAFolder { .. }), "{error:?}");
}

#[test]
fn a_folder_that_is_no_model() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("notes.txt"), "not a model").unwrap();
    let error = refused(folder.path(), None, &["config.json", "not a model"]);
    assert!(
        matches!(error, Error::Config(ConfigError::NoConfig { .. })),
        "{error:?}"
    );
    fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
    let path = folder.path().to_string_lossy();
    let error = refused(folder.path(), None, &[&path, WEIGHTS, INDEX, "not a model"]);
    assert!(
        matches!(
            error,
            Error::Checkpoint(CheckpointError::NoWeights { foreign: None, .. })
        ),
        "{error:?}"
    );
    for name in ["model.q4.gguf", "a.bin"] {
        fs::write(folder.path().join(name), "weights").unwrap();
        let only = "only safetensors files are read";
        refused(folder.path(), None, &[name, only, "not a model"]);
    }
}

#[test]
fn weights_that_are_no_file() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
    let weights = folder.path().join(WEIGHTS);
    fs::create_dir(&weights).unwrap();
    refused(folder.path(), None, &[WEIGHTS, "is a directory"]);
    #[cfg(unix)]
    {
        fs::remove_dir(&weights).unwrap();
        std::os::unix::fs::symlink("/nowhere/blob", &weights).unwrap();
        refused(folder.path(), None, &[WEIGHTS, "No such file"]);
    }
}

#[test]
fn a_configuration_of_another_model() {
    let folder = good();
    for (field, value, parts) in [
        (
            "model_type",
            json!("llama"),
            ["config.json", "'llama'", "supported: phi3"],
        ),
        (
            "rope_scaling",
            json!({ "type": "dynamic", "factor": 2 }),
            ["config.json", "'dynamic'", "longrope"],
        ),
        (
            "num_key_value_heads",
            json!(3),
            ["config.json", "num_key_value_heads", "3"],
        ),
    ] {
        let mut config = config();
        config[field] = value;
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        refused(folder.path(), None, &parts);
    }
    for text in ["", "{", "[]", "\u{feff}{}", "model"] {
        fs::write(folder.path().join("config.json"), text).unwrap();
        refused(folder.path(), None, &["config.json", "not a JSON object"]);
    }
}

#[test]
fn a_generation_config_out_of_range() {
    let folder = good();
    let file = folder.path().join("generation_config.json");
    fs::write(&file, json!({ "top_p": 3 }).to_string()).unwrap();
    refused(
        folder.path(),
        None,
        &["generation_config.json", "top_p", "3"],
    );
}

#[test]
fn a_tokenizer_for_another_vocabulary_or_none_at_all() {
    let folder = good();
    let file = folder.path().join("tokenizer.json");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
    // 32011 ids for 61 rows of the embedding.
    fs::copy(fixtures.join("tokenizer.json"), &file).unwrap();
    refused(folder.path(), None, &["tokenizer.json", "61"]);
    for text in ["", "{", "[]", "{}", "{\"version\": \"1.0\", \"model\": {}}"] {
        fs::write(&file, text).unwrap();
        refused(folder.path(), None, &["tokenizer.json"]);
    }
    // Without one the model opens, for token ids.
    fs::remove_file(&file).unwrap();
    open(folder.path(), WeightFormat::F32);
}

/// Names that stand for something without an end. (Where it is read, the system says what else is wrong.)
#[test]
#[cfg(target_os = "linux")]
fn small_files_without_an_end() {
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        INDEX,
    ] {
        let folder = good();
        let file = folder.path().join(name);
        if name == INDEX {
            fs::remove_file(folder.path().join(WEIGHTS)).unwrap();
        }
        if name == "tokenizer_config.json" {
            let fable = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fable");
            fs::copy(
                fable.join("tokenizer.json"),
                folder.path().join("tokenizer.json"),
            )
            .unwrap();
        }
        let _ = fs::remove_file(&file);
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        refused(folder.path(), None, &[name, "larger than"]);
    }
}

/// The answer ends at `<|end|>` although the configuration names another token only.
#[test]
fn the_end_of_a_turn_is_in_the_stop_set() {
    let mut config = config();
    config["vocab_size"] = json!(32064);
    config["eos_token_id"] = json!(32000);
    let folder = TempDir::new().unwrap();
    write_model(folder.path(), &config, &weights(&config, "BF16", 1));
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixtures.join(name), folder.path().join(name)).unwrap();
    }
    let generation = json!({ "eos_token_id": [32001] }).to_string();
    fs::write(folder.path().join("generation_config.json"), generation).unwrap();
    let model = open(folder.path(), WeightFormat::Bf16);
    let stop = model.stop_tokens();
    assert!(
        [32000, 32001, 32007].iter().all(|id| stop.contains(id)),
        "{stop:?}"
    );
}

// ----------------------------------------------------------------------------- the container

#[test]
fn a_truncated_file() {
    let whole = container(&weights(&config(), "F32", 1));
    for length in [0, 1, 7] {
        let found = format!("{length} bytes");
        let error = refused_weights(&whole[..length], &["too short", "truncated", &found]);
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::TooShort { .. })
        ));
    }
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [8, 9, 8 + header - 1] {
        let error = refused_weights(
            &whole[..length],
            &[&header.to_string(), &length.to_string(), "truncated"],
        );
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::HeaderLength { .. })
        ));
    }
    for length in [8 + header, 8 + header + 100, whole.len() - 1] {
        let error = refused_weights(
            &whole[..length],
            &[&whole.len().to_string(), &length.to_string(), "truncated"],
        );
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::FileLength { .. })
        ));
    }
}

#[test]
fn an_overlong_file() {
    let mut bytes = container(&weights(&config(), "F32", 1));
    let expected = bytes.len().to_string();
    bytes.extend([0; 13]);
    let error = refused_weights(&bytes, &[&expected, &bytes.len().to_string(), "overlong"]);
    assert!(matches!(
        error,
        Error::Checkpoint(CheckpointError::FileLength { .. })
    ));
}

#[test]
fn a_header_length_beyond_the_file() {
    for length in [1u64 << 20, 1 << 40, u64::MAX - 7, u64::MAX] {
        let mut bytes = container(&weights(&config(), "F32", 1));
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refused_weights(&bytes, &[&length.to_string(), "does not fit"]);
    }
}

#[test]
fn a_header_that_is_not_json() {
    for header in ["", "not json", "[]", "{\"a\": }", "{", "null", "\u{0}{}"] {
        refused_weights(&raw(header, &[0; 64]), &["header"]);
    }
    let mut bytes = container(&weights(&config(), "F32", 1));
    bytes[20] = 0xff;
    refused_weights(&bytes, &["header", "UTF-8"]);
    // Deeply nested: a parser must not run out of stack.
    refused_weights(&raw(&"[".repeat(200_000), &[]), &["header"]);
    refused_weights(&raw(&"{\"a\":".repeat(100_000), &[]), &["header"]);
}

#[test]
fn a_header_entry_that_is_not_a_tensor() {
    for entry in [
        json!(5),
        json!({}),
        json!({ "dtype": "F32", "shape": [32] }),
        json!({ "dtype": "F33", "shape": [32], "data_offsets": [0, 128] }),
        json!({ "dtype": "F32", "shape": [-32], "data_offsets": [0, 128] }),
        json!({ "dtype": "F32", "shape": [32], "data_offsets": [0] }),
        json!({ "dtype": "F32", "shape": [32], "data_offsets": [-128, 0] }),
    ] {
        refused_weights(
            &changed_header(|h| h[NORM] = entry),
            &["bad safetensors header", NORM],
        );
    }
}

/// Moves the byte range of the last norm by so much at either end.
fn moved(by: [i64; 2]) -> Vec<u8> {
    changed_header(|h| {
        for (i, by) in by.into_iter().enumerate() {
            let offset = h[NORM]["data_offsets"][i].as_i64().unwrap() + by;
            h[NORM]["data_offsets"][i] = json!(offset);
        }
    })
}

#[test]
fn overlapping_tensors() {
    refused_weights(&moved([-4, -4]), &["header", NORM, "overlap", "expected"]);
}

#[test]
fn a_hole_between_tensors() {
    // The hole is before the norm; the next tensor overlaps its end.
    refused_weights(&moved([4, 4]), &["header", NORM, "hole", "expected"]);
}

#[test]
fn a_tensor_out_of_range() {
    refused_weights(&moved([1 << 40, 1 << 40]), &["header"]);
    refused_weights(
        &moved([0, 1 << 40]),
        &["header", NORM, "expected 128 bytes"],
    );
    // The end before the start.
    refused_weights(&moved([0, -129]), &["header", NORM, "expected 128 bytes"]);
}

#[test]
fn a_shape_that_overflows() {
    for shape in [
        json!([u64::MAX, 2]),
        json!([1u64 << 62, 4]),
        json!([1u64 << 40, 1u64 << 40]),
    ] {
        refused_weights(
            &changed_header(|h| h[NORM]["shape"] = shape),
            &["header", NORM, "more than fits"],
        );
    }
}

#[test]
fn a_byte_range_that_does_not_fit_its_shape() {
    refused_weights(
        &changed_header(|h| h[NORM]["shape"] = json!([31])),
        &["header", NORM, "expected 124 bytes for F32 [31]"],
    );
}

#[test]
fn a_misaligned_tensor() {
    // An odd number of bytes in front of a file full of floats: a BF16 header cannot pad.
    let tensors = weights(&config(), "F32", 1);
    let json = Value::Object(header(&tensors)).to_string();
    let padded = format!("{json:<width$}", width = json.len().next_multiple_of(8) + 1);
    let mut bytes = (padded.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(padded.as_bytes());
    tensors
        .iter()
        .for_each(|t| bytes.extend_from_slice(&t.data));
    let error = refused_weights(&bytes, &[&tensors[0].name, "multiple of 4", "f32"]);
    assert!(matches!(
        error,
        Error::Checkpoint(CheckpointError::Misaligned { .. })
    ));
}

#[test]
fn a_dtype_that_cannot_be_computed_with() {
    for (dtype, size) in [("I64", 8), ("U8", 1), ("F64", 8), ("BOOL", 1)] {
        let error = refused_tensors(
            |tensors| {
                let norm = find(tensors, NORM);
                norm.dtype = dtype;
                norm.data = vec![0; 32 * size];
            },
            &[NORM, "not supported", "expected F32, F16, BF16", dtype],
        );
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::DTypeUnsupported { .. })
        ));
    }
}

#[test]
fn a_tensor_of_another_shape() {
    let cases: [(&str, &[usize], &str); 4] = [
        (NORM, &[33], "[32]"),
        (HEAD, &[32, 61], "[61, 32]"),
        ("model.embed_tokens.weight", &[60, 32], "[61, 32]"),
        (
            "model.layers.1.self_attn.qkv_proj.weight",
            &[64, 32, 1],
            "[64, 32]",
        ),
    ];
    for (name, shape, expected) in cases {
        let found = format!("{shape:?}");
        let error = refused_tensors(
            |tensors| {
                let values = vec![0.5; shape.iter().product()];
                *find(tensors, name) = Tensor::f32(name, shape, &values);
            },
            &[name, &found, expected, "expected"],
        );
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::Shape { .. })
        ));
    }
}

#[test]
fn a_missing_tensor() {
    for name in [NORM, HEAD, "model.layers.1.mlp.down_proj.weight"] {
        let error = refused_tensors(|t| t.retain(|t| t.name != name), &[name, "missing"]);
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::MissingTensor { .. })
        ));
    }
}

#[test]
fn a_tensor_twice_in_one_header() {
    let tensors = weights(&config(), "F32", 1);
    let json = Value::Object(header(&tensors)).to_string();
    let again = serde_json::to_string(&header(&tensors)[NORM]).unwrap();
    let json = format!("{},\"{NORM}\":{again}}}", json.strip_suffix('}').unwrap());
    let data: Vec<u8> = tensors.iter().flat_map(|t| t.data.clone()).collect();
    let error = refused_weights(&raw(&json, &data), &[NORM, "twice"]);
    assert!(matches!(
        error,
        Error::Checkpoint(CheckpointError::DuplicateTensor { .. })
    ));
}

// ------------------------------------------------------------------------------------ shards

const SHARDS: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

fn sharded() -> TempDir {
    let folder = TempDir::new().unwrap();
    let tensors = weights(&config(), "F32", 1);
    write_shards(folder.path(), &config(), &tensors, &SHARDS);
    folder
}

fn change_index(folder: &Path, change: impl FnOnce(&mut Value)) {
    let mut index = serde_json::from_slice(&fs::read(folder.join(INDEX)).unwrap()).unwrap();
    change(&mut index);
    write_index(folder, &index);
}

#[test]
fn shards_give_what_one_file_gives() {
    let ids: Vec<u32> = (0..20).collect();
    let logits = |folder: &Path| {
        let model = open(folder, WeightFormat::F32);
        all_logits(&model, SessionOptions::default(), &ids)
    };
    assert_eq!(logits(sharded().path()), logits(good().path()));
}

#[test]
fn a_missing_shard() {
    let folder = sharded();
    fs::remove_file(folder.path().join(SHARDS[1])).unwrap();
    let error = refused(folder.path(), None, &[INDEX, SHARDS[1], "missing"]);
    assert!(matches!(
        error,
        Error::Checkpoint(CheckpointError::MissingShard { .. })
    ));
}

#[test]
fn a_truncated_shard() {
    let folder = sharded();
    let bytes = fs::read(folder.path().join(SHARDS[1])).unwrap();
    fs::write(folder.path().join(SHARDS[1]), &bytes[..bytes.len() - 5]).unwrap();
    refused(folder.path(), None, &[SHARDS[1], "truncated"]);
}

/// The files that such names would reach exist: only the name is the reason.
#[test]
fn a_shard_name_that_leaves_the_folder() {
    let outside = TempDir::new().unwrap();
    let folder = outside.path().join("model");
    let tensors = weights(&config(), "F32", 1);
    write_shards(&folder, &config(), &tensors, &SHARDS);
    let shard = fs::read(folder.join(SHARDS[1])).unwrap();
    fs::write(outside.path().join("other.safetensors"), &shard).unwrap();
    fs::create_dir(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/other.safetensors"), &shard).unwrap();
    #[cfg(unix)]
    fs::write(folder.join("sub\\other.safetensors"), &shard).unwrap();
    let absolute = outside.path().join("other.safetensors");
    for name in [
        "../other.safetensors",
        "sub/other.safetensors",
        "sub\\other.safetensors",
        "..\\other.safetensors",
        "./other.safetensors",
        "..",
        "",
        ".safetensors",
        "C:other.safetensors",
        "other.bin",
        "nul\0.safetensors",
        absolute.to_str().unwrap(),
    ] {
        change_index(&folder, |index| {
            for (_, shard) in index["weight_map"].as_object_mut().unwrap() {
                if *shard != SHARDS[0] {
                    *shard = json!(name);
                }
            }
        });
        let error = refused(&folder, None, &[INDEX, name, "refused"]);
        assert!(
            matches!(error, Error::Checkpoint(CheckpointError::ShardName { .. })),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn a_tensor_in_two_shards() {
    let folder = sharded();
    let mut tensors = weights(&config(), "F32", 1);
    tensors.retain(|t| t.name == NORM || t.name == HEAD);
    // Both shards hold the norm now, whichever the index names.
    for (i, shard) in SHARDS.iter().enumerate() {
        let mut part: Vec<Tensor> = (weights(&config(), "F32", 1).into_iter())
            .skip(i)
            .step_by(2)
            .filter(|t| t.name != NORM)
            .collect();
        part.push(tensors.iter().find(|t| t.name == NORM).unwrap().clone());
        fs::write(folder.path().join(shard), container(&part)).unwrap();
    }
    let error = refused(folder.path(), None, &[NORM, "twice", SHARDS[1]]);
    assert!(matches!(
        error,
        Error::Checkpoint(CheckpointError::DuplicateTensor { .. })
    ));
}

#[test]
fn a_tensor_listed_in_the_wrong_shard() {
    let folder = sharded();
    let mut was = String::new();
    change_index(folder.path(), |index| {
        let shard = &mut index["weight_map"][NORM];
        was = shard.as_str().unwrap().to_owned();
        *shard = json!(SHARDS.iter().find(|s| **s != was).unwrap());
    });
    let listed = SHARDS.iter().find(|s| **s != was).unwrap();
    let error = refused(folder.path(), None, &[INDEX, NORM, listed, "does not have"]);
    assert!(matches!(
        error,
        Error::Checkpoint(CheckpointError::NotInShard { .. })
    ));
    // One that no shard has.
    change_index(folder.path(), |index| {
        index["weight_map"][NORM] = json!(was);
        index["weight_map"]["ghost"] = json!(SHARDS[0]);
    });
    refused(folder.path(), None, &[INDEX, "ghost", SHARDS[0]]);
}

#[test]
fn an_index_that_is_not_one() {
    let folder = sharded();
    for text in [
        "",
        "{",
        "[]",
        "{}",
        "{\"weight_map\": {}}",
        "{\"weight_map\": 5}",
        "{\"weight_map\": {\"a\": 1}}",
    ] {
        fs::write(folder.path().join(INDEX), text).unwrap();
        let error = refused(folder.path(), None, &[INDEX, "bad index"]);
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::Index { .. })
        ));
    }
}

/// The cache of the hub: every file of a snapshot is a link to a blob, by a relative path upwards.
#[cfg(unix)]
#[test]
fn links_as_the_hub_lays_them_are_followed() {
    use std::os::unix::fs::symlink;
    let cache = TempDir::new().unwrap();
    let (blobs, snapshot) = (
        cache.path().join("blobs"),
        cache.path().join("snapshots/0a1b"),
    );
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let plain = sharded();
    for (i, entry) in fs::read_dir(plain.path()).unwrap().enumerate() {
        let path = entry.unwrap().path();
        fs::copy(&path, blobs.join(i.to_string())).unwrap();
        let link = snapshot.join(path.file_name().unwrap());
        symlink(format!("../../blobs/{i}"), link).unwrap();
    }
    open(&snapshot, WeightFormat::F32);
    // A link to nothing is a missing shard.
    fs::remove_file(snapshot.join(SHARDS[0])).unwrap();
    symlink("../../blobs/gone", snapshot.join(SHARDS[0])).unwrap();
    refused(&snapshot, None, &[SHARDS[0], "missing"]);
}

// ------------------------------------------------------------------------------ packed files

/// A q4 folder made of the good model, its weights file changed.
fn packed(change: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) -> TempDir {
    let (source, target) = (good(), TempDir::new().unwrap());
    let out = target.path().join("q4");
    quantize_folder(
        source.path(),
        &out,
        WeightFormat::Q4,
        &mut options(WeightFormat::Q4),
    )
    .unwrap();
    let bytes = fs::read(out.join(WEIGHTS)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut json = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let mut data = bytes[8 + header..].to_vec();
    change(&mut json, &mut data);
    // Padded as the writer does, so that the data stays aligned.
    let json = Value::Object(json).to_string();
    let width = (8 + json.len()).next_multiple_of(64) - 8;
    let bytes = raw(&format!("{json:<width$}"), &data);
    fs::write(out.join(WEIGHTS), bytes).unwrap();
    target
}

const VERSION: &str = "phidias.packed_version";
const TABLE: &str = "phidias.packed";

fn change_table(header: &mut serde_json::Map<String, Value>, change: impl FnOnce(&mut Value)) {
    let text = &mut header["__metadata__"][TABLE];
    let mut table = serde_json::from_str(text.as_str().unwrap()).unwrap();
    change(&mut table);
    *text = json!(table.to_string());
}

#[test]
fn an_unchanged_packed_folder_is_accepted() {
    let folder = packed(|_, _| {});
    let model = open(&folder.path().join("q4"), WeightFormat::Q4);
    assert_eq!(model.format(), WeightFormat::Q4);
}

#[test]
fn packed_by_another_version() {
    for version in ["1", "3", "one", ""] {
        let folder = packed(|h, _| h["__metadata__"][VERSION] = json!(version));
        let path = folder.path().join("q4");
        let error = refused(&path, None, &[WEIGHTS, "version", version, "quantize"]);
        assert!(matches!(
            error,
            Error::Checkpoint(CheckpointError::PackedVersion { .. })
        ));
    }
}

#[test]
fn packed_sizes_that_disagree() {
    // The table says one panel more, another format, a shape that overflows, no such format.
    for (entry, part) in [
        (json!(["q4", 77, 32]), "takes"),
        (json!(["q8", 61, 32]), "takes"),
        (json!(["q4", 0, 32]), "cannot be packed"),
        (json!(["q4", u64::MAX, u64::MAX]), "cannot be packed"),
        (json!(["q5", 61, 32]), "unknown packed format 'q5'"),
        (json!(["q4", -1, 32]), TABLE),
    ] {
        let folder = packed(|h, _| change_table(h, |table| table[HEAD] = entry));
        refused(&folder.path().join("q4"), None, &[WEIGHTS, part]);
    }
    // Sizes that agree with the bytes and not with the configuration.
    let folder = packed(|h, _| change_table(h, |table| table[HEAD] = json!(["q4", 62, 32])));
    let path = folder.path().join("q4");
    refused(&path, None, &[HEAD, "[62, 32]", "expected [61, 32]"]);
    // A tensor that the file does not have, a table that is gone or nonsense.
    let folder = packed(|h, _| change_table(h, |table| table["ghost"] = json!(["q4", 61, 32])));
    refused(&folder.path().join("q4"), None, &[WEIGHTS, "'ghost'"]);
    let folder = packed(|h, _| {
        h["__metadata__"].as_object_mut().unwrap().remove(TABLE);
    });
    refused(&folder.path().join("q4"), None, &[WEIGHTS, TABLE]);
    let folder = packed(|h, _| h["__metadata__"][TABLE] = json!("nonsense"));
    refused(&folder.path().join("q4"), None, &[WEIGHTS, TABLE]);
    // Bytes without a table are not weights.
    let folder = packed(|h, _| {
        h.remove("__metadata__");
    });
    refused(
        &folder.path().join("q4"),
        None,
        &[WEIGHTS, "U8", "not supported"],
    );
}

#[test]
fn a_packed_vector() {
    let mut tensors = weights(&config(), "F32", 1);
    tensors.retain(|t| t.name != NORM);
    // A panel of [1, 32] in q4: 64 bytes of scales, 256 of quants. First, where it is aligned.
    let panel = Tensor {
        name: NORM.into(),
        dtype: "U8",
        shape: vec![320],
        data: vec![0; 320],
    };
    tensors.insert(0, panel);
    let mut header = header(&tensors);
    let table = json!({ NORM: ["q4", 1, 32] }).to_string();
    header.insert(
        "__metadata__".into(),
        json!({ VERSION: PACKED_VERSION.to_string(), TABLE: table }),
    );
    let json = Value::Object(header).to_string();
    let width = (8 + json.len()).next_multiple_of(64) - 8;
    let data: Vec<u8> = tensors.iter().flat_map(|t| t.data.clone()).collect();
    let folder = good();
    let file = folder.path().join(WEIGHTS);
    fs::write(file, raw(&format!("{json:<width$}"), &data)).unwrap();
    refused(folder.path(), None, &[NORM, "[1, 32]", "expected [32]"]);
}

#[test]
fn a_packed_folder_run_or_quantized_as_something_else() {
    let folder = packed(|_, _| {});
    let path = folder.path().join("q4");
    let error = refused(&path, Some(WeightFormat::Q8), &["q4", "q8", "original"]);
    assert!(matches!(error, Error::Format { .. }));
    let out = folder.path().join("again");
    let mut options = options(WeightFormat::Q8);
    let error = quantize_folder(&path, &out, WeightFormat::Q8, &mut options).unwrap_err();
    assert!(matches!(error, Error::AlreadyPacked { .. }), "{error}");
    assert!(!out.exists());
}

#[test]
fn weights_that_cannot_be_quantized() {
    let folder = TempDir::new().unwrap();
    let name = "model.layers.1.mlp.gate_up_proj.weight";
    for bad in [f32::NAN, f32::INFINITY, 1e20] {
        let mut tensors = weights(&config(), "F32", 1);
        let tensor = find(&mut tensors, name);
        let mut values = tensor.values();
        values[37 * 32 + 5] = bad;
        *tensor = Tensor::f32(name, &[96, 32], &values);
        write_model(folder.path(), &config(), &tensors);
        for format in [WeightFormat::Q4, WeightFormat::Q8] {
            let parts = [name, "row 37", "block 0", format.name()];
            refused(folder.path(), Some(format), &parts);
            let out = folder.path().join("out");
            let error = quantize_folder(folder.path(), &out, format, &mut options(format));
            let message = error.unwrap_err().to_string();
            assert!(parts.iter().all(|p| message.contains(p)), "{message}");
            assert!(!out.exists(), "nothing is left");
        }
    }
    let left = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 2, "the model's two files and no temporary ones");
}

// -------------------------------------------------------------------------------- Phi-3-small

#[test]
fn a_block_sparse_layout_that_cannot_be() {
    let folder = TempDir::new().unwrap();
    let (config, tensors) = (small_config(), weights(&small_config(), "F32", 1));
    write_model(folder.path(), &config, &tensors);
    for format in WeightFormat::ALL {
        let model = open(folder.path(), format);
        let logits = all_logits(&model, SessionOptions::default(), &[1, 2, 3]);
        assert!(logits.iter().flatten().all(|v| v.is_finite()), "{format}");
    }
    let block = "blocksparse_block_size";
    let kernel = "blocksparse_triton_kernel_block_size";
    let local = "blocksparse_num_local_blocks";
    let stride = "blocksparse_vert_stride";
    let sizes = "16, 32, 64, 128 or 256";
    for (field, value, expected) in [
        (block, json!(0), sizes),
        (block, json!(8), sizes),
        (block, json!(24), sizes),
        (block, json!(512), sizes),
        (block, json!(-16), "an integer from 0"),
        (block, json!(1_u64 << 40), "an integer from 0"),
        (kernel, json!(0), "a divisor of blocksparse_block_size 16"),
        (kernel, json!(32), "a divisor of blocksparse_block_size 16"),
        (kernel, json!("16"), "an integer from 0"),
        (local, json!(0), "an integer from 1"),
        (local, json!(1.5), "an integer from 1"),
        (stride, json!(0), "an integer from 1"),
        (stride, json!(-1), "an integer from 1"),
        ("blocksparse_homo_head_pattern", json!(1), "true or false"),
        (
            "dense_attention_every_n_layers",
            json!(-1),
            "an integer from 0",
        ),
        ("gegelu_limit", json!(0), "a number from"),
        ("gegelu_limit", json!(-20), "a number from"),
        ("mup_width_multiplier", json!(0), "a number from"),
        ("mup_attn_multiplier", json!("x"), "a number from"),
        ("mup_embedding_multiplier", json!(1e300), "a number from"),
        ("mup_use_scaling", json!(0), "true or false"),
        ("rope_position_scale", json!(0), "a number from"),
        ("rope_embedding_base", json!(-1), "a number from"),
        ("ff_dim_multiplier", json!(4), "null"),
        ("ff_intermediate_size", json!(0), "an integer from 1"),
        ("ff_intermediate_size", Value::Null, "is missing"),
        ("hidden_act", json!("silu"), "\"gegelu\""),
        ("layer_norm_epsilon", json!(-1), "a number from 0 to 1"),
    ] {
        let mut config = config.clone();
        config[field] = value;
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let error = refused(folder.path(), None, &["config.json", field, expected]);
        assert!(matches!(error, Error::Config(_)), "{error}");
    }
    // Tensors that are missing or of another shape.
    let dense = "model.layers.1.self_attn.dense.bias";
    let up = "model.layers.2.mlp.up_proj.weight";
    for (name, shape) in [
        (dense, vec![63]),
        (up, vec![48, 64]),
        ("model.final_layernorm.bias", vec![65]),
        (
            "model.layers.0.self_attn.query_key_value.weight",
            vec![64, 128],
        ),
    ] {
        let mut changed = tensors.clone();
        let values = vec![0.5; shape.iter().product()];
        *find(&mut changed, name) = Tensor::f32(name, &shape, &values);
        write_model(folder.path(), &config, &changed);
        refused(folder.path(), None, &[name, &format!("{shape:?}")]);
        changed.retain(|t| t.name != name);
        write_model(folder.path(), &config, &changed);
        refused(folder.path(), None, &[name, "is missing"]);
    }
}

// --------------------------------------------------------------------------- mixture of experts

const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.3.w3.weight";
const ROUTER: &str = "model.layers.0.block_sparse_moe.gate.weight";

/// A mixture whose tensors were changed.
fn refused_mixture(change: impl FnOnce(&mut Vec<Tensor>), parts: &[&str]) -> Error {
    let folder = TempDir::new().unwrap();
    let mut tensors = weights(&moe_config(), "F32", 1);
    change(&mut tensors);
    write_model(folder.path(), &moe_config(), &tensors);
    refused(folder.path(), None, parts)
}

#[test]
fn a_good_mixture_is_accepted() {
    let folder = TempDir::new().unwrap();
    let config = moe_config();
    write_model(folder.path(), &config, &weights(&config, "BF16", 1));
    for format in WeightFormat::ALL {
        let model = open(folder.path(), format);
        let logits = all_logits(&model, SessionOptions::default(), &[1, 2, 3]);
        assert!(logits.iter().flatten().all(|v| v.is_finite()), "{format}");
    }
    // A checkpoint without biases, as its configuration says.
    let mut config = config;
    for field in ["attention_bias", "lm_head_bias"] {
        config[field] = json!(false);
    }
    let tensors = weights(&config, "F32", 1);
    assert!(
        !tensors
            .iter()
            .any(|t| t.name.contains("proj.bias") || t.name == "lm_head.bias")
    );
    write_model(folder.path(), &config, &tensors);
    open(folder.path(), WeightFormat::F32);
}

#[test]
fn a_mixture_that_cannot_be() {
    let folder = TempDir::new().unwrap();
    write_model(
        folder.path(),
        &moe_config(),
        &weights(&moe_config(), "F32", 1),
    );
    for (field, value, expected) in [
        (
            "num_experts_per_tok",
            json!(5),
            "at most num_local_experts, 4",
        ),
        ("num_experts_per_tok", json!(3), "2 (sparsemixer picks two)"),
        ("num_experts_per_tok", json!(1), "2 (sparsemixer picks two)"),
        ("num_experts_per_tok", json!(0), "an integer from 1 to 1024"),
        ("num_experts_per_tok", Value::Null, "is missing"),
        ("num_local_experts", json!(0), "an integer from 1 to 1024"),
        (
            "num_local_experts",
            json!(1),
            "at most num_local_experts, 1",
        ),
        (
            "num_local_experts",
            json!(1_u64 << 40),
            "an integer from 1 to 1024",
        ),
        (
            "num_local_experts",
            json!("16"),
            "an integer from 1 to 1024",
        ),
        ("router_jitter_noise", json!(-0.01), "a number from 0 to 1"),
        ("router_jitter_noise", json!(1.5), "a number from 0 to 1"),
        ("router_jitter_noise", json!("x"), "a number from 0 to 1"),
        ("attention_bias", json!(1), "true or false"),
        ("lm_head_bias", json!("yes"), "true or false"),
        ("hidden_act", json!("gelu"), "silu"),
    ] {
        let mut config = moe_config();
        config[field] = value;
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        // The field that is wrong is the one that asks for more than there are.
        let named = match (field, &config["num_local_experts"]) {
            ("num_local_experts", one) if *one == json!(1) => "num_experts_per_tok",
            _ => field,
        };
        let error = refused(folder.path(), None, &["config.json", named, expected]);
        assert!(matches!(error, Error::Config(_)), "{error}");
    }
}

#[test]
fn a_mixture_with_missing_or_misshapen_tensors() {
    let remove = |name: &'static str| move |t: &mut Vec<Tensor>| t.retain(|t| t.name != name);
    for name in [
        EXPERT,
        ROUTER,
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.input_layernorm.bias",
        "model.norm.bias",
        "lm_head.bias",
    ] {
        refused_mixture(remove(name), &[name, "is missing"]);
    }
    let reshape = |name: &'static str, shape: &'static [usize]| {
        move |tensors: &mut Vec<Tensor>| {
            let values = vec![0.5; shape.iter().product()];
            *find(tensors, name) = Tensor::f32(name, shape, &values);
        }
    };
    // A router of another number of experts; transposed; an expert of another width; a bias too long.
    refused_mixture(reshape(ROUTER, &[5, 32]), &[ROUTER, "[5, 32]", "[4, 32]"]);
    refused_mixture(reshape(ROUTER, &[32, 4]), &[ROUTER, "[32, 4]", "[4, 32]"]);
    refused_mixture(
        reshape(EXPERT, &[47, 32]),
        &[EXPERT, "[47, 32]", "[48, 32]"],
    );
    let bias = "model.layers.0.self_attn.q_proj.bias";
    refused_mixture(reshape(bias, &[33]), &[bias, "[33]", "[32]"]);
}

/// Two matrices that take the same rows must take them in the same form: a packed file could mix them.
#[test]
fn matrices_of_one_input_in_two_formats() {
    for (name, first) in [
        ("model.layers.1.self_attn.v_proj.weight", "q4"),
        (EXPERT, "q4"),
    ] {
        let folder = TempDir::new().unwrap();
        let source = folder.path().join("f32");
        write_model(&source, &moe_config(), &weights(&moe_config(), "F32", 1));
        let [a, b] = [WeightFormat::Q4, WeightFormat::Q8].map(|format| {
            let out = folder.path().join(format.name());
            quantize_folder(&source, &out, format, &mut options(format)).unwrap();
            fs::read(out.join(WEIGHTS)).unwrap()
        });
        // One tensor of the second file in the place of the first one's.
        let header_of = |bytes: &[u8]| -> (Value, usize) {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            (
                serde_json::from_slice(&bytes[8..8 + length]).unwrap(),
                8 + length,
            )
        };
        let ((header_a, data_a), (header_b, data_b)) = (header_of(&a), header_of(&b));
        let mut tensors = Vec::new();
        for (tensor, info) in header_a.as_object().unwrap() {
            if tensor == "__metadata__" {
                continue;
            }
            let from_b = tensor == name;
            let (info, bytes, data) = match from_b {
                true => (&header_b[tensor], &b, data_b),
                false => (info, &a, data_a),
            };
            let at = |i: usize| data + info["data_offsets"][i].as_u64().unwrap() as usize;
            tensors.push((tensor, info.clone(), &bytes[at(0)..at(1)]));
        }
        tensors.sort_by_key(|(name, _, bytes)| (bytes.len() % 64 != 0, *name));
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (tensor, mut info, bytes) in tensors {
            info["data_offsets"] = json!([data.len(), data.len() + bytes.len()]);
            header.insert(tensor.clone(), info);
            data.extend_from_slice(bytes);
        }
        let mut notes = header_a["__metadata__"].clone();
        let key = "phidias.packed";
        let table =
            |v: &Value| -> Value { serde_json::from_str(v[key].as_str().unwrap()).unwrap() };
        let mut mixed = table(&notes);
        mixed[name] = table(&header_b["__metadata__"])[name].clone();
        notes[key] = json!(mixed.to_string());
        header.insert("__metadata__".into(), notes);
        let mut header = Value::Object(header).to_string();
        while !(header.len() + 8).is_multiple_of(64) {
            header.push(' ');
        }
        fs::write(source.join(WEIGHTS), raw(&header, &data)).unwrap();
        let error = refused(
            &source,
            None,
            &[name, "is q8", &format!("expected {first}")],
        );
        let expected = matches!(error, Error::Checkpoint(CheckpointError::DType { .. }));
        assert!(expected, "{error}");
    }
}

/// Weights that are no numbers send tokens somewhere, and the logits are none; nothing panics.
#[test]
fn a_router_of_no_numbers() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let folder = TempDir::new().unwrap();
        let mut tensors = weights(&moe_config(), "F32", 1);
        *find(&mut tensors, ROUTER) = Tensor::f32(ROUTER, &[4, 32], &[bad; 128]);
        write_model(folder.path(), &moe_config(), &tensors);
        for format in WeightFormat::ALL {
            let model = open(folder.path(), format);
            let logits = all_logits(&model, SessionOptions::default(), &[1, 2, 3, 4, 5]);
            assert!(logits.iter().flatten().any(|v| v.is_nan()), "{format}");
        }
    }
}

// ------------------------------------------------------------------------------ the sequence

#[test]
fn a_prompt_longer_than_the_context() {
    let model = open(good().path(), WeightFormat::F32);
    let options = SessionOptions {
        context: Some(10),
        ..SessionOptions::default()
    };
    let mut session = session(&model, options);
    let error = session.extend(&[1; 11]).unwrap_err();
    assert!(matches!(
        error,
        Error::TooLong {
            tokens: 11,
            context: 10
        }
    ));
    let message = error.to_string();
    assert!(
        message.contains("11") && message.contains("10"),
        "{message}"
    );
    assert!(session.ids().is_empty());
    session.extend(&[1; 10]).unwrap();
    assert!(matches!(
        session.extend(&[1]),
        Err(Error::TooLong {
            tokens: 11,
            context: 10
        })
    ));
    assert_eq!(session.ids().len(), 10);
}

#[test]
fn a_token_outside_the_vocabulary() {
    let model = open(good().path(), WeightFormat::Q4);
    let mut session = session(&model, SessionOptions::default());
    for id in [61, u32::MAX] {
        let error = session.extend(&[1, id, 2]).unwrap_err().to_string();
        assert!(
            error.contains(&id.to_string()) && error.contains("61"),
            "{error}"
        );
        assert!(session.ids().is_empty(), "nothing was appended");
    }
    session.extend(&[60]).unwrap();
    assert!(matches!(session.extend(&[]), Err(Error::NoTokens)));
}

#[test]
fn a_context_the_model_does_not_have() {
    let model = open(good().path(), WeightFormat::F32);
    for context in [0, 129, usize::MAX] {
        let options = SessionOptions {
            context: Some(context),
            ..SessionOptions::default()
        };
        let error = Session::new(Arc::clone(&model), &options).err().unwrap();
        let message = error.to_string();
        assert!(
            matches!(error, Error::Context { max: 128, .. })
                && message.contains(&context.to_string())
                && message.contains("128"),
            "{message}"
        );
    }
}

/// A model of 9 MiB whose full cache takes terabytes: refused before anything is allocated.
#[test]
fn a_context_that_does_not_fit_in_memory() {
    let mut config = config();
    config["num_hidden_layers"] = json!(1024);
    config["intermediate_size"] = json!(2);
    config["max_position_embeddings"] = json!(1 << 24);
    let folder = TempDir::new().unwrap();
    write_model(folder.path(), &config, &weights(&config, "BF16", 1));
    let model = open(folder.path(), WeightFormat::F32);
    let options = |context| SessionOptions {
        context: Some(context),
        ..SessionOptions::default()
    };
    // 1024 layers, keys and values of 2 heads of 8, 4 bytes each.
    let per_position = 1024 * 2 * 2 * 8 * 4;
    let plan = Session::plan(&model, &options(1 << 24)).unwrap();
    assert_eq!(plan.kv_cache, per_position << 24);
    assert_eq!(plan.weights, model.weight_bytes().all);
    let error = Session::new(Arc::clone(&model), &options(1 << 24)).err();
    let Some(Error::Memory(error)) = error else {
        panic!("{error:?}");
    };
    assert_eq!(error.plan, plan);
    let message = error.to_string();
    for part in [
        "not enough memory",
        "context 16777216",
        "2048.00 GiB",
        "can be had",
    ] {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
    // The same on a machine of known size, with the context that would fit.
    let machine = |bytes| Machine {
        memory_available: Some(bytes),
        ..Machine::default()
    };
    let small = Session::plan(&model, &options(1024)).unwrap();
    assert!(small.check(&machine(1 << 30)).is_ok());
    let error = plan.check(&machine(1 << 30)).unwrap_err();
    assert_eq!(error.available, 1 << 30);
    let rest = (1 << 30) - plan.weights - plan.activations - plan.scratch;
    let fits = rest / per_position / 256 * 256;
    let message = error.to_string();
    assert!(
        message.ends_with(&format!("a context of {fits} fits")),
        "{message}"
    );
    let fitting = Session::plan(&model, &options(fits)).unwrap();
    assert!(fitting.check(&machine(1 << 30)).is_ok(), "and it does");
    // Memory is taken as the sequence grows, so a large context that does fit costs nothing yet.
    let session = session(&model, options(1024));
    assert_eq!(session.cache().bytes(), 0);
}

/// Ids as text.
struct Numbers;

impl Detokenize for Numbers {
    type Error = std::fmt::Error;
    fn push(&mut self, id: u32) -> Result<String, Self::Error> {
        Ok(format!("{id} "))
    }
    fn finish(&mut self) -> Result<String, Self::Error> {
        Ok(String::new())
    }
}

type Generated = Result<phidias::engine::generate::Outcome, GenerateError<Error, std::fmt::Error>>;

fn answer(mut session: Session, prompt: &[u32]) -> Generated {
    let options = GenerateOptions {
        max_new_tokens: 3,
        ..GenerateOptions::default()
    };
    generate(
        &mut session,
        prompt,
        &options,
        &mut Numbers,
        &Cancel::default(),
        |_: Event| ControlFlow::Continue(()),
    )
}

#[test]
fn logits_that_are_not_finite_end_the_generation() {
    for (name, at, bad) in [
        (HEAD, 7 * 32, f32::INFINITY),
        (HEAD, 7 * 32, f32::NAN),
        (NORM, 3, f32::INFINITY),
        ("model.layers.0.mlp.down_proj.weight", 11, f32::NAN),
        (
            "model.layers.1.self_attn.qkv_proj.weight",
            40 * 32,
            f32::NAN,
        ),
    ] {
        let mut tensors = weights(&config(), "F32", 1);
        let tensor = find(&mut tensors, name);
        let (shape, mut values) = (tensor.shape.clone(), tensor.values());
        values[at] = bad;
        *tensor = Tensor::f32(name, &shape, &values);
        let folder = TempDir::new().unwrap();
        write_model(folder.path(), &config(), &tensors);
        let model = open(folder.path(), WeightFormat::F32);
        let result = answer(session(&model, SessionOptions::default()), &[1, 2, 3]);
        let Err(GenerateError::Sample { position, source }) = &result else {
            panic!("{name} {bad}: {result:?}");
        };
        // -inf is what a masked token has, and can only be reached by an infinite weight: then
        // another logit, or the sign of the next step, is the one that is reported.
        assert!(matches!(source, SampleError::NonFinite { .. }), "{source}");
        assert!(*position >= 3);
        let message = result.unwrap_err().to_string();
        assert!(message.contains("finite"), "{message}");
    }
}

#[test]
fn a_prompt_the_generation_refuses() {
    let model = open(good().path(), WeightFormat::Q8);
    let new = || {
        let context = Some(8);
        session(
            &model,
            SessionOptions {
                context,
                ..SessionOptions::default()
            },
        )
    };
    assert!(matches!(
        answer(new(), &[]),
        Err(GenerateError::EmptyPrompt)
    ));
    let error = answer(new(), &[1; 9]).unwrap_err();
    assert!(matches!(
        error,
        GenerateError::PromptTooLong {
            held: 0,
            prompt: 9,
            context: 8
        }
    ));
    let message = error.to_string();
    assert!(message.contains('9') && message.contains('8'), "{message}");
    assert!(matches!(
        answer(new(), &[1, 61]),
        Err(GenerateError::Sequence(Error::TokenId {
            id: 61,
            vocab: 61
        }))
    ));
    assert_eq!(answer(new(), &[1, 2]).unwrap().ids.len(), 3);
}

#[test]
fn absurd_numbers_of_threads() {
    let model = open(good().path(), WeightFormat::F32);
    for threads in [0, 1_000_000] {
        let options = SessionOptions {
            threads: Some(threads),
            ..SessionOptions::default()
        };
        let error = Session::new(Arc::clone(&model), &options).err().unwrap();
        assert!(error.to_string().contains(&threads.to_string()), "{error}");
    }
}

// --------------------------------------------------------------------------------- any bytes

/// Opens a model from bytes in memory and runs a token through it. Only a panic fails.
fn try_model(config: &[u8], weights: &[u8]) -> Result<(), Error> {
    let bytes = Bytes::from(OwnedBytes::copy(weights).unwrap());
    let source = Source::from_bytes("any", config, b"{}", bytes)?;
    let as_stored = OpenOptions {
        threads: Some(1),
        ..OpenOptions::default()
    };
    let model = Model::from_source(source, None, as_stored)?;
    let options = SessionOptions {
        context: Some(1),
        threads: Some(1),
        ..SessionOptions::default()
    };
    Session::new(Arc::new(model), &options)?.extend(&[0])?;
    Ok(())
}

fn longrope_config() -> Value {
    let mut config = config();
    config["original_max_position_embeddings"] = json!(16);
    config["sliding_window"] = json!(12);
    config["rope_scaling"] = json!({
        "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
    });
    config
}

/// A change of some bytes.
#[derive(Clone, Debug)]
enum Damage {
    Flip(usize, u8),
    Set(usize, u8),
    Cut(usize),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
}

impl Damage {
    /// Applies it within the first `reach` bytes.
    fn apply(&self, bytes: &mut Vec<u8>, reach: usize) {
        let reach = reach.min(bytes.len()).max(1);
        match self {
            Self::Flip(at, bit) => {
                if let Some(b) = bytes.get_mut(at % reach) {
                    *b ^= 1 << (bit % 8);
                }
            }
            Self::Set(at, value) => {
                if let Some(b) = bytes.get_mut(at % reach) {
                    *b = *value;
                }
            }
            Self::Cut(at) => bytes.truncate(at % (bytes.len() + 1)),
            Self::Insert(at, new) => {
                let at = (at % reach).min(bytes.len());
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Remove(at, count) => {
                let at = (at % reach).min(bytes.len());
                let end = (at + count % 16).min(bytes.len());
                bytes.drain(at..end);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    // Printable bytes reach deeper into a parser than any byte does; digits change numbers.
    let byte = prop_oneof![any::<u8>(), b'0'..=b'9', Just(b'-'), Just(b'"'), Just(b'e')];
    let at = any::<usize>();
    let one = prop_oneof![
        (at, any::<u8>()).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (at, byte.clone()).prop_map(|(at, b)| Damage::Set(at, b)),
        at.prop_map(Damage::Cut),
        (at, prop::collection::vec(byte, 1..20)).prop_map(|(at, b)| Damage::Insert(at, b)),
        (at, at).prop_map(|(at, n)| Damage::Remove(at, n)),
    ];
    prop::collection::vec(one, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

    #[test]
    fn damaged_weights_never_panic(damage in damage(), in_header in prop::bool::weighted(0.8), q4 in any::<bool>()) {
        let config = longrope_config();
        let mut bytes = any_container(q4);
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let reach = if in_header { 8 + header } else { bytes.len() };
        damage.iter().for_each(|d| d.apply(&mut bytes, reach));
        let _ = try_model(config.to_string().as_bytes(), &bytes);
    }

    #[test]
    fn damaged_configurations_never_panic(damage in damage()) {
        let mut json = longrope_config().to_string().into_bytes();
        let reach = json.len();
        damage.iter().for_each(|d| d.apply(&mut json, reach));
        let _ = try_model(&json, &any_container(false));
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), header in 0u64..64) {
        let mut with_header = header.to_le_bytes().to_vec();
        with_header.extend_from_slice(&bytes);
        let config = config().to_string();
        prop_assert!(try_model(config.as_bytes(), &bytes).is_err());
        prop_assert!(try_model(config.as_bytes(), &with_header).is_err());
        prop_assert!(try_model(&bytes, &any_container(false)).is_err());
    }
}

/// The good model's file, or its q4 twin.
fn any_container(q4: bool) -> Vec<u8> {
    use std::sync::OnceLock;
    static FILES: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    let files = FILES.get_or_init(|| {
        let folder = packed(|_, _| {});
        let packed = fs::read(folder.path().join("q4").join(WEIGHTS)).unwrap();
        [container(&weights(&config(), "BF16", 1)), packed]
    });
    files[usize::from(q4)].clone()
}

#[test]
fn the_models_that_are_damaged_are_good() {
    let json = longrope_config().to_string();
    for q4 in [false, true] {
        try_model(json.as_bytes(), &any_container(q4)).unwrap();
    }
}
