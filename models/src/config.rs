//! `config.json` and the files beside it, checked once.
//!
//! Every field that is used is range-checked here, before anything is allocated from it; what
//! comes out needs no second look. Fields that are not used are ignored.

mod companions;
mod fields;

pub use companions::{GenerationConfig, PreprocessorConfig};
pub(crate) use fields::{Fields, parse};

use crate::family::Family;
use crate::vision::VisionConfig;
use crate::weights::Spec;
use phidias_engine::backend::{HeadOrder, Heads, Mask};
use phidias_engine::files::{MAX_JSON_BYTES, read_at_most};
use phidias_engine::kv_cache::KvShape;
use phidias_engine::mask::BlockSparse;
use serde_json::{Map, Value};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum ConfigError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: no such file: not a model folder", path.display())]
    NoConfig { path: PathBuf },
    #[error("{}: not a JSON object: {reason}", path.display())]
    Json { path: PathBuf, reason: String },
    #[error("{}: field '{field}' is missing", path.display())]
    Missing { path: PathBuf, field: String },
    #[error("{}: field '{field}' is {found}, expected {expected}", path.display())]
    Field {
        path: PathBuf,
        field: String,
        expected: String,
        found: String,
    },
    #[error("{}: model_type '{found}' is not supported; supported: {}", path.display(), Family::ALL.map(Family::name).join(", "))]
    ModelType { path: PathBuf, found: String },
    #[error("{}: rope type '{found}' is not supported; supported: default, longrope, su, yarn", path.display())]
    RopeType { path: PathBuf, found: String },
}

type Result<T> = std::result::Result<T, ConfigError>;

/// A checked configuration of a text model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// By `model_type`.
    pub family: Family,
    /// Rows of the embedding table and of `lm_head`.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// `hidden_size / num_attention_heads`, even.
    pub head_dim: usize,
    /// Most positions the model was made for.
    pub max_position_embeddings: usize,
    /// Keys that a query sees at most, itself included.
    pub sliding_window: Option<usize>,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Factor on attention scores.
    pub attention_scale: f32,
    /// Layers whose queries see some blocks only.
    pub block_sparse: Option<SparseLayers>,
    /// Factor on the embedded tokens.
    pub embedding_multiplier: f32,
    /// What the logits are divided by.
    pub logits_divisor: f32,
    /// Ids that are no tokens, below `vocab_size`.
    pub unused_ids: Vec<Range<usize>>,
    /// Largest magnitude that GEGELU takes; infinite where there is none.
    pub gegelu_limit: f32,
    /// The side of a vision model that sees pictures.
    pub vision: Option<VisionConfig>,
    /// Whether `lm_head` is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether the projections of attention have biases.
    pub attention_bias: bool,
    /// Whether `lm_head` has a bias.
    pub lm_head_bias: bool,
    /// Experts in the place of the MLP, in families that have them.
    pub moe: Option<MoeConfig>,
    /// First token of a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// Which layers are block-sparse, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseLayers {
    /// Which blocks their queries see.
    pub layout: BlockSparse,
    /// Of this many layers the last one is dense; `None`: no layer is.
    pub dense_every: Option<usize>,
}

/// A mixture of experts, of which a token uses [`PICKS`](phidias_engine::backend::PICKS).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts of a layer, at least as many as a token uses.
    pub experts: usize,
    /// How near a score must come to the best one to lower its weight, as a share of it.
    pub jitter: f32,
}

/// Rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Factor on the positions.
    pub position_scale: f32,
    /// LongRoPE, where the configuration asks for it.
    pub long: Option<LongRope>,
}

/// LongRoPE: two lists of factors on the wavelengths.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// For sequences of at most `original_max_position_embeddings`; `[head_dim / 2]`.
    pub short_factor: Vec<f32>,
    /// For longer ones; `[head_dim / 2]`.
    pub long_factor: Vec<f32>,
    /// Length the model was first trained for.
    pub original_max_position_embeddings: usize,
    /// Multiplier on cosine and sine where the short factors hold.
    pub short_multiplier: f32,
    /// And where the long ones do.
    pub long_multiplier: f32,
}

/// What the families call the fields that they share.
pub(crate) struct Keys {
    /// Width of the MLP.
    pub intermediate_size: &'static str,
    /// Epsilon of the norms.
    pub norm_eps: &'static str,
    /// Base of the rotary frequencies.
    pub rope_theta: &'static str,
    /// The activation that the family has; no other is refused silently.
    pub hidden_act: &'static str,
    /// Whether the head is the embedding table when nothing is said.
    pub tied: bool,
    /// Whether the `original_max_position_embeddings` of `rope_scaling` comes before the one beside it.
    pub original_in_scaling: bool,
}

impl Keys {
    /// Those of `phi3`.
    pub(crate) const PHI3: Self = Self {
        intermediate_size: "intermediate_size",
        norm_eps: "rms_norm_eps",
        rope_theta: "rope_theta",
        hidden_act: "silu",
        tied: false,
        original_in_scaling: false,
    };
}

impl Config {
    /// Reads `config.json` of a folder.
    /// # Errors
    /// [`ConfigError`].
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = read_at_most(&path, MAX_JSON_BYTES).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ConfigError::NoConfig { path: path.clone() },
            _ => ConfigError::Io {
                path: path.clone(),
                source,
            },
        })?;
        Self::from_json(&path, &text)
    }

    /// Reads a configuration; `path` is for messages.
    /// # Errors
    /// [`ConfigError`].
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self> {
        let map = parse(path, text)?;
        let f = Fields::new(path, &map);
        let model_type = f.text("model_type")?.unwrap_or("");
        match Family::of(model_type) {
            Some(family) => family.configure(&f),
            None => Err(ConfigError::ModelType {
                path: path.to_owned(),
                found: model_type.to_owned(),
            }),
        }
    }

    /// What the families have in common; the rest is that of a plain transformer.
    pub(crate) fn common(f: &Fields<'_>, family: Family, keys: &Keys) -> Result<Self> {
        let hidden_size = f.required("hidden_size", 2..=1 << 16)?;
        let heads = f.required("num_attention_heads", 1..=1 << 12)?;
        let kv_heads = f
            .count("num_key_value_heads", 1..=1 << 12)?
            .unwrap_or(heads);
        if hidden_size % heads != 0 || !(hidden_size / heads).is_multiple_of(2) {
            return f.wrong(
                "num_attention_heads",
                format!("a divisor of hidden_size {hidden_size} that leaves an even head"),
            );
        }
        if heads % kv_heads != 0 {
            return f.wrong(
                "num_key_value_heads",
                format!("a divisor of num_attention_heads {heads}"),
            );
        }
        let head_dim = hidden_size / heads;
        if f.count("head_dim", 1..=1 << 16)?
            .is_some_and(|d| d != head_dim)
        {
            return f.wrong(
                "head_dim",
                format!("{head_dim} (hidden_size / num_attention_heads)"),
            );
        }
        let act = keys.hidden_act;
        if f.text("hidden_act")?.is_some_and(|found| found != act) {
            return f.wrong("hidden_act", format!("\"{act}\""));
        }
        if f.number("partial_rotary_factor", f64::MIN..=f64::MAX)?
            .is_some_and(|p| p != 1.0)
        {
            return f.wrong(
                "partial_rotary_factor",
                "1.0 (rotating part of a head is not supported)",
            );
        }
        let max_position_embeddings = f.required("max_position_embeddings", 1..=1 << 24)?;
        let eos_token_ids = f.ids("eos_token_id")?;
        Ok(Self {
            family,
            vocab_size: f.required("vocab_size", 1..=1 << 22)?,
            hidden_size,
            intermediate_size: f.required(keys.intermediate_size, 1..=1 << 20)?,
            num_hidden_layers: f.required("num_hidden_layers", 1..=1 << 10)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings,
            sliding_window: f.count("sliding_window", 1..=usize::MAX)?,
            norm_eps: f.number(keys.norm_eps, 0.0..=1.0)?.unwrap_or(1e-5) as f32,
            rope: rope(f, keys, head_dim, max_position_embeddings)?,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            block_sparse: None,
            embedding_multiplier: 1.0,
            logits_divisor: 1.0,
            unused_ids: Vec::new(),
            gegelu_limit: f32::INFINITY,
            vision: None,
            tie_word_embeddings: f.flag("tie_word_embeddings")?.unwrap_or(keys.tied),
            attention_bias: false,
            lm_head_bias: false,
            moe: None,
            bos_token_id: f.ids("bos_token_id")?.first().copied(),
            eos_token_ids,
        })
    }

    /// Every tensor that a checkpoint of it has.
    #[must_use]
    pub fn specs(&self) -> Vec<Spec> {
        self.family.specs(self)
    }

    /// Its attention heads.
    #[must_use]
    pub fn heads(&self, order: HeadOrder) -> Heads {
        Heads {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            order,
        }
    }

    /// Which keys the queries of a layer see.
    #[must_use]
    pub fn mask(&self, layer: usize) -> Mask {
        match self.block_sparse {
            Some(sparse)
                if !(sparse.dense_every).is_some_and(|n| (layer + 1).is_multiple_of(n)) =>
            {
                Mask::BlockSparse(sparse.layout)
            }
            _ => Mask::Causal {
                window: self.sliding_window,
            },
        }
    }

    /// The shape of its KV cache.
    #[must_use]
    pub fn kv_shape(&self) -> KvShape {
        KvShape {
            layers: (0..self.num_hidden_layers).map(|l| self.mask(l)).collect(),
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }
}

fn rope(f: &Fields<'_>, keys: &Keys, head_dim: usize, max_positions: usize) -> Result<RopeConfig> {
    // Newer configurations keep theta and the scaling in one object, "rope_parameters".
    let (key, prefix) = match f.value("rope_parameters") {
        Some(_) => ("rope_parameters", "rope_parameters."),
        None => ("rope_scaling", "rope_scaling."),
    };
    let empty = Map::new();
    let scaling = match f.value(key) {
        None => &empty,
        Some(Value::Object(map)) => map,
        Some(_) => return f.wrong(key, "an object or null"),
    };
    let s = f.of(prefix, scaling);
    let theta = match s.number("rope_theta", 1.0..=1e12)? {
        Some(theta) => theta,
        None => f.number(keys.rope_theta, 1.0..=1e12)?.unwrap_or(10_000.0),
    };
    let kind = match s.text("rope_type")? {
        Some(kind) => Some(kind),
        None => s.text("type")?,
    };
    let long = match kind {
        // The reference reads the older names "su" and "yarn" as longrope.
        Some("longrope" | "su" | "yarn") => {
            let name = "original_max_position_embeddings";
            let [beside, inside] = [f, &s].map(|fields| fields.count(name, 2..=1 << 24));
            let (beside, inside) = (beside?, inside?);
            let original = if keys.original_in_scaling {
                inside.or(beside)
            } else {
                beside.or(inside)
            };
            let original = original.unwrap_or(max_positions.max(2));
            let usual = match s.number("attention_factor", 1e-3..=1e3)? {
                Some(factor) => factor as f32,
                None => attention_factor(max_positions, original),
            };
            let multiplier = |field| {
                let given = s.number(field, 1e-3..=1e3)?;
                Ok(given.map_or(usual, |factor| factor as f32))
            };
            Some(LongRope {
                short_factor: s.factors("short_factor", head_dim / 2)?,
                long_factor: s.factors("long_factor", head_dim / 2)?,
                original_max_position_embeddings: original,
                short_multiplier: multiplier("short_mscale")?,
                long_multiplier: multiplier("long_mscale")?,
            })
        }
        Some("default") => None,
        None if scaling.is_empty() || key == "rope_parameters" => None,
        other => {
            let found = other.unwrap_or("(none given)").to_owned();
            return Err(ConfigError::RopeType {
                path: f.path.to_owned(),
                found,
            });
        }
    };
    Ok(RopeConfig {
        theta,
        position_scale: 1.0,
        long,
    })
}

/// `sqrt(1 + ln(max / original) / ln(original))` when the model was extended, else 1
/// (Ding et al. 2024, LongRoPE; the multiplier as the reference implementation has it).
fn attention_factor(max_positions: usize, original: usize) -> f32 {
    let scale = max_positions as f64 / original as f64;
    if scale <= 1.0 {
        1.0
    } else {
        (1.0 + scale.ln() / (original as f64).ln()).sqrt() as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mini() -> Value {
        json!({
            "model_type": "phi3", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
            "rope_scaling": { "type": "su", "short_factor": ([1.0; 8]), "long_factor": ([2.0; 8]) },
            "eos_token_id": 7, "sliding_window": 2047,
        })
    }

    fn read(value: &Value) -> Result<Config> {
        Config::from_json(Path::new("config.json"), value.to_string().as_bytes())
    }

    #[test]
    fn reads_a_good_one() {
        let config = read(&mini()).unwrap();
        assert_eq!(
            (
                config.head_dim,
                config.sliding_window,
                config.eos_token_ids.as_slice()
            ),
            (16, Some(2047), &[7][..])
        );
        let long = config.rope.long.unwrap();
        // The published figure for 131072 / 4096.
        assert!((f64::from(long.short_multiplier) - 1.190_238_071_423_808_3).abs() < 1e-7);
        assert_eq!(attention_factor(4096, 4096), 1.0);
    }

    #[test]
    fn every_bad_field_is_named() {
        let cases = [
            (
                "model_type",
                json!("llama"),
                "model_type 'llama' is not supported; supported: phi3",
            ),
            (
                "hidden_size",
                json!(0),
                "field 'hidden_size' is 0, expected an integer from 2 to 65536",
            ),
            ("hidden_size", json!(-64), "'hidden_size' is -64"),
            ("hidden_size", json!(1e300), "'hidden_size' is 1e+300"),
            (
                "hidden_size",
                json!(66),
                "'num_attention_heads' is 4, expected a divisor of hidden_size 66",
            ),
            (
                "num_attention_heads",
                json!(3),
                "'num_attention_heads' is 3",
            ),
            ("num_attention_heads", json!(64), "that leaves an even head"),
            (
                "num_key_value_heads",
                json!(3),
                "'num_key_value_heads' is 3, expected a divisor of num_attention_heads 4",
            ),
            ("head_dim", json!(32), "'head_dim' is 32, expected 16"),
            ("vocab_size", Value::Null, "'vocab_size' is missing"),
            ("vocab_size", json!(u64::MAX), "'vocab_size'"),
            (
                "num_hidden_layers",
                json!("2"),
                "'num_hidden_layers' is \"2\"",
            ),
            ("rms_norm_eps", json!(-1.0), "'rms_norm_eps'"),
            ("sliding_window", json!(0), "'sliding_window' is 0"),
            (
                "hidden_act",
                json!("gelu"),
                "'hidden_act' is \"gelu\", expected \"silu\"",
            ),
            (
                "partial_rotary_factor",
                json!(0.75),
                "'partial_rotary_factor' is 0.75",
            ),
            ("eos_token_id", json!("x"), "'eos_token_id'"),
            ("eos_token_id", json!([1, -1]), "'eos_token_id'"),
            ("rope_theta", json!(0), "'rope_theta' is 0"),
            (
                "rope_scaling",
                json!(5),
                "'rope_scaling' is 5, expected an object or null",
            ),
            (
                "rope_scaling",
                json!({"type": "linear", "factor": 2.0}),
                "rope type 'linear' is not supported",
            ),
            (
                "rope_scaling",
                json!({"factor": 2.0}),
                "rope type '(none given)'",
            ),
            (
                "rope_scaling",
                json!({"type": "longrope", "short_factor": ([1.0; 8])}),
                "'rope_scaling.long_factor' is missing",
            ),
            (
                "rope_scaling",
                json!({"type": "longrope", "short_factor": ([1.0; 7]), "long_factor": ([1.0; 8])}),
                "8 factors (head_dim / 2), not 7",
            ),
            (
                "rope_scaling",
                json!({"type": "longrope", "short_factor": ([1.0; 8]), "long_factor": ([0.0; 8])}),
                "8 positive finite factors",
            ),
            (
                "rope_scaling",
                json!({"type": "longrope", "short_factor": (["a"; 8]), "long_factor": ([1.0; 8])}),
                "8 positive finite factors",
            ),
            (
                "max_position_embeddings",
                json!(0),
                "'max_position_embeddings' is 0",
            ),
            (
                "tie_word_embeddings",
                json!(1),
                "'tie_word_embeddings' is 1",
            ),
        ];
        for (field, value, expected) in cases {
            let mut config = mini();
            config[field] = value;
            let error = read(&config).expect_err(field).to_string();
            assert!(
                error.contains(expected) && error.starts_with("config.json"),
                "{error}\nexpected: {expected}"
            );
        }
        for text in ["", "[]", "{", "nonsense"] {
            assert!(matches!(
                Config::from_json(Path::new("c"), text.as_bytes()),
                Err(ConfigError::Json { .. })
            ));
        }
    }

    #[test]
    fn both_spellings_of_the_scaling_are_read() {
        let old = read(&mini()).unwrap();
        let mut new = mini();
        let mut parameters = new["rope_scaling"].take();
        parameters["rope_type"] = json!("longrope");
        parameters["rope_theta"] = json!(10000.0);
        new["rope_parameters"] = parameters;
        assert_eq!(read(&new).unwrap(), old);
    }
}
