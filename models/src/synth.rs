//! Folders with random weights in a published model's exact shapes.
//!
//! Speed does not depend on what the weights are, so a folder made here races like the real model
//! and nothing has to be downloaded. It is a complete one: configuration, weights, tokenizer and
//! chat template, in files that other engines read too.
//!
//! **Weights** are drawn, not stored: element `i` of a tensor depends on the seed, the tensor's
//! name and `i`, so every thread makes its part and a q4 folder needs no larger one before it.
//! They are bf16 numbers, as the published ones are. So a folder of any format is, bit for bit,
//! the bf16 folder of the same preset and seed quantized (or widened): whoever races two formats,
//! or two engines, races the same model.
//!
//! **Size of the weights.** With rows of `n` inputs and normalised inputs,
//!
//! | tensor | standard deviation | so that |
//! |---|---|---|
//! | norms | 0.1 around 1 | |
//! | biases | 0.1 | |
//! | `embed_tokens` | 1 | the residual starts with variance 1 |
//! | `qkv_proj`, `gate_up_proj`, `query_key_value`, `up_proj`, an expert's `w1`, `w3` | `1/sqrt(n)` | queries, keys and gates have variance 1 |
//! | `o_proj`, `down_proj`, `dense` | `1/sqrt(2 n layers)` | all branches together add at most variance 1 |
//! | an expert's `w2` | `1/sqrt(4 n layers)` | so that two experts do |
//! | router | `1/sqrt(n)` | scores have variance 1, and tokens spread evenly over the experts |
//! | `lm_head` | `3/sqrt(n)` | logits have standard deviation 3 |
//! | `embed_tokens` that is the head too | that, times what logits are divided by | the same |
//!
//! (the residual's scaling is that of GPT-2, Radford et al. 2019, section 2.3).

mod presets;
mod vocabulary;

pub use presets::{Preset, UnknownPreset};

use crate::config::Config;
use crate::error::Error;
use crate::format::WeightFormat;
use crate::quantize::{new_folder, write_file};
use crate::weights::{HEAD, Role, Spec};
use phidias_engine::Cancel;
use phidias_engine::checkpoint::SINGLE;
use phidias_engine::checkpoint::prepack::{Item, Prepack, Treatment, Values};
use phidias_engine::pool::Pool;
use phidias_engine::tensor::DType;
use std::fs;
use std::path::Path;

/// How to make a folder.
pub struct SynthOptions<'a> {
    /// What the matrices are stored in.
    pub format: WeightFormat,
    /// Layers; `None`: all of the preset's.
    pub layers: Option<usize>,
    /// Another seed, other weights.
    pub seed: u64,
    /// Threads; `None`: as many as this process may use. The bytes do not depend on it.
    pub threads: Option<usize>,
    /// Stops the work; nothing is left then.
    pub cancel: Cancel,
    /// Told how far it is: bytes done, bytes in all.
    pub progress: Option<&'a mut dyn FnMut(usize, usize)>,
}

impl Default for SynthOptions<'_> {
    fn default() -> Self {
        Self {
            format: WeightFormat::Bf16,
            layers: None,
            seed: 0,
            threads: None,
            cancel: Cancel::default(),
            progress: None,
        }
    }
}

/// Writes `out` as a folder of the preset's shapes. It appears whole or not at all.
/// # Errors
/// [`Error::Layers`]; [`Error::Exists`]; [`Error::DiskSpace`] before anything is written; what the
/// file system says; cancellation.
pub fn synthesize(preset: Preset, out: &Path, options: SynthOptions<'_>) -> Result<(), Error> {
    let layers = preset.checked(options.layers)?;
    let config_json = pretty(&preset.config(layers, options.format));
    let config = Config::from_json(&out.join("config.json"), &config_json)?;
    let drawn: Vec<(Spec, Drawn)> = (config.specs().into_iter())
        .map(|spec| {
            let drawn = Drawn::new(&spec, &config, options.seed);
            (spec, drawn)
        })
        .collect();
    let items = (drawn.iter())
        .map(|(spec, values)| Item {
            name: spec.name.clone(),
            source: spec.name.clone(),
            values,
            treatment: match (options.format, options.format.packed()) {
                (WeightFormat::F32, _) => Treatment::Cast(DType::F32),
                (_, Some(format)) if spec.role.takes_format() => Treatment::Pack(format),
                _ => Treatment::Keep,
            },
        })
        .collect();
    let plan = Prepack::of(out, items)?;
    let pool = Pool::new(options.threads)?;
    let mut ignore = |_: usize, _: usize| {};
    let progress = options.progress.unwrap_or(&mut ignore);
    new_folder(out, |folder| {
        write_file(
            &folder.join(SINGLE),
            &plan,
            &pool,
            &options.cancel,
            progress,
        )?;
        let mut files = vec![
            ("config.json", config_json),
            (
                "generation_config.json",
                pretty(&presets::generation(preset.family)),
            ),
        ];
        let preprocessor = preset.preprocessor().as_ref().map(pretty);
        files.extend(preprocessor.map(|bytes| ("preprocessor_config.json", bytes)));
        files.extend(preset.tokenizer_files()?);
        for (name, bytes) in files {
            let path = folder.join(name);
            fs::write(&path, bytes).map_err(|source| Error::Io { path, source })?;
        }
        Ok(())
    })
}

impl Preset {
    /// The configuration that [`synthesize`] writes, with fewer layers where asked.
    /// # Errors
    /// [`Error::Layers`].
    pub fn configuration(&self, layers: Option<usize>) -> Result<Config, Error> {
        let json = pretty(&self.config(self.checked(layers)?, WeightFormat::Bf16));
        Ok(Config::from_json(Path::new(self.name), &json)?)
    }

    /// The tokenizer's files that [`synthesize`] writes: name and bytes.
    /// # Errors
    /// A configuration that is refused; no preset has one.
    pub fn tokenizer_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, Error> {
        let form = vocabulary::Form::of(self.configuration(None)?.vocab_size);
        Ok(vocabulary::files(form, self.max_position_embeddings))
    }

    /// The number of layers asked for: at least one, at most the published model's.
    fn checked(&self, layers: Option<usize>) -> Result<usize, Error> {
        let asked = layers.unwrap_or(self.layers);
        if asked == 0 || asked > self.layers {
            return Err(Error::Layers {
                preset: self.name,
                asked,
                max: self.layers,
            });
        }
        Ok(asked)
    }
}

fn pretty(json: &serde_json::Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

/// A tensor that is drawn as it is asked for: `mean + std * g(i)`, rounded to bf16.
///
/// `g(i)` is near a Gaussian: the sum of the four 16-bit parts of a hash of `i`, centred and
/// scaled to variance 1 (Irwin-Hall with n = 4: nothing beyond 3.46 standard deviations). The hash
/// is the finalizer of SplitMix64 (Steele, Lea and Flood 2014) on a counter.
#[derive(Debug)]
struct Drawn {
    shape: Vec<usize>,
    key: u64,
    mean: f32,
    std: f32,
}

impl Drawn {
    fn new(spec: &Spec, config: &Config, seed: u64) -> Self {
        let inputs = spec.shape[1..].iter().product::<usize>() as f32;
        let layers = config.num_hidden_layers;
        let ends_branch = ["o_proj.weight", "down_proj.weight", "dense.weight"];
        let head = 3.0 * config.logits_divisor / inputs.sqrt();
        let (mean, std) = match spec.role {
            Role::Norm => (1.0, 0.1),
            Role::Bias => (0.0, 0.1),
            Role::Embedding if config.tie_word_embeddings => (0.0, head),
            Role::Embedding => (0.0, 1.0),
            Role::Matrix if spec.name == HEAD => (0.0, head),
            Role::Matrix if ends_branch.iter().any(|end| spec.name.ends_with(end)) => {
                (0.0, 1.0 / (2.0 * inputs * layers as f32).sqrt())
            }
            Role::Expert if spec.name.ends_with("w2.weight") => {
                (0.0, 1.0 / (4.0 * inputs * layers as f32).sqrt())
            }
            Role::Matrix | Role::Expert | Role::Router | Role::Patch => (0.0, 1.0 / inputs.sqrt()),
        };
        let key = (spec.name.bytes()).fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
        Self {
            shape: spec.shape.clone(),
            key,
            mean,
            std,
        }
    }
}

impl Values for Drawn {
    fn dtype(&self) -> DType {
        DType::Bf16
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn raw(&self) -> Option<&[u8]> {
        None
    }
    fn widen(&self, first: usize, out: &mut [f32]) -> bool {
        /// Standard deviation of the sum of four numbers from 0 to 65535: sqrt((2^32 - 1) / 3).
        const SUM_STD: f32 = 37_837.227;
        const SUM_MEAN: i32 = 2 * 65_535;
        const EVEN_PARTS: u64 = 0x0000_ffff_0000_ffff;
        let step = self.std / SUM_STD;
        for (i, out) in (first as u64..).zip(out) {
            let hash = mix(self.key.wrapping_add(i.wrapping_mul(GOLDEN)));
            let pairs = (hash & EVEN_PARTS) + (hash >> 16 & EVEN_PARTS);
            let sum = (pairs as u32 + (pairs >> 32) as u32) as i32;
            *out = round_to_bf16(self.mean + (sum - SUM_MEAN) as f32 * step);
        }
        true
    }
}

/// 2^64 over the golden ratio, odd: the step of SplitMix64's counter.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of SplitMix64.
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// To the nearest number of 8 significant bits, ties to even; for finite `v`.
fn round_to_bf16(v: f32) -> f32 {
    let bits = v.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests;
