//! `--stats json`: how the tokens of a mixture were spread over its experts.

use super::args::Stats;
use anyhow::{Result, bail};
use phidias::models::Config;
use phidias::models::blocks::moe::LayerRouting;
use serde_json::{Value, json};
use std::fmt::Display;

/// Refuses statistics of a model that has none, before anything is computed; `name` is the model's.
pub fn check(asked: Option<Stats>, config: &Config, name: impl Display) -> Result<()> {
    if asked.is_some() && config.moe.is_none() {
        bail!("--stats: {name} has no experts, so there is nothing to count");
    }
    Ok(())
}

/// `tokens_per_expert`: a list for each layer, of a number for each expert; `expert_reads`: for each layer,
/// how many experts its passes read.
pub fn routing(layers: &[LayerRouting]) -> Value {
    let tokens: Vec<_> = layers.iter().map(|layer| &layer.tokens).collect();
    let reads: Vec<_> = layers.iter().map(|layer| layer.reads).collect();
    json!({ "tokens_per_expert": tokens, "expert_reads": reads })
}
