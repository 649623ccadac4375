//! `phimoe`: Phi-3.5-MoE.
//!
//! What is particular: LayerNorm with biases, biases on attention and head where the configuration asks
//! for them, `q_proj`, `k_proj` and `v_proj` on their own, sixteen experts of which a token uses two, and
//! LongRoPE with multipliers of its own (`short_mscale`, `long_mscale`) and the original length inside
//! `rope_scaling`.

use crate::blocks::attention::Attention;
use crate::blocks::moe::Moe;
use crate::config::{Config, ConfigError, Fields, Keys, MoeConfig};
use crate::family::Family;
use crate::transformer::{FeedForward, Layer, Transformer};
use crate::weights::{Role, Spec, Weights, ends};
use phidias_engine::backend::{Expert, GateUp, HeadOrder, PICKS};
use phidias_engine::checkpoint::CheckpointError;

const NORM: &str = "model.norm";

pub(crate) fn configure(f: &Fields<'_>) -> Result<Config, ConfigError> {
    let experts = f.required("num_local_experts", 1..=1 << 10)?;
    let picks = f.required("num_experts_per_tok", 1..=1 << 10)?;
    if picks > experts {
        return f.wrong(
            "num_experts_per_tok",
            format!("at most num_local_experts, {experts}"),
        );
    }
    if picks != PICKS {
        return f.wrong(
            "num_experts_per_tok",
            format!("{PICKS} (sparsemixer picks two)"),
        );
    }
    // Distances are shares of at most 2 of the best score.
    let jitter = f.number("router_jitter_noise", 0.0..=1.0)?.unwrap_or(0.01);
    let common = Config::common(
        f,
        Family::PhiMoe,
        &Keys {
            original_in_scaling: true,
            ..Keys::PHI3
        },
    )?;
    Ok(Config {
        attention_bias: f.flag("attention_bias")?.unwrap_or(false),
        lm_head_bias: f.flag("lm_head_bias")?.unwrap_or(false),
        moe: Some(MoeConfig {
            experts,
            jitter: jitter as f32,
        }),
        ..common
    })
}

/// Its mixture: [`configure`] always gives one.
fn moe(c: &Config) -> MoeConfig {
    c.moe.expect("a configuration of this family")
}

/// Every tensor that a checkpoint of this configuration has.
#[must_use]
pub(crate) fn specs(c: &Config) -> Vec<Spec> {
    let heads = c.heads(HeadOrder::Parts);
    let (hidden, inner, experts) = (c.hidden_size, c.intermediate_size, moe(c).experts);
    let bias = |name: &str, len| Spec::new(format!("{name}.bias"), &[len], Role::Bias);
    let mut specs = ends(c);
    let norm = |specs: &mut Vec<Spec>, name: &str| {
        specs.push(Spec::new(format!("{name}.weight"), &[hidden], Role::Norm));
        specs.push(bias(name, hidden));
    };
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        norm(&mut specs, &format!("{p}.input_layernorm"));
        for (name, rows, cols) in [
            ("q_proj", heads.queries(), hidden),
            ("k_proj", heads.keys(), hidden),
            ("v_proj", heads.keys(), hidden),
            ("o_proj", hidden, heads.queries()),
        ] {
            let name = format!("{p}.self_attn.{name}");
            let weight = format!("{name}.weight");
            specs.push(Spec::new(weight, &[rows, cols], Role::Matrix));
            if c.attention_bias {
                specs.push(bias(&name, rows));
            }
        }
        norm(&mut specs, &format!("{p}.post_attention_layernorm"));
        let p = format!("{p}.block_sparse_moe");
        let gate = format!("{p}.gate.weight");
        specs.push(Spec::new(gate, &[experts, hidden], Role::Router));
        for e in 0..experts {
            for (name, rows, cols) in [
                ("w1", inner, hidden),
                ("w3", inner, hidden),
                ("w2", hidden, inner),
            ] {
                let name = format!("{p}.experts.{e}.{name}.weight");
                specs.push(Spec::new(name, &[rows, cols], Role::Expert));
            }
        }
    }
    norm(&mut specs, NORM);
    specs
}

pub(crate) fn load(c: &Config, weights: &Weights<'_>) -> Result<Transformer, CheckpointError> {
    let MoeConfig { experts, jitter } = moe(c);
    let mut layers = Vec::new();
    for l in 0..c.num_hidden_layers {
        let p = format!("model.layers.{l}");
        let norm = |name: &str| weights.layer_norm(&format!("{p}.{name}"), c.norm_eps);
        let attention = format!("{p}.self_attn");
        let projection = |name: &str| match c.attention_bias {
            true => weights.biased(name),
            false => weights.linear(name),
        };
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| format!("{attention}.{name}"));
        let qkv = weights.of_one_input([&q, &k, &v], projection)?;
        let moe = format!("{p}.block_sparse_moe");
        let expert = |e: usize| -> Result<Expert, CheckpointError> {
            let [w1, w2, w3] = ["w1", "w2", "w3"].map(|name| format!("{moe}.experts.{e}.{name}"));
            let [gate, up] = weights.of_one_input([&w1, &w3], |name| weights.linear(name))?;
            Ok(Expert {
                gate_up: GateUp::Pair { gate, up },
                down_proj: weights.linear(&w2)?,
            })
        };
        layers.push(Layer {
            input_norm: norm("input_layernorm")?,
            attention: Attention {
                qkv_proj: qkv.into(),
                o_proj: projection(&format!("{attention}.o_proj"))?,
                heads: c.heads(HeadOrder::Parts),
                mask: c.mask(l),
                scale: c.attention_scale,
            },
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::Moe(Moe {
                router: weights.linear(&format!("{moe}.gate"))?,
                experts: (0..experts).map(expert).collect::<Result<_, _>>()?,
                jitter,
            }),
        });
    }
    weights.transformer(c, layers, weights.layer_norm(NORM, c.norm_eps)?)
}
