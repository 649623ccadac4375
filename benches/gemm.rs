//! The packed matrix multiplications, int4 and int8 weights times int8 activations.
//!
//! `cargo bench --bench gemm` (`-- --quick` for a first look, `-- avx512` for one table).

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use phidias::bench::operations::{Operation, all};

/// Blocks are exact, their sums are f32: at most 257 roundings of 2^-24 in either of two results, times
/// the sum of the magnitudes of 256 blocks, which is up to 6 times the largest result.
const TOLERANCE: f32 = 2e-4;

fn gemm(c: &mut Criterion) {
    for operation in all() {
        let Operation::Linear { format, name, .. } = operation else {
            continue;
        };
        // The largest matrix, and the one with the longest rows.
        if format.packed().is_some() && ["gate_up_proj", "down_proj"].contains(&name) {
            common::bench(c, &operation, TOLERANCE);
        }
    }
}

criterion_group!(benches, gemm);
criterion_main!(benches);
