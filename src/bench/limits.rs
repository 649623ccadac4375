//! What a speed is a share of.
//!
//! The limit is that of the table in use, for the tokens of the test: the fastest instruction that such a
//! table can have, by name, since a share of it says nothing of those beyond the table.

use super::Peaks;
use phidias_engine::Isa;
use phidias_engine::kernels::cpu::peak::Number;
use serde::Serialize;
use std::fmt;

/// The limits of a table of kernels, or of a device, at some time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// GB/s from memory.
    pub read_gb_s: f64,
    /// Gop/s with bytes.
    pub int8_gop_s: f64,
    /// Gop/s with bf16; 0 where no instruction multiplies it.
    pub bf16_gop_s: f64,
    /// Gop/s with f32.
    pub f32_gop_s: f64,
}

impl Limits {
    /// Those of a table of `isa`, or of a device.
    #[must_use]
    pub fn of(peaks: &Peaks, isa: Option<Isa>) -> Self {
        Self {
            read_gb_s: peaks.read_gb_s(),
            int8_gop_s: peaks.gop_s(Number::Int8, isa),
            bf16_gop_s: peaks.gop_s(Number::Bf16, isa),
            f32_gop_s: peaks.gop_s(Number::F32, isa),
        }
    }
}

/// The limits before and after.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Around {
    /// Just before.
    pub before: Limits,
    /// Just after.
    pub after: Limits,
}

impl Around {
    /// Those of a table of `isa`, or of a device.
    #[must_use]
    pub fn of(before: &Peaks, after: &Peaks, isa: Option<Isa>) -> Self {
        Self {
            before: Limits::of(before, isa),
            after: Limits::of(after, isa),
        }
    }

    /// The mean of the two.
    #[must_use]
    pub fn mean(&self, limit: impl Fn(&Limits) -> f64) -> f64 {
        (limit(&self.before) + limit(&self.after)) / 2.0
    }
}

/// A limit of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Reading memory.
    Memory,
    /// Multiplying bytes.
    Int8,
    /// Multiplying bf16.
    Bf16,
    /// Multiplying f32.
    F32,
}

impl From<Number> for Limit {
    fn from(number: Number) -> Self {
        match number {
            Number::Int8 => Self::Int8,
            Number::Bf16 => Self::Bf16,
            Number::F32 => Self::F32,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}

/// The fastest way to multiply a kind of number.
#[derive(Clone, Debug, PartialEq)]
pub struct Roof {
    /// The numbers.
    pub number: Limit,
    /// The instruction.
    pub instruction: String,
    /// Gop/s, mean of before and after.
    pub gop_s: f64,
}

impl Roof {
    /// That of a table of `isa`, or of a device.
    /// # Panics
    /// When the table cannot multiply them.
    #[must_use]
    pub fn of(before: &Peaks, after: &Peaks, isa: Option<Isa>, number: Number) -> Self {
        (before.loops(number).iter().zip(after.loops(number)))
            .filter(|(peak, _)| peak.limits(isa))
            .map(|(before, after)| Self {
                number: number.into(),
                instruction: before.variant.clone(),
                gop_s: (before.rate.median + after.rate.median) / 2.0,
            })
            .max_by(|a, b| a.gop_s.total_cmp(&b.gop_s))
            .unwrap_or_else(|| panic!("{isa:?} has no instruction for {}", number.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Peak, Spread};

    #[test]
    fn the_roof_is_the_best_of_before_and_after_that_the_table_can_have() {
        let peak = |variant: &str, isa, rate: f64| Peak {
            variant: variant.to_owned(),
            rate: Spread::of(&[rate]).unwrap(),
            isa: Some(isa),
        };
        let peaks = |wide, narrow| Peaks {
            threads: 1,
            buffer_bytes: 0,
            read: Vec::new(),
            int8: vec![
                peak("tiles", Isa::Amx, 7000.0),
                peak("wide", Isa::Avx512, wide),
                peak("narrow", Isa::AvxVnni, narrow),
            ],
            bf16: Vec::new(),
            f32: Vec::new(),
        };
        let (before, after) = (peaks(1000.0, 900.0), peaks(800.0, 850.0));
        let roof = |isa| {
            let roof = Roof::of(&before, &after, isa, Number::Int8);
            (roof.instruction, roof.gop_s)
        };
        assert_eq!(roof(Some(Isa::Avx512)), ("wide".to_owned(), 900.0));
        assert_eq!(roof(Some(Isa::AvxVnni)), ("narrow".to_owned(), 875.0));
        assert_eq!(roof(Some(Isa::Amx)), ("tiles".to_owned(), 7000.0));
        assert_eq!(roof(None).1, 7000.0);
        let around = Around::of(&before, &after, Some(Isa::AvxVnni));
        assert_eq!(around.mean(|l| l.int8_gop_s), 875.0);
    }
}
