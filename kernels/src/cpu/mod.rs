//! Kernels on the CPU: one table per instruction set, complete, chosen once.

use phidias_quant::Format;
use std::fmt;
use std::str::FromStr;

mod activation;
mod ahead;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod check;
mod gate;
mod gemm;
#[cfg(target_arch = "aarch64")]
mod neon;
mod norm;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod packed;
pub mod peak;
#[cfg(target_arch = "x86_64")]
mod prefetch;
mod quantize;
mod rope;
mod scalar;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vector;
#[cfg(target_arch = "x86_64")]
mod vendor;

pub use attention::{AttentionState, AttentionTask, Cached, KEY_PANEL, THEN};

/// An instruction set that a table exists for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust: the definition of every kernel, for every machine.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 with the 8-bit inner products of AVX-VNNI.
    AvxVnni,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX-512 with the tiles of AMX for many tokens.
    Amx,
    /// NEON: every AArch64.
    Neon,
    /// NEON with the 8-bit inner products of the dotprod extension.
    NeonDotprod,
    /// NEON with dotprod and the 8-bit matrix products of the i8mm extension.
    NeonI8mm,
}

impl Isa {
    /// Every instruction set there is a table for, on one architecture or another, the plainest of
    /// each first.
    pub const ALL: [Self; 8] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Amx,
        Self::Neon,
        Self::NeonDotprod,
        Self::NeonI8mm,
    ];

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonDotprod => "dotprod",
            Self::NeonI8mm => "i8mm",
        }
    }

    /// Whether a table of this set can have what one of `other` has.
    #[must_use]
    pub fn includes(self, other: Self) -> bool {
        const X86: &[Isa] = &[Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx];
        const ARM: &[Isa] = &[Isa::Scalar, Isa::Neon, Isa::NeonDotprod, Isa::NeonI8mm];
        [X86, ARM].into_iter().any(|plainest_first| {
            let at = |isa| plainest_first.iter().position(|other| *other == isa);
            at(other).is_some() && at(other) <= at(self)
        })
    }

    /// Whether this CPU can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        Kernels::for_isa(self).is_some()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no table has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownIsa(String);

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known: Vec<_> = Isa::ALL.iter().map(|isa| isa.name()).collect();
        write!(
            f,
            "unknown instruction set '{}'; expected one of: {}",
            self.0,
            known.join(", ")
        )
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;
    fn from_str(s: &str) -> Result<Self, UnknownIsa> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == s)
            .ok_or_else(|| UnknownIsa(s.to_owned()))
    }
}

/// The fewest tokens that a table keeps to itself, by the format of the weights.
type Fewest = fn(Format) -> usize;

/// The kernels of one instruction set. Holding a reference proves that this CPU can run them.
///
/// The functions behind the fields are reached through the safe methods of this type, which check
/// every shape; the field types carry the contracts.
#[derive(Debug)]
pub struct Kernels {
    isa: Isa,
    gemm_q4: gemm::GemmPacked,
    gemm_q8: gemm::GemmPacked,
    panels_a_call: usize,
    /// With fewer tokens than these the packed GEMM of a format is that of another table.
    few_tokens: Option<(Fewest, Isa)>,
    scratch_bytes: usize,
    gemm_f32: gemm::GemmDense<f32>,
    gemm_f16: gemm::GemmDense<phidias_quant::f16>,
    gemm_bf16: gemm::GemmDense<phidias_quant::bf16>,
    quantize: quantize::Quantize,
    rms_norm: norm::RmsNorm,
    layer_norm: norm::LayerNorm,
    rope: rope::Rope,
    silu_mul: gate::Gate,
    gegelu: gate::Gegelu,
    quick_gelu: activation::Activation,
    gelu: activation::Activation,
    attend_f32: attention::Attend<f32>,
    attend_f16: attention::Attend<phidias_quant::f16>,
    attend_bf16: attention::Attend<phidias_quant::bf16>,
    attend_i8: attention::AttendI8,
    merge: attention::Merge,
}

impl Kernels {
    /// The table of `isa`, if this CPU has its features.
    #[must_use]
    pub fn for_isa(isa: Isa) -> Option<&'static Self> {
        match isa {
            Isa::Scalar => Some(&scalar::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::table(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx2::vnni_table(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::table(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => amx::table(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Amx => None,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::table(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => neon::dotprod_table(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => neon::i8mm_table(),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm => None,
        }
    }

    /// The fastest table that this CPU can run.
    #[must_use]
    pub fn best() -> &'static Self {
        Isa::ALL
            .into_iter()
            .rev()
            .find_map(Self::for_isa)
            .unwrap_or(&scalar::KERNELS)
    }

    /// Its instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The instruction set whose limits are those of a pass with so many tokens: its own, or a plainer
    /// one where it leaves few tokens of weights in that format to it.
    #[must_use]
    pub fn isa_for(&self, format: Option<Format>, tokens: usize) -> Isa {
        match (self.few_tokens, format) {
            (Some((fewest, isa)), Some(format)) if tokens < fewest(format) => isa,
            _ => self.isa,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_set_includes_the_plainer_ones_of_its_architecture() {
        for isa in Isa::ALL {
            assert!(isa.includes(isa) && isa.includes(Isa::Scalar), "{isa}");
        }
        assert!(Isa::Amx.includes(Isa::Avx512) && !Isa::Avx512.includes(Isa::Amx));
        assert!(Isa::Avx512.includes(Isa::AvxVnni) && !Isa::Avx2.includes(Isa::AvxVnni));
        assert!(Isa::NeonI8mm.includes(Isa::Neon) && !Isa::Scalar.includes(Isa::Neon));
        assert!(!Isa::NeonI8mm.includes(Isa::Avx2) && !Isa::Amx.includes(Isa::Neon));
    }

    #[test]
    fn few_tokens_have_the_limits_of_the_table_that_they_are_left_to() {
        for isa in Isa::ALL {
            let Some(kernels) = Kernels::for_isa(isa) else {
                continue;
            };
            let few = match isa {
                Isa::Amx => Isa::Avx512,
                _ => isa,
            };
            for (format, fewest) in [(Format::Q4, 16), (Format::Q8, 32)] {
                let of = [1, fewest - 1, fewest, 512]
                    .map(|tokens| kernels.isa_for(Some(format), tokens));
                assert_eq!(of, [few, few, isa, isa], "{format:?}");
            }
            assert_eq!(kernels.isa_for(None, 1), isa);
        }
    }
}
