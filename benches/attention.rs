//! Attention: a prompt of 512 tokens, and one token at depth 4096, on an f16 and on an int8 cache; dense
//! and block-sparse layers of Phi-3-small at 8k.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use phidias::bench::operations::{Layer, Operation};
use phidias::engine::kv_cache::KvType;

/// Tables round the same sums in the same order, with and without fused multiply-add, and compute the
/// exponentials differently: a score of 96 products is off by at most 97 roundings of 2^-24 times 30
/// or so, and a weight by as much relatively. Over bytes an exponential that differs can round to the
/// neighbouring integer, 2^-15 of the largest.
const TOLERANCE: f32 = 4e-4;

fn attention(c: &mut Criterion) {
    for (first, tokens) in [(0, 512), (4096, 1)] {
        for kv in [KvType::F16, KvType::Int8] {
            let layer = Layer::MINI;
            let operation = Operation::Attention {
                layer,
                kv,
                first,
                tokens,
            };
            common::bench(c, &operation, TOLERANCE);
        }
    }
    for (first, tokens) in [(7680, 512), (8192, 1)] {
        for layer in [Layer::SMALL_DENSE, Layer::SMALL_SPARSE] {
            let operation = Operation::Attention {
                layer,
                kv: KvType::F16,
                first,
                tokens,
            };
            common::bench(c, &operation, TOLERANCE);
        }
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
