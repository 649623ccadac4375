//! What the benches share: an operation is checked, then timed, for every table and two thread counts.
//!
//! The operations with their shapes, inputs and costs are those of `phidias bench --kernels`. Packing
//! and preparing are outside the time. One figure counts one thing: bytes where memory is the limit
//! (one token, whatever works on activations alone), else operations, shown as elements; a
//! multiply-add is two. A group of figures is of one kind, and its name says of which.

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use phidias::bench::operations::{Cost, Operation, Prepared};
use phidias::engine::backend::Cpu;
use phidias::engine::machine::Machine;
use phidias::engine::pool::Pool;
use phidias::engine::{Cancel, Isa, Kernels};
use std::sync::Arc;
use std::time::Duration;

/// Numbers of tokens: decoding, a few guesses at once, a short prompt, a long one.
const TOKENS: &[usize] = &[1, 4, 16, 128, 512];

/// The definition is timed up to so many tokens: more would take minutes.
const SCALAR_TOKENS: usize = 1;

/// Rows of a matrix whose products are compared with the definition's, for all tokens.
const CHECKED_ROWS: usize = 48;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Counted {
    Bytes,
    Operations,
}

impl Counted {
    /// What limits `n` tokens of an operation.
    fn of(operation: &Operation, n: usize) -> Self {
        match operation {
            Operation::Linear { .. } | Operation::Attention { .. } if n > 1 => Self::Operations,
            _ => Self::Bytes,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Operations => "operations",
        }
    }

    fn throughput(self, cost: Cost) -> Throughput {
        match self {
            Self::Bytes => Throughput::Bytes(cost.bytes as u64),
            Self::Operations => Throughput::Elements(cost.ops as u64),
        }
    }
}

/// Checks and times one operation: attention on its own tokens, everything else on [`TOKENS`]. A result may differ from the definition's by `tolerance` times the
/// largest one; each family says where that comes from.
pub fn bench(c: &mut Criterion, operation: &Operation, tolerance: f32) {
    let tokens = match operation {
        Operation::Attention { tokens, .. } => std::slice::from_ref(tokens),
        _ => TOKENS,
    };
    let all = Machine::detect().threads();
    let mut threads = vec![1, all];
    threads.dedup();
    let pools: Vec<_> = (threads.into_iter())
        .map(|n| Arc::new(Pool::new(Some(n)).expect("threads")))
        .collect();
    let scalar = Kernels::for_isa(Isa::Scalar).expect("everywhere");
    let definition = Cpu::new(scalar, Arc::clone(pools.last().expect("one at least")));
    let prepare = |operation: &Operation, working_set| {
        (operation.prepare(&definition, working_set, &Cancel::default())).expect("memory")
    };
    let mut prepared = prepare(operation, working_set());
    let mut slice = prepare(&first_rows(operation), 0);
    for counted in [Counted::Bytes, Counted::Operations] {
        let tokens = (tokens.iter().copied()).filter(|n| Counted::of(operation, *n) == counted);
        let tokens: Vec<_> = tokens.collect();
        if tokens.is_empty() {
            continue;
        }
        let (kernel, shape) = (operation.kernel(), operation.shape());
        let mut group = c.benchmark_group(format!("{kernel}, {shape}, {}", counted.name()));
        (group.sampling_mode(SamplingMode::Flat).sample_size(10))
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(1));
        for n in tokens {
            group.throughput(counted.throughput(operation.cost(n, prepared.stored())));
            // Only what the command line asks for is checked.
            let mut want = None;
            let tables = (Isa::ALL.into_iter().filter_map(Kernels::for_isa))
                .filter(|k| k.isa() != Isa::Scalar || n <= SCALAR_TOKENS);
            for kernels in tables {
                for pool in &pools {
                    let cpu = Cpu::new(kernels, Arc::clone(pool));
                    let name = format!("{}, {} threads", kernels.isa(), pool.threads());
                    let mut checked = false;
                    group.bench_function(BenchmarkId::new(&name, n), |b| {
                        if !checked {
                            let want =
                                want.get_or_insert_with(|| result(&mut slice, &definition, n));
                            let got = result(&mut prepared, &cpu, n);
                            check(want, &got, n, tolerance, &name);
                            checked = true;
                        }
                        b.iter_custom(|calls| prepared.time(&cpu, calls as usize));
                    });
                }
            }
        }
        group.finish();
    }
}

/// Bytes of weights that are visited in turn: several times the last cache.
fn working_set() -> usize {
    let cache = Machine::detect().last_cache.unwrap_or(0);
    (3 * cache).clamp(192 << 20, 1 << 30)
}

/// The same operation with the first rows of its matrix, if it has one.
fn first_rows(operation: &Operation) -> Operation {
    let mut slice = *operation;
    if let Operation::Linear { rows, .. } = &mut slice {
        *rows = CHECKED_ROWS;
    }
    slice
}

/// The result for `n` tokens; a call of this many tokens is what is prepared afterwards.
fn result(prepared: &mut Prepared, cpu: &Cpu, n: usize) -> Vec<f32> {
    prepared.set_tokens(cpu, n);
    prepared.time(cpu, 1);
    prepared.result(cpu)
}

/// Compares the first columns of `n` rows, as many as the definition computed.
fn check(want: &[f32], got: &[f32], n: usize, tolerance: f32, name: &str) {
    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.0, "the definition gives only zeros");
    let (width, cols) = (want.len() / n, got.len() / n);
    assert!(width <= cols, "{width} columns of {cols}");
    let rows = want.chunks_exact(width).zip(got.chunks_exact(cols));
    for (t, (want, got)) in rows.enumerate() {
        for (c, (want, got)) in want.iter().zip(got).enumerate() {
            // Not `>`: a NaN is never admitted.
            let near = (want - got).abs() <= tolerance * largest;
            assert!(
                near,
                "{name}: row {t} column {c} of {n} rows: {got} for {want}"
            );
        }
    }
}
