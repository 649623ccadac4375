//! `phi3`: Phi-3-mini and medium, 4k and 128k, and Phi-3.5-mini.
//!
//! What is particular: `qkv_proj` and `gate_up_proj` are fused, nothing has a bias, RMSNorm, a
//! SiLU gate, and a sliding window on the 4k models.

use crate::blocks::attention::Attention;
use crate::blocks::mlp::Mlp;
use crate::config::{Config, ConfigError, Fields, Keys};
use crate::family::Family;
use crate::transformer::{FeedForward, Layer, Transformer};
use crate::weights::{Role, Spec, Weights, ends};
use phidias_engine::backend::{GateUp, HeadOrder};
use phidias_engine::checkpoint::CheckpointError;

const NORM: &str = "model.norm";

pub(crate) fn configure(f: &Fields<'_>) -> Result<Config, ConfigError> {
    configure_as(f, Family::Phi3)
}

/// The same fields for a family that has this one's decoder.
pub(crate) fn configure_as(f: &Fields<'_>, family: Family) -> Result<Config, ConfigError> {
    Config::common(f, family, &Keys::PHI3)
}

/// Every tensor that a checkpoint of this configuration has.
#[must_use]
pub(crate) fn specs(c: &Config) -> Vec<Spec> {
    let heads = c.heads(HeadOrder::Parts);
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let norm = |name: &str| Spec::new(format!("{name}.weight"), &[hidden], Role::Norm);
    let matrix =
        |name: String, rows, cols| Spec::new(name + ".weight", &[rows, cols], Role::Matrix);
    let mut specs = ends(c);
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        specs.extend([
            norm(&format!("{p}.input_layernorm")),
            matrix(format!("{p}.self_attn.qkv_proj"), heads.columns(), hidden),
            matrix(format!("{p}.self_attn.o_proj"), hidden, heads.queries()),
            norm(&format!("{p}.post_attention_layernorm")),
            matrix(format!("{p}.mlp.gate_up_proj"), 2 * inner, hidden),
            matrix(format!("{p}.mlp.down_proj"), hidden, inner),
        ]);
    }
    specs.push(norm(NORM));
    specs
}

pub(crate) fn load(c: &Config, weights: &Weights<'_>) -> Result<Transformer, CheckpointError> {
    let mut layers = Vec::new();
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        let linear = |name: &str| weights.linear(&format!("{p}.{name}"));
        let norm = |name: &str| weights.rms_norm(&format!("{p}.{name}"), c.norm_eps);
        layers.push(Layer {
            input_norm: norm("input_layernorm")?,
            attention: Attention {
                qkv_proj: vec![linear("self_attn.qkv_proj")?],
                o_proj: linear("self_attn.o_proj")?,
                heads: c.heads(HeadOrder::Parts),
                mask: c.mask(l),
                scale: c.attention_scale,
            },
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::Dense(Mlp {
                gate_up: GateUp::Stacked(linear("mlp.gate_up_proj")?),
                down_proj: linear("mlp.down_proj")?,
            }),
        });
    }
    weights.transformer(c, layers, weights.rms_norm(NORM, c.norm_eps)?)
}
