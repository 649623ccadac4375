//! `phi3`: Phi-3-mini and medium, 4k and 128k, and Phi-3.5-mini.
//!
//! What is particular: `qkv_proj` and `gate_up_proj` are fused, nothing has a bias, RMSNorm, a
//! SiLU gate, and a sliding window on the 4k models.

use crate::blocks::attention::Attention;
use crate::blocks::mlp::Mlp;
use crate::blocks::norm::RmsNorm;
use crate::blocks::rope::Rope;
use crate::config::Config;
use crate::transformer::{Layer, Transformer};
use phidias_engine::backend::{Heads, Mask};
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::kv_cache::KvShape;
use phidias_engine::tensor::Matrix;

/// Name of the embedding table.
pub const EMBED: &str = "model.embed_tokens.weight";
/// Name of the head.
pub const HEAD: &str = "lm_head.weight";

/// What role a tensor plays: the one table of what may be stored in fewer bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Multiplied with every token: takes the asked format.
    Matrix,
    /// The embedding table: a row is looked up, so its size does not cost time; kept.
    Embedding,
    /// Norm weights: tiny and sensitive; kept.
    Norm,
}

/// A tensor of the model: name, shape, role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its role.
    pub role: Role,
}

/// Every tensor that a checkpoint of this configuration has.
#[must_use]
pub fn specs(c: &Config) -> Vec<Spec> {
    let heads = heads(c);
    let spec = |name: String, shape: &[usize], role| Spec {
        name,
        shape: shape.to_vec(),
        role,
    };
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let mut specs = vec![spec(EMBED.into(), &[c.vocab_size, hidden], Role::Embedding)];
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        specs.extend([
            spec(format!("{p}.input_layernorm.weight"), &[hidden], Role::Norm),
            spec(
                format!("{p}.self_attn.qkv_proj.weight"),
                &[heads.queries() + 2 * heads.keys(), hidden],
                Role::Matrix,
            ),
            spec(
                format!("{p}.self_attn.o_proj.weight"),
                &[hidden, heads.queries()],
                Role::Matrix,
            ),
            spec(
                format!("{p}.post_attention_layernorm.weight"),
                &[hidden],
                Role::Norm,
            ),
            spec(
                format!("{p}.mlp.gate_up_proj.weight"),
                &[2 * inner, hidden],
                Role::Matrix,
            ),
            spec(
                format!("{p}.mlp.down_proj.weight"),
                &[hidden, inner],
                Role::Matrix,
            ),
        ]);
    }
    specs.push(spec("model.norm.weight".into(), &[hidden], Role::Norm));
    if !c.tie_word_embeddings {
        specs.push(spec(HEAD.into(), &[c.vocab_size, hidden], Role::Matrix));
    }
    specs
}

fn heads(c: &Config) -> Heads {
    Heads {
        heads: c.num_attention_heads,
        kv_heads: c.num_key_value_heads,
        head_dim: c.head_dim,
    }
}

/// The shape of the KV cache.
#[must_use]
pub fn kv_shape(c: &Config) -> KvShape {
    KvShape {
        layers: c.num_hidden_layers,
        kv_heads: c.num_key_value_heads,
        head_dim: c.head_dim,
    }
}

/// Takes the weights from a checkpoint; nothing is copied but the norms.
/// # Errors
/// A tensor that is missing or has another shape than the configuration says.
pub fn load(c: &Config, checkpoint: &Checkpoint) -> Result<Transformer, CheckpointError> {
    let matrix = |name: &str, rows: usize, cols: usize| {
        let tensor = checkpoint.tensor(name, &[rows, cols])?;
        Ok::<_, CheckpointError>(Matrix::new(tensor).expect("two dimensions"))
    };
    let norm = |name: &str| RmsNorm::load(checkpoint, name, c.hidden_size, c.rms_norm_eps);
    let heads = heads(c);
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let mut layers = Vec::new();
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        layers.push(Layer {
            input_norm: norm(&format!("{p}.input_layernorm.weight"))?,
            attention: Attention {
                qkv_proj: matrix(
                    &format!("{p}.self_attn.qkv_proj.weight"),
                    heads.queries() + 2 * heads.keys(),
                    hidden,
                )?,
                o_proj: matrix(
                    &format!("{p}.self_attn.o_proj.weight"),
                    hidden,
                    heads.queries(),
                )?,
                heads,
                mask: Mask {
                    window: c.sliding_window,
                },
                scale: 1.0 / (c.head_dim as f32).sqrt(),
            },
            post_attention_norm: norm(&format!("{p}.post_attention_layernorm.weight"))?,
            mlp: Mlp {
                gate_up_proj: matrix(&format!("{p}.mlp.gate_up_proj.weight"), 2 * inner, hidden)?,
                down_proj: matrix(&format!("{p}.mlp.down_proj.weight"), hidden, inner)?,
            },
        });
    }
    // A tied head that was quantized stands on its own in the prepacked file.
    let head = if c.tie_word_embeddings && checkpoint.get(HEAD).is_none() {
        EMBED
    } else {
        HEAD
    };
    Ok(Transformer {
        embed_tokens: matrix(EMBED, c.vocab_size, hidden)?,
        layers,
        norm: norm("model.norm.weight")?,
        lm_head: matrix(head, c.vocab_size, hidden)?,
        rope: Rope::new(c),
    })
}
