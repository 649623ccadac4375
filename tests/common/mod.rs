//! Small models written from scratch, and the fixtures, for the tests of the whole.
#![allow(dead_code, reason = "every test program uses another part")]

pub mod program;

use phidias::models::weights::Role;
use phidias::models::{Config, Family};
use phidias::{Model, OpenOptions, Session, SessionOptions, WeightFormat};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// SplitMix64 (Steele, Lea & Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// Uniform in -1..1.
    pub fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    pub fn ids(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n)
            .map(|_| (self.bits() % vocab as u64) as u32)
            .collect()
    }
}

/// A tensor of a container that is being written.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn f32(name: &str, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        Self {
            name: name.into(),
            dtype: "F32",
            shape: shape.to_vec(),
            data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    pub fn values(&self) -> Vec<f32> {
        assert_eq!(self.dtype, "F32");
        let (chunks, _) = self.data.as_chunks::<4>();
        chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// The same in bf16, rounded towards zero: these are random numbers anyway.
    pub fn to_bf16(&self) -> Self {
        Self {
            dtype: "BF16",
            data: self
                .values()
                .iter()
                .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
                .collect(),
            ..self.clone()
        }
    }
}

/// The header of these tensors, one after the other.
pub fn header(tensors: &[Tensor]) -> Map<String, Value> {
    let mut header = Map::new();
    let mut offset = 0;
    for t in tensors {
        let end = offset + t.data.len();
        let info = json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [offset, end] });
        header.insert(t.name.clone(), info);
        offset = end;
    }
    header
}

/// A container of any header and any data.
pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut header = header.to_owned();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A valid container.
pub fn container(tensors: &[Tensor]) -> Vec<u8> {
    let data: Vec<u8> = tensors.iter().flat_map(|t| t.data.clone()).collect();
    raw(&Value::Object(header(tensors)).to_string(), &data)
}

/// The configuration of a very small Phi-3.
pub fn config() -> Value {
    json!({
        "model_type": "phi3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    })
}

/// The configuration of a very small Phi-3-small: block-sparse, dense, block-sparse.
pub fn small_config() -> Value {
    json!({
        "model_type": "phi3small", "vocab_size": 61, "hidden_size": 64, "ff_intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "layer_norm_epsilon": 1e-5, "hidden_act": "gegelu",
        "gegelu_limit": 20.0, "blocksparse_block_size": 16, "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 5, "blocksparse_triton_kernel_block_size": 16,
    })
}

/// The configuration of a very small mixture of experts.
pub fn moe_config() -> Value {
    let mut config = config();
    config["model_type"] = json!("phimoe");
    for (field, value) in [("num_local_experts", 4), ("num_experts_per_tok", 2)] {
        config[field] = json!(value);
    }
    for field in ["attention_bias", "lm_head_bias"] {
        config[field] = json!(true);
    }
    config["router_jitter_noise"] = json!(0.01);
    config
}

/// Random weights for a configuration, in f32 or bf16 as `dtype` says.
pub fn weights(config: &Value, dtype: &str, seed: u64) -> Vec<Tensor> {
    let parsed =
        Config::from_json(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    let mut random = Random(seed);
    (parsed.specs().iter())
        .map(|spec| {
            let fan_in = *spec.shape.last().unwrap() as f32;
            let values: Vec<f32> = (0..spec.shape.iter().product::<usize>())
                .map(|_| match spec.role {
                    Role::Norm => 1.0 + 0.25 * random.value(),
                    Role::Bias => 0.25 * random.value(),
                    _ => random.value() * (3.0 / fan_in).sqrt(),
                })
                .collect();
            let tensor = Tensor::f32(&spec.name, &spec.shape, &values);
            if dtype == "BF16" {
                tensor.to_bf16()
            } else {
                tensor
            }
        })
        .collect()
}

/// Writes a model folder of one file.
pub fn write_model(folder: &Path, config: &Value, tensors: &[Tensor]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("model.safetensors"), container(tensors)).unwrap();
}

/// Writes a model folder of shards, dealt out in turn.
pub fn write_shards(folder: &Path, config: &Value, tensors: &[Tensor], names: &[&str]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut map = Map::new();
    for (i, name) in names.iter().enumerate() {
        let part: Vec<Tensor> = (tensors.iter().skip(i).step_by(names.len()).cloned()).collect();
        for t in &part {
            map.insert(t.name.clone(), json!(name));
        }
        fs::write(folder.join(name), container(&part)).unwrap();
    }
    write_index(folder, &json!({ "metadata": {}, "weight_map": map }));
}

pub fn write_index(folder: &Path, index: &Value) {
    let path = folder.join("model.safetensors.index.json");
    fs::write(path, index.to_string()).unwrap();
}

pub fn options<'a>(format: WeightFormat) -> OpenOptions<'a> {
    OpenOptions {
        format: Some(format),
        threads: Some(2),
        ..OpenOptions::default()
    }
}

pub fn open(folder: &Path, format: WeightFormat) -> Arc<Model> {
    let model = Model::open(folder, options(format));
    Arc::new(model.unwrap_or_else(|e| panic!("{}: {e}", folder.display())))
}

pub fn session(model: &Arc<Model>, options: SessionOptions) -> Session {
    Session::new(Arc::clone(model), &options).unwrap()
}

/// Logits after every token, in a fresh session.
pub fn all_logits(model: &Arc<Model>, options: SessionOptions, ids: &[u32]) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    let mut session = session(model, options);
    session
        .extend_all(ids, |_, row| logits.push(row.to_vec()))
        .unwrap();
    logits
}

/// ||a - b|| / ||b||
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: f64| v * v;
    let pairs = a.iter().zip(b);
    let difference: f64 = pairs
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / norm).sqrt()
}

/// The text models among the fixtures.
pub fn text_fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut found: Vec<PathBuf> = (fs::read_dir(&root).unwrap().map(|e| e.unwrap().path()))
        .filter(|folder| folder.join("expected.safetensors").exists())
        .filter(|folder| {
            let config = fs::read(folder.join("config.json")).unwrap_or_default();
            let config: Value = serde_json::from_slice(&config).unwrap_or_default();
            let family = config["model_type"].as_str().and_then(Family::of);
            // Pictures have a suite of their own.
            family.is_some_and(|family| family != Family::Phi3V)
        })
        .collect();
    found.sort();
    assert!(found.len() >= 7, "the fixtures are there");
    found
}

/// A copy of a fixture whose configuration is changed; the weights are links to the original's.
#[cfg(unix)]
pub fn changed_fixture(from: &Path, to: &Path, change: impl Fn(&mut Value)) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_owned();
        if name == "config.json" {
            let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            change(&mut config);
            fs::write(to.join(name), config.to_string()).unwrap();
        } else if name.to_string_lossy().starts_with("model") {
            std::os::unix::fs::symlink(&path, to.join(name)).unwrap();
        }
    }
}

/// Every device that is not the CPU: the host device, and the GPU where there is one.
#[cfg(feature = "cuda")]
pub fn devices() -> Vec<Arc<dyn phidias::engine::kernels::cuda::Device>> {
    use phidias::engine::kernels::cuda::{Device, DeviceError, Gpu, HostDevice, Order};
    use std::io::Write;
    use std::sync::{LazyLock, Once};

    fn known(place: &str, device: Result<Arc<dyn Device>, DeviceError>) -> Option<Arc<dyn Device>> {
        // Past the test harness, which swallows what a passing test prints.
        let skipped = |reason| {
            let mut stderr = std::io::stderr();
            let _ = writeln!(stderr, "\n=== SKIPPED: models {place}: {reason} ===\n");
        };
        device.map_err(skipped).ok()
    }
    static GPU: LazyLock<Option<Arc<dyn Device>>> = LazyLock::new(|| {
        let gpu = Gpu::open(0, None).map(|gpu| Arc::new(gpu) as Arc<dyn Device>);
        known("on a GPU", gpu)
    });
    static NO_HOST: Once = Once::new();
    let host = HostDevice::new(Order::Forward).map(|device| Arc::new(device) as Arc<dyn Device>);
    let host = match host {
        Ok(device) => Some(device),
        Err(error) => {
            NO_HOST.call_once(|| {
                known("on the host device", Err(error));
            });
            None
        }
    };
    host.into_iter().chain(GPU.clone()).collect()
}

/// A model once for every device, with the device's name.
#[cfg(feature = "cuda")]
pub fn on_devices(folder: &Path, format: WeightFormat) -> Vec<(String, Arc<Model>)> {
    (devices().iter())
        .map(|device| (device.name(), open_on(device, folder, format)))
        .collect()
}

/// No device is in this build.
#[cfg(not(feature = "cuda"))]
pub fn on_devices(_: &Path, _: WeightFormat) -> Vec<(String, Arc<Model>)> {
    Vec::new()
}

/// A model whose sessions run on `device`.
#[cfg(feature = "cuda")]
pub fn open_on(
    device: &Arc<dyn phidias::engine::kernels::cuda::Device>,
    folder: &Path,
    format: WeightFormat,
) -> Arc<Model> {
    let name = folder.display();
    let mut model = Model::open(folder, options(format)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let cancel = phidias::engine::Cancel::default();
    let mut told = (0, 0);
    (model.put_on(Arc::clone(device), &cancel, &mut |done, total| {
        assert!(
            told.0 < done && done <= total,
            "{told:?}, {done} of {total}"
        );
        told = (done, total);
    }))
    .unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(told.0, told.1, "{name}: bytes on the device");
    Arc::new(model)
}
