//! The matrix multiplications at Phi-3.5-mini's largest shape, for every table this CPU has.
//!
//! `cargo bench --bench gemm` (`-- --quick` for a first look). One token is limited by memory, so its
//! throughput is in bytes of weights; many tokens by arithmetic, so theirs is in operations (shown as
//! elements; a multiply-add is two). The weights are several matrices in turn, larger together than
//! the last cache. Each kernel's answer is compared with the scalar table before it is timed.

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use phidias::engine::kernels::cpu::{Isa, Kernels};
use phidias::engine::kernels::view::ColsMut;
use phidias::engine::pool::Pool;
use phidias::engine::quant::activations::{self, Activations, TILE};
use phidias::engine::quant::packed::PANEL_ROWS;
use phidias::engine::quant::{AlignedBytes, Format, Packed, PackedLayout};
use std::hint::black_box;
use std::time::Duration;

/// gate_up_proj of Phi-3.5-mini.
const ROWS: usize = 16384;
const COLS: usize = 3072;
/// Bytes of all matrices together: several times a usual last-level cache.
const WORKING_SET: usize = 192 << 20;

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Random quants; every scale 2^-6. Any bytes are a matrix, so nothing needs to be quantized.
fn weights(layout: &PackedLayout, seed: u64) -> AlignedBytes {
    let mut bytes = AlignedBytes::try_zeroed(layout.bytes()).expect("memory");
    let mut state = seed;
    for panel in bytes.as_mut().chunks_exact_mut(layout.panel_bytes()) {
        let (scales, quants) = panel.split_at_mut(layout.blocks() * PANEL_ROWS * 2);
        scales.as_chunks_mut::<2>().0.fill(0x2400_u16.to_le_bytes());
        for chunk in quants.as_chunks_mut::<8>().0 {
            *chunk = random(&mut state).to_le_bytes();
        }
    }
    bytes
}

fn tokens(format: Format, count: usize) -> Activations {
    let mut state = 7;
    let x: Vec<f32> = (0..count * COLS)
        .map(|_| (random(&mut state) >> 40) as f32 / 8_388_608.0 - 1.0)
        .collect();
    let mut quantized = Activations::default();
    quantized.reshape(count, COLS, format.zero());
    for (mut tile, x) in quantized.tiles_mut().zip(x.chunks(TILE * COLS)) {
        for (r, x) in x.chunks_exact(COLS).enumerate() {
            activations::quantize(x, &mut tile, r);
        }
    }
    quantized
}

/// One multiplication, its rows divided over the threads.
fn multiply(kernels: &Kernels, pool: &Pool, w: Packed<'_>, x: &Activations, y: &mut [f32]) {
    let panels = w.layout().panels();
    pool.enter(|team| {
        let each = panels.div_ceil(team.pieces(panels)).next_multiple_of(2);
        let parts = ColsMut::new(y, x.rows(), ROWS).chunks(each * PANEL_ROWS);
        team.each_part(parts.into_iter().enumerate().collect(), |(i, y)| {
            kernels.gemm_packed(w, i * each..panels.min((i + 1) * each), x, y);
        });
    });
}

/// Largest difference, relative to the largest result: blocks are summed in f32, 96 of them, in
/// one order; only the rounding of the multiply-add differs.
fn check(kernels: &Kernels, pool: &Pool, w: Packed<'_>, x: &Activations) {
    let (mut y, mut want) = (vec![0.0; x.rows() * ROWS], vec![0.0; x.rows() * ROWS]);
    multiply(kernels, pool, w, x, &mut y);
    let scalar = Kernels::for_isa(Isa::Scalar).expect("everywhere");
    multiply(scalar, pool, w, x, &mut want);
    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (a, b) in y.iter().zip(&want) {
        assert!(
            (a - b).abs() <= largest * 1e-5,
            "{}: {a} {b}",
            kernels.isa()
        );
    }
}

fn gemm(c: &mut Criterion) {
    for format in [Format::Q4, Format::Q8] {
        let layout = PackedLayout::new(format, ROWS, COLS).expect("a shape");
        let matrices: Vec<_> = (0..WORKING_SET.div_ceil(layout.bytes()))
            .map(|i| weights(&layout, i as u64))
            .collect();
        let view =
            |i: usize| Packed::new(layout, matrices[i % matrices.len()].as_ref()).expect("whole");
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::for_isa) {
            let mut group = c.benchmark_group(format!("gemm_{}/{}", format.name(), kernels.isa()));
            group
                .sampling_mode(SamplingMode::Flat)
                .sample_size(10)
                .warm_up_time(Duration::from_millis(300));
            let mut threads = vec![1, Pool::new(None).expect("threads").threads()];
            threads.dedup();
            for pool in threads
                .into_iter()
                .map(|n| Pool::new(Some(n)).expect("threads"))
            {
                // The definition is not timed where it would take minutes.
                for count in [1, 4, 16, 128]
                    .into_iter()
                    .filter(|n| kernels.isa() != Isa::Scalar || *n <= 4)
                {
                    let x = tokens(format, count);
                    check(kernels, &pool, view(0), &x);
                    let mut y = vec![0.0; count * ROWS];
                    group.throughput(match count {
                        1 => Throughput::Bytes(layout.bytes() as u64),
                        _ => Throughput::Elements(2 * (count * ROWS * COLS) as u64),
                    });
                    let mut next = 0;
                    let name = BenchmarkId::new(
                        format!("{count} tokens"),
                        format!("{} threads", pool.threads()),
                    );
                    group.bench_function(name, |b| {
                        b.iter(|| {
                            next += 1;
                            multiply(kernels, &pool, view(next), black_box(&x), &mut y);
                        });
                    });
                }
            }
            group.finish();
        }
    }
}

criterion_group!(benches, gemm);
criterion_main!(benches);
