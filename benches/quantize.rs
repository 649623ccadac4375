//! Quantization of activations to int8 blocks.
//!
//! The bytes are those of the activations, read, and of the quants, written. What is compared is the
//! product of the rows with an int8 matrix.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use phidias::bench::operations::Operation;

/// Quants are equal by contract; the product of 96 blocks has at most 97 roundings of 2^-24 in either
/// of two results, times twice the largest result. One quant off by one step shows in most places.
const TOLERANCE: f32 = 3e-5;

fn quantize(c: &mut Criterion) {
    common::bench(c, &Operation::Quantize, TOLERANCE);
}

criterion_group!(benches, quantize);
criterion_main!(benches);
