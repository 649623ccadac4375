//! The families of models, by `model_type`: what a new one has to say, and the one place that knows
//! them all.

use crate::config::{Config, ConfigError, Fields};
use crate::transformer::Transformer;
use crate::weights::{Role, Spec, Weights};
use crate::{phi3, phi3small, phi3v, phimoe};
use phidias_engine::checkpoint::CheckpointError;
use std::collections::HashSet;
use std::fmt;

/// A family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Phi-3-mini and medium, Phi-3.5-mini.
    Phi3,
    /// Phi-3-small.
    Phi3Small,
    /// Phi-3-vision and Phi-3.5-vision.
    Phi3V,
    /// Phi-3.5-MoE.
    PhiMoe,
}

impl Family {
    /// Every family there is.
    pub const ALL: [Self; 4] = [Self::Phi3, Self::Phi3Small, Self::PhiMoe, Self::Phi3V];

    /// Its `model_type`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Phi3 => "phi3",
            Self::Phi3Small => "phi3small",
            Self::Phi3V => "phi3_v",
            Self::PhiMoe => "phimoe",
        }
    }

    /// The family of a `model_type`.
    #[must_use]
    pub fn of(model_type: &str) -> Option<Self> {
        (Self::ALL.into_iter()).find(|family| family.name() == model_type)
    }

    /// Reads and checks the fields of its `config.json`.
    pub(crate) fn configure(self, fields: &Fields<'_>) -> Result<Config, ConfigError> {
        match self {
            Self::Phi3 => phi3::configure(fields),
            Self::Phi3Small => phi3small::configure(fields),
            Self::Phi3V => phi3v::configure(fields),
            Self::PhiMoe => phimoe::configure(fields),
        }
    }

    /// Every tensor that a checkpoint of this configuration has.
    pub(crate) fn specs(self, config: &Config) -> Vec<Spec> {
        match self {
            Self::Phi3 => phi3::specs(config),
            Self::Phi3Small => phi3small::specs(config),
            Self::Phi3V => phi3v::specs(config),
            Self::PhiMoe => phimoe::specs(config),
        }
    }

    /// The names of those of experts.
    pub(crate) fn experts(self, config: &Config) -> HashSet<String> {
        let specs = self.specs(config).into_iter();
        let experts = specs.filter(|spec| spec.role == Role::Expert);
        experts.map(|spec| spec.name).collect()
    }

    /// Takes the decoder's weights of a checkpoint; nothing is copied but norms and biases.
    pub(crate) fn load(
        self,
        config: &Config,
        weights: &Weights<'_>,
    ) -> Result<Transformer, CheckpointError> {
        match self {
            Self::Phi3 | Self::Phi3V => phi3::load(config, weights),
            Self::Phi3Small => phi3small::load(config, weights),
            Self::PhiMoe => phimoe::load(config, weights),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
