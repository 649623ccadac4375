//! The loops in plain Rust: what a machine without one of the known instructions is measured with.

use super::{Isa, MultiplyLoop, Number, OPERANDS, Operands};
use std::hint::black_box;

/// Times that a round multiplies its operands; more would not fit in the registers.
const REPEATS: usize = 1;
/// f32 lanes of a round: enough independent sums to hide the latency of an addition.
const F32_LANES: usize = 32;

pub(super) fn available(number: Number) -> Option<MultiplyLoop> {
    let (instruction, lanes, run): (_, _, super::Run) = match number {
        Number::Int8 => ("plain Rust int8", OPERANDS, int8),
        Number::F32 => ("plain Rust f32", F32_LANES, f32),
        Number::Bf16 => return None,
    };
    Some(MultiplyLoop {
        number,
        isa: Isa::Scalar,
        instruction,
        lanes,
        repeats: REPEATS,
        run,
    })
}

fn int8(operands: &Operands, rounds: u64) -> f64 {
    let mut acc = [0i32; OPERANDS];
    for _ in 0..rounds {
        // Opaque each round: the products would otherwise be computed once, before the loop.
        let Operands { a, b } = *black_box(operands);
        for ((acc, a), b) in acc.iter_mut().zip(a).zip(b) {
            *acc = acc.wrapping_add(i32::from(a) * i32::from(b));
        }
    }
    black_box(acc).iter().map(|v| f64::from(*v)).sum()
}

/// A multiply-add in one instruction where the target has it; `mul_add` calls a library elsewhere.
#[inline]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

fn f32(operands: &Operands, rounds: u64) -> f64 {
    let (a, b) = (operands.a_f32::<F32_LANES>(), operands.b_f32::<F32_LANES>());
    let mut acc = [0.0f32; F32_LANES];
    for _ in 0..rounds {
        let a = *black_box(&a);
        for ((acc, a), b) in acc.iter_mut().zip(a).zip(b) {
            *acc = multiply_add(a, b, *acc);
        }
    }
    black_box(acc).iter().map(|v| f64::from(*v)).sum()
}
