//! `phi3small`: Phi-3-small, 8k and 128k.
//!
//! What is particular:
//! * `query_key_value` has its rows grouped: for each KV head its query heads, its key, its value;
//! * every other layer sees blocks only: the local ones, and vertical strides whose offset differs from
//!   head to head ([`phidias_engine::mask`]);
//! * the MLP is a GEGELU, `a * sigmoid(1.702 a) * (b + 1)` with `a` and `b` clamped, of the even and the odd
//!   rows of one matrix;
//! * LayerNorm, and biases everywhere but in the head, which is the embedding table;
//! * the factors of muP (Yang et al. 2022): on the embedded tokens, on the scores (over `head_dim`, not
//!   its root), on the logits;
//! * ids without a token never win.

use crate::blocks::attention::Attention;
use crate::blocks::mlp::Mlp;
use crate::config::{Config, ConfigError, Fields, Keys, SparseLayers};
use crate::family::Family;
use crate::transformer::{FeedForward, Layer, Transformer};
use crate::weights::{Role, Spec, Weights, ends};
use phidias_engine::backend::{GateUp, HeadOrder};
use phidias_engine::checkpoint::CheckpointError;
use phidias_engine::mask::{BLOCK, BlockSparse};
use std::ops::Range;

const NORM: &str = "model.final_layernorm";

/// Ids of the published vocabulary that stand for nothing: the model's code gives them the lowest logit.
const UNUSED_IDS: [Range<usize>; 4] = [
    100_256..100_257,
    100_258..100_261,
    100_264..100_266,
    100_267..100_352,
];

pub(crate) fn configure(f: &Fields<'_>) -> Result<Config, ConfigError> {
    let keys = Keys {
        intermediate_size: "ff_intermediate_size",
        norm_eps: "layer_norm_epsilon",
        rope_theta: "rope_embedding_base",
        hidden_act: "gegelu",
        tied: true,
        original_in_scaling: false,
    };
    let mut c = Config::common(f, Family::Phi3Small, &keys)?;
    if f.value("ff_dim_multiplier").is_some() {
        return f.wrong("ff_dim_multiplier", "null beside ff_intermediate_size");
    }
    let factor = |name: &str, default: f64| {
        let given = f.number(name, 1e-6..=1e6)?;
        Ok(given.unwrap_or(default) as f32)
    };
    c.sliding_window = None;
    c.block_sparse = block_sparse(f, c.num_attention_heads)?;
    if f.value("rope_embedding_base").is_none() {
        c.rope.theta = 1e6;
    }
    c.rope.position_scale = factor("rope_position_scale", 1.0)?;
    if f.flag("mup_use_scaling")?.unwrap_or(true) {
        c.attention_scale = factor("mup_attn_multiplier", 1.0)? / c.head_dim as f32;
    }
    c.embedding_multiplier = factor("mup_embedding_multiplier", 10.0)?;
    c.logits_divisor = factor("mup_width_multiplier", 8.0)?;
    c.gegelu_limit = match f.value("gegelu_limit") {
        None => f32::INFINITY,
        Some(_) => factor("gegelu_limit", 20.0)?,
    };
    c.unused_ids = (UNUSED_IDS.into_iter())
        .map(|ids| ids.start..ids.end.min(c.vocab_size))
        .filter(|ids| !ids.is_empty())
        .collect();
    Ok(c)
}

fn block_sparse(f: &Fields<'_>, heads: usize) -> Result<Option<SparseLayers>, ConfigError> {
    const BLOCK_SIZE: &str = "blocksparse_block_size";
    const KERNEL_SIZE: &str = "blocksparse_triton_kernel_block_size";
    let counted = |name: &str, default: usize, least: usize| {
        Ok(f.count(name, least..=1 << 20)?.unwrap_or(default))
    };
    let block = counted(BLOCK_SIZE, 64, 0)?;
    if block < 16 || !BLOCK.is_multiple_of(block) {
        return f.wrong(BLOCK_SIZE, "16, 32, 64, 128 or 256");
    }
    // Does not change what is computed, but a size that does not fit is no such model's.
    let kernel = counted(KERNEL_SIZE, block, 0)?;
    if kernel < 16 || !block.is_multiple_of(kernel) {
        let expected = format!("a divisor of {BLOCK_SIZE} {block}, at least 16");
        return f.wrong(KERNEL_SIZE, expected);
    }
    let alike = BlockSparse {
        block,
        local_blocks: counted("blocksparse_num_local_blocks", 16, 1)?,
        vert_stride: counted("blocksparse_vert_stride", 8, 1)?,
        head_step: 0,
    };
    let homogeneous = f.flag("blocksparse_homo_head_pattern")?.unwrap_or(false);
    // 0 means that no layer is dense.
    let dense_every = counted("dense_attention_every_n_layers", 2, 0)?;
    Ok(Some(SparseLayers {
        layout: if homogeneous {
            alike
        } else {
            alike.with_offsets(heads)
        },
        dense_every: Some(dense_every).filter(|n| *n > 0),
    }))
}

/// Every tensor that a checkpoint of this configuration has.
#[must_use]
pub(crate) fn specs(c: &Config) -> Vec<Spec> {
    let heads = c.heads(HeadOrder::Groups);
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let norm = |name: String| {
        [
            Spec::new(format!("{name}.weight"), &[hidden], Role::Norm),
            Spec::new(format!("{name}.bias"), &[hidden], Role::Bias),
        ]
    };
    let linear = |name: String, rows, cols| {
        [
            Spec::new(format!("{name}.weight"), &[rows, cols], Role::Matrix),
            Spec::new(format!("{name}.bias"), &[rows], Role::Bias),
        ]
    };
    let mut specs = ends(c);
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        let qkv = format!("{p}.self_attn.query_key_value");
        specs.extend(norm(format!("{p}.input_layernorm")));
        specs.extend(linear(qkv, heads.columns(), hidden));
        specs.extend(linear(
            format!("{p}.self_attn.dense"),
            hidden,
            heads.queries(),
        ));
        specs.extend(norm(format!("{p}.post_attention_layernorm")));
        specs.extend(linear(format!("{p}.mlp.up_proj"), 2 * inner, hidden));
        specs.extend(linear(format!("{p}.mlp.down_proj"), hidden, inner));
    }
    specs.extend(norm(NORM.to_owned()));
    specs
}

pub(crate) fn load(c: &Config, weights: &Weights<'_>) -> Result<Transformer, CheckpointError> {
    let mut layers = Vec::new();
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        let linear = |name: &str| weights.biased(&format!("{p}.{name}"));
        let norm = |name: &str| weights.layer_norm(&format!("{p}.{name}"), c.norm_eps);
        layers.push(Layer {
            input_norm: norm("input_layernorm")?,
            attention: Attention {
                qkv_proj: vec![linear("self_attn.query_key_value")?],
                o_proj: linear("self_attn.dense")?,
                heads: c.heads(HeadOrder::Groups),
                mask: c.mask(l),
                scale: c.attention_scale,
            },
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::Dense(Mlp {
                gate_up: GateUp::Interleaved {
                    both: linear("mlp.up_proj")?,
                    limit: c.gegelu_limit,
                },
                down_proj: linear("mlp.down_proj")?,
            }),
        });
    }
    weights.transformer(c, layers, weights.layer_norm(NORM, c.norm_eps)?)
}
