//! The matrix multiplications with weights as stored, bf16 and f32, times f32 activations.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use phidias::bench::operations::{Operation, all};

/// A product of 3072 columns takes part in 197 roundings of 2^-24 in either of two results (16 partial
/// sums), and the sum of the magnitudes is up to 30 times the largest result.
const TOLERANCE: f32 = 7e-4;

fn dense(c: &mut Criterion) {
    for operation in all() {
        if matches!(operation, Operation::Linear { format, .. } if format.packed().is_none()) {
            common::bench(c, &operation, TOLERANCE);
        }
    }
}

criterion_group!(benches, dense);
criterion_main!(benches);
