//! The published shapes.

use crate::config::PreprocessorConfig;
use crate::family::Family;
use crate::format::WeightFormat;
use serde_json::{Map, Value, json};
use std::fmt;
use std::str::FromStr;

/// A model of the family: its name and what differs in its `config.json`.
///
/// Source: the `config.json` of `microsoft/Phi-3-mini-4k-instruct`, `Phi-3-mini-128k-instruct`,
/// `Phi-3-medium-4k-instruct`, `Phi-3-medium-128k-instruct`, `Phi-3.5-mini-instruct`,
/// `Phi-3-small-8k-instruct`, `Phi-3-small-128k-instruct`, `Phi-3.5-MoE-instruct`,
/// `Phi-3-vision-128k-instruct` and `Phi-3.5-vision-instruct` on <https://huggingface.co>.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    pub(super) name: &'static str,
    pub(super) family: Family,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) original_positions: usize,
    pub(super) sliding_window: usize,
    /// Key in `longrope.json`, for those that extend the original length.
    pub(super) factors: Option<&'static str>,
}

const MINI_4K: Preset = Preset {
    name: "phi-3-mini-4k",
    family: Family::Phi3,
    hidden_size: 3072,
    intermediate_size: 8192,
    layers: 32,
    heads: 32,
    kv_heads: 32,
    max_position_embeddings: 4096,
    original_positions: 4096,
    sliding_window: 2047,
    factors: None,
};

const MEDIUM_4K: Preset = Preset {
    name: "phi-3-medium-4k",
    hidden_size: 5120,
    intermediate_size: 17_920,
    layers: 40,
    heads: 40,
    kv_heads: 10,
    ..MINI_4K
};

const MINI_128K: Preset = Preset {
    name: "phi-3-mini-128k",
    max_position_embeddings: 131_072,
    sliding_window: 262_144,
    factors: Some("mini-128k"),
    ..MINI_4K
};

const MEDIUM_128K: Preset = Preset {
    name: "phi-3-medium-128k",
    max_position_embeddings: 131_072,
    sliding_window: 131_072,
    factors: Some("3.5-mini"),
    ..MEDIUM_4K
};

const MINI_35: Preset = Preset {
    name: "phi-3.5-mini",
    factors: Some("3.5-mini"),
    ..MINI_128K
};

pub(super) const SMALL_8K: Preset = Preset {
    name: "phi-3-small-8k",
    family: Family::Phi3Small,
    hidden_size: 4096,
    intermediate_size: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    max_position_embeddings: 8192,
    original_positions: 8192,
    ..MINI_4K
};

const SMALL_128K: Preset = Preset {
    name: "phi-3-small-128k",
    max_position_embeddings: 131_072,
    factors: Some("3.5-mini"),
    ..SMALL_8K
};

const VISION: Preset = Preset {
    name: "phi-3-vision",
    family: Family::Phi3V,
    sliding_window: 131_072,
    ..MINI_128K
};

const VISION_35: Preset = Preset {
    name: "phi-3.5-vision",
    factors: Some("3.5-mini"),
    ..VISION
};

const MOE_35: Preset = Preset {
    name: "phi-3.5-moe",
    family: Family::PhiMoe,
    hidden_size: 4096,
    intermediate_size: 6400,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    max_position_embeddings: 131_072,
    sliding_window: 131_072,
    factors: Some("3.5-mini"),
    ..MINI_4K
};

const BOS: u32 = 1;
const PAD: u32 = 32_000;
/// Phi-3-small's end of a text, which is its beginning too, and of a turn.
const SMALL_ENDS: [u32; 2] = [100_257, 100_266];

/// LongRoPE factors, one for each pair of dimensions of a head of 96.
///
/// `mini-128k` and `3.5-mini` are the published numbers (the former as revised in July 2024).
/// Those of Phi-3-medium-128k, Phi-3-small-128k and Phi-3.5-MoE were not at hand; they get those of
/// 3.5-mini, stretched from 48 to 64 by linear interpolation; the vision models have those of the text models
/// beside them. They are as smooth and as large, and no speed depends on them.
const LONGROPE: &str = include_str!("longrope.json");

impl Preset {
    /// Every preset there is.
    pub const ALL: [Self; 10] = [
        MINI_4K,
        MINI_128K,
        MEDIUM_4K,
        MEDIUM_128K,
        MINI_35,
        SMALL_8K,
        SMALL_128K,
        MOE_35,
        VISION,
        VISION_35,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Layers of the published model.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// `config.json`, with the fields of the published ones.
    pub(super) fn config(&self, layers: usize, format: WeightFormat) -> Value {
        let dtype = match format {
            WeightFormat::F32 => "float32",
            _ => "bfloat16",
        };
        match self.family {
            Family::Phi3 => self.phi3(layers, dtype),
            Family::Phi3Small => self.phi3small(layers, dtype),
            Family::Phi3V => self.phi3v(layers, dtype),
            Family::PhiMoe => self.phimoe(layers, dtype),
        }
    }

    fn phi3small(&self, layers: usize, dtype: &str) -> Value {
        let mut rope_scaling = self.rope_scaling();
        if rope_scaling.is_object() {
            rope_scaling["original_max_position_embeddings"] = self.original_positions.into();
        }
        json!({
            "architectures": ["Phi3SmallForCausalLM"],
            "attention_dropout_prob": 0.0,
            "blocksparse_block_size": 64,
            "blocksparse_homo_head_pattern": false,
            "blocksparse_num_local_blocks": 16,
            "blocksparse_triton_kernel_block_size": 64,
            "blocksparse_vert_stride": 8,
            "bos_token_id": SMALL_ENDS[0],
            "dense_attention_every_n_layers": 2,
            "embedding_dropout_prob": 0.1,
            "eos_token_id": SMALL_ENDS[0],
            "ff_dim_multiplier": null,
            "ff_intermediate_size": self.intermediate_size,
            "ffn_dropout_prob": 0.1,
            "gegelu_limit": 20.0,
            "gegelu_pad_to_256": true,
            "hidden_act": "gegelu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "phi3small",
            "mup_attn_multiplier": 1.0,
            "mup_embedding_multiplier": 10.0,
            "mup_use_scaling": true,
            "mup_width_multiplier": 8.0,
            "num_attention_heads": self.heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": self.kv_heads,
            "pad_sequence_to_multiple_of_64": true,
            "reorder_and_upcast_attn": false,
            "rope_embedding_base": 1_000_000,
            "rope_position_scale": 1.0,
            "rope_scaling": rope_scaling,
            "torch_dtype": dtype,
            "transformers_version": "4.38.1",
            "use_cache": true,
            "vocab_size": 100_352,
        })
    }

    fn phi3v(&self, layers: usize, dtype: &str) -> Value {
        let mut config = self.phi3(layers, dtype);
        config["architectures"] = json!(["Phi3VForCausalLM"]);
        config["model_type"] = json!("phi3_v");
        config["embd_layer"] = json!({
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": true,
            "with_learnable_separator": true,
        });
        config["img_processor"] = json!({
            "image_dim_out": 1024,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        });
        config
    }

    /// `preprocessor_config.json`, for those that see pictures.
    pub(super) fn preprocessor(&self) -> Option<Value> {
        let own = PreprocessorConfig::default();
        (self.family == Family::Phi3V).then(|| {
            json!({
                "image_mean": own.image_mean,
                "image_processor_type": "Phi3VImageProcessor",
                "image_std": own.image_std,
                "num_crops": own.num_crops,
                "num_img_tokens": 144,
                "processor_class": "Phi3VProcessor",
            })
        })
    }

    fn phi3(&self, layers: usize, dtype: &str) -> Value {
        json!({
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "embd_pdrop": 0.0,
            "eos_token_id": PAD,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "phi3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": self.kv_heads,
            "original_max_position_embeddings": self.original_positions,
            "pad_token_id": PAD,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-5,
            "rope_scaling": self.rope_scaling(),
            "rope_theta": 10_000.0,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": false,
            "torch_dtype": dtype,
            "transformers_version": "4.41.2",
            "use_cache": true,
            "vocab_size": 32_064,
        })
    }

    fn phimoe(&self, layers: usize, dtype: &str) -> Value {
        const MSCALE: f64 = 1.243163121016122;
        let mut rope_scaling = self.rope_scaling();
        rope_scaling["long_mscale"] = MSCALE.into();
        rope_scaling["original_max_position_embeddings"] = self.original_positions.into();
        rope_scaling["short_mscale"] = MSCALE.into();
        json!({
            "architectures": ["PhiMoEForCausalLM"],
            "attention_bias": true,
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "eos_token_id": PAD,
            "hidden_act": "silu",
            "hidden_dropout": 0.0,
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "input_jitter_noise": 0.01,
            "intermediate_size": self.intermediate_size,
            "lm_head_bias": true,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "phimoe",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 2,
            "num_hidden_layers": layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": 16,
            "original_max_position_embeddings": self.original_positions,
            "output_router_logits": false,
            "rms_norm_eps": 1e-5,
            "rope_scaling": rope_scaling,
            "rope_theta": 10_000.0,
            "router_aux_loss_coef": 0.0,
            "router_jitter_noise": 0.01,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": false,
            "torch_dtype": dtype,
            "transformers_version": "4.43.3",
            "use_cache": true,
            "vocab_size": 32_064,
        })
    }

    fn rope_scaling(&self) -> Value {
        let Some(key) = self.factors else {
            return Value::Null;
        };
        let lists: Value = serde_json::from_str(LONGROPE).expect("the file beside this one");
        let count = self.hidden_size / self.heads / 2;
        let stretched = |name: &str| {
            let list: Vec<f64> = (lists[key][name].as_array().into_iter().flatten())
                .filter_map(Value::as_f64)
                .collect();
            let last = list.len() - 1;
            let at = |i: usize| {
                // Exactly `list[i]` when the count is the list's.
                let (whole, part) = (i * last / (count - 1), i * last % (count - 1));
                let next = list[(whole + 1).min(last)];
                list[whole] + (next - list[whole]) * part as f64 / (count - 1) as f64
            };
            json!((0..count).map(at).collect::<Vec<_>>())
        };
        let mut scaling = Map::new();
        for name in ["long_factor", "short_factor"] {
            scaling.insert(name.into(), stretched(name));
        }
        scaling.insert("type".into(), "longrope".into());
        Value::Object(scaling)
    }
}

/// `generation_config.json`: an answer ends with `<|end|>`, a new turn or the end of the text.
pub(super) fn generation(family: Family) -> Value {
    match family {
        Family::Phi3 | Family::PhiMoe | Family::Phi3V => json!({
            "_from_model_config": true,
            "bos_token_id": BOS,
            "eos_token_id": [32_007, 32_001, PAD],
            "pad_token_id": PAD,
            "transformers_version": "4.41.2",
        }),
        Family::Phi3Small => json!({
            "_from_model_config": true,
            "bos_token_id": SMALL_ENDS[0],
            "eos_token_id": SMALL_ENDS,
            "transformers_version": "4.38.1",
        }),
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A name that is not a preset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown preset '{found}'; expected one of {}", Preset::ALL.map(|p| p.name).join(", "))]
pub struct UnknownPreset {
    /// The name.
    pub found: String,
}

impl FromStr for Preset {
    type Err = UnknownPreset;
    fn from_str(s: &str) -> Result<Self, UnknownPreset> {
        (Self::ALL.into_iter())
            .find(|p| p.name == s)
            .ok_or_else(|| UnknownPreset {
                found: s.to_owned(),
            })
    }
}
