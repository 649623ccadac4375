//! What works on activations alone: RMSNorm, the rotation of queries and keys, the gate of the MLP.
//!
//! The bytes are read and written once. Few tokens stay in a cache, so these can be faster than memory.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use phidias::bench::operations::Operation;

/// A norm: 195 roundings of 2^-24 in a mean of squares, halved by the root, in either of two results,
/// and some more; a rotation and a gate have a handful.
const TOLERANCE: f32 = 1.5e-5;

fn elementwise(c: &mut Criterion) {
    for operation in [Operation::RmsNorm, Operation::Rope, Operation::SiluMul] {
        common::bench(c, &operation, TOLERANCE);
    }
}

criterion_group!(benches, elementwise);
criterion_main!(benches);
