//! What the matrices of a model are multiplied in.

use phidias_engine::Format;
use phidias_engine::kv_cache::KvType;
use std::fmt;
use std::str::FromStr;

/// What the matrices are multiplied in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// As stored, widened to f32 while multiplying; the cache in f32 too. For exact comparison.
    F32,
    /// 16-bit: bf16 (or f16 where the checkpoint has that), f32 activations.
    Bf16,
    /// int8 blocks of 32 with int8 activations.
    Q8,
    /// int4 blocks of 32 with int8 activations.
    Q4,
}

impl WeightFormat {
    /// Every format there is.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Q8, Self::Q4];

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The block format, for those that have one.
    #[must_use]
    pub fn packed(self) -> Option<Format> {
        match self {
            Self::F32 | Self::Bf16 => None,
            Self::Q8 => Some(Format::Q8),
            Self::Q4 => Some(Format::Q4),
        }
    }
}

impl WeightFormat {
    /// What the KV cache stores when nothing else is asked: f32 for exact comparison, else f16.
    #[must_use]
    pub fn default_kv_type(self) -> KvType {
        if self == Self::F32 {
            KvType::F32
        } else {
            KvType::F16
        }
    }
}

impl From<Format> for WeightFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Q4 => Self::Q4,
            Format::Q8 => Self::Q8,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is not a format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown format '{0}'; expected f32, bf16, q8 or q4")]
pub struct UnknownFormat(String);

impl FromStr for WeightFormat {
    type Err = UnknownFormat;
    fn from_str(s: &str) -> Result<Self, UnknownFormat> {
        Self::ALL
            .into_iter()
            .find(|f| f.name() == s)
            .ok_or_else(|| UnknownFormat(s.to_owned()))
    }
}
