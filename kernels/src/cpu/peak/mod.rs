//! The machine's own limits: loops that only multiply in registers, or only read memory.
//!
//! Every speed of this project is a fraction of one of these, so they are kept beside the kernels
//! they judge. All that the CPU can run are measured, and each names the plainest table of kernels that
//! can have its instruction: a table is judged by the fastest of those that it could use, whether it
//! does or not, and by none that are beyond it.
//!
//! ```text
//! Maths   lane l of every accumulator:  acc[l] += sum over the products of the lane of a[i] * b[i]
//! Work    one multiply-add is two operations; nothing is loaded inside a vector loop
//! Check   the lanes of all accumulators together are rounds * products of a round, exactly: the
//!         operands are small integers, which every number type here represents
//! ```

mod portable;
mod read;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::Isa;

pub use read::{Prefetch, Reading};

/// The operands of a loop: `a` in 0..=15, as the nibbles of a q4 block are, and signed `b`.
#[derive(Clone, Copy, Debug)]
pub struct Operands {
    a: [u8; OPERANDS],
    b: [i8; OPERANDS],
}

/// Bytes of the widest register.
const OPERANDS: usize = 64;

impl Operands {
    /// Operands that differ from lane to lane.
    fn ramp() -> Self {
        Self {
            a: std::array::from_fn(|i| (i % 16) as u8),
            b: std::array::from_fn(|i| (i * 7 % 13) as i8 - 5),
        }
    }

    fn b_f32<const N: usize>(&self) -> [f32; N] {
        std::array::from_fn(|i| f32::from(self.b[i]))
    }

    fn a_f32<const N: usize>(&self) -> [f32; N] {
        std::array::from_fn(|i| f32::from(self.a[i]))
    }
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// Bytes, summed in 32-bit integers.
    Int8,
    /// bf16, summed in f32.
    Bf16,
    /// f32.
    F32,
}

impl Number {
    /// Every kind there is.
    pub const ALL: [Self; 3] = [Self::Int8, Self::Bf16, Self::F32];

    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// Runs so many rounds and returns the sum of all accumulators.
/// # Safety
/// The CPU has the instruction.
type Run = unsafe fn(operands: &Operands, rounds: u64) -> f64;

/// A loop that does nothing but multiply and add in registers.
#[derive(Clone, Copy, Debug)]
pub struct MultiplyLoop {
    number: Number,
    isa: Isa,
    instruction: &'static str,
    /// Elements of an operand that the instruction multiplies.
    lanes: usize,
    /// Times that a round multiplies them.
    repeats: usize,
    run: Run,
}

impl MultiplyLoop {
    /// The loops that this CPU can run for a kind of number, the widest first. There is always one
    /// for int8 and f32; none for bf16 where no instruction multiplies it.
    #[must_use]
    pub fn available(number: Number) -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let mut loops = x86::available(number);
        #[cfg(not(target_arch = "x86_64"))]
        let mut loops = Vec::new();
        loops.extend(portable::available(number));
        loops
    }

    /// What it multiplies.
    #[must_use]
    pub fn number(&self) -> Number {
        self.number
    }

    /// The plainest table that can have the instruction; those that include it can, too.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The instruction and its width.
    #[must_use]
    pub fn instruction(&self) -> &'static str {
        self.instruction
    }

    /// Operations of so many rounds; a multiply-add is two.
    #[must_use]
    pub fn operations(&self, rounds: u64) -> f64 {
        2.0 * (self.lanes * self.repeats) as f64 * rounds as f64
    }

    /// Multiplies for so many rounds.
    pub fn run(&self, rounds: u64) {
        let operands = std::hint::black_box(Operands::ramp());
        // SAFETY: `available` is the only source of loops, and asks the CPU.
        std::hint::black_box(unsafe { (self.run)(&operands, rounds) });
    }

    /// Whether the loop multiplies what it claims: its sum against the sum done plainly.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        const ROUNDS: u64 = 5;
        let operands = Operands::ramp();
        let products: i64 = (operands.a.iter().zip(&operands.b).take(self.lanes))
            .map(|(a, b)| i64::from(*a) * i64::from(*b))
            .sum();
        let want = products * (self.repeats as u64 * ROUNDS) as i64;
        // SAFETY: as in `run`.
        let got = unsafe { (self.run)(&operands, ROUNDS) };
        want != 0 && got == want as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loop_multiplies_what_it_claims() {
        for number in Number::ALL {
            for l in MultiplyLoop::available(number) {
                assert!(l.is_exact(), "{}", l.instruction());
                assert_eq!(l.number(), number);
                let per_round = l.operations(1);
                assert!(per_round >= 2.0 && l.operations(10) == 10.0 * per_round);
                l.run(0);
            }
        }
    }

    #[test]
    fn every_table_has_loops_for_int8_and_f32_and_none_that_is_beyond_it() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let of = |number| -> Vec<_> {
                (MultiplyLoop::available(number).iter())
                    .filter(|l| isa.includes(l.isa()))
                    .map(MultiplyLoop::instruction)
                    .collect()
            };
            let widest = [Number::Int8, Number::F32].map(|number| of(number)[0]);
            let want = match isa {
                Isa::Avx2 => ["vpmaddubsw ymm", "vfmadd231ps ymm"],
                Isa::AvxVnni => ["vpdpbusd ymm", "vfmadd231ps ymm"],
                Isa::Avx512 => ["vpdpbusd zmm", "vfmadd231ps zmm"],
                Isa::Amx => ["tdpbusd tmm", "vfmadd231ps zmm"],
                Isa::Scalar | Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm => {
                    ["plain Rust int8", "plain Rust f32"]
                }
            };
            assert_eq!(widest, want, "{isa}");
        }
    }
}
