//! What works on activations alone: the norms, the rotation of queries and keys, the gates of the MLPs,
//! the activations of the image encoder.
//!
//! The bytes are read and written once. Few tokens stay in a cache, so these can be faster than memory.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use phidias::bench::operations::Operation;

/// A norm: 195 roundings of 2^-24 in a mean of squares, halved by the root, in either of two results,
/// and some more; a rotation, a gate and an activation have a handful.
const TOLERANCE: f32 = 1.5e-5;

fn elementwise(c: &mut Criterion) {
    for operation in [
        Operation::RmsNorm,
        Operation::LayerNorm,
        Operation::Rope,
        Operation::SiluMul,
        Operation::Gegelu,
        Operation::QuickGelu,
        Operation::Gelu,
    ] {
        common::bench(c, &operation, TOLERANCE);
    }
}

criterion_group!(benches, elementwise);
criterion_main!(benches);
