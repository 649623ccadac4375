//! The CUDA kernels at the shapes of Phi-3.5-mini: each is checked, then timed by the GPU's own clock.
//!
//! `cargo bench --features cuda --bench cuda` (`-- --quick` for a first look, `-- q4` for a part). Without a
//! GPU nothing is timed, and it says why. NVIDIA's cuBLAS is timed beside the prompt's products of bf16 where its
//! library is found. With `PHIDIAS_BENCH_DEVICE=host` everything is checked on the host
//! device, at small shapes; `cargo test` runs each once, and the times of `cargo bench` mean nothing then.
//!
//! ```text
//! Bytes   what must be read and written once: weights, cache, inputs, results
//! Ops     a multiply-add is two, shown as elements
//! ```
#![forbid(unsafe_code)]

mod attention;
mod cublas;
mod elementwise;
mod experts;
mod linear;
mod sample;
mod shapes;
mod timing;

use phidias::engine::kernels::cuda::cublas::Cublas;
use phidias::engine::kernels::cuda::{Device, Gpu, HostDevice, Order};
use shapes::Shapes;
use std::process::ExitCode;
use std::sync::Arc;
use timing::Bench;

/// Takes another device than the first GPU.
const DEVICE: &str = "PHIDIAS_BENCH_DEVICE";

fn main() -> ExitCode {
    let device = std::env::var_os(DEVICE);
    let opened = match device.as_deref().map(|name| name.to_str()) {
        None => Gpu::open(0, None).map(Arc::new).map(|gpu| {
            let device: Arc<dyn Device> = gpu.clone();
            (device, Some(gpu), Shapes::MINI)
        }),
        Some(Some("host")) => HostDevice::new(Order::Forward).map(|host| {
            let device: Arc<dyn Device> = Arc::new(host);
            (device, None, Shapes::SMALL)
        }),
        Some(_) => {
            let found = device.unwrap_or_default();
            eprintln!("{DEVICE}: expected `host`, or not to be set, found {found:?}");
            return ExitCode::from(2);
        }
    };
    let (device, gpu, shapes) = match opened {
        Ok(opened) => opened,
        Err(reason) => {
            eprintln!("\n=== SKIPPED: no CUDA kernel is timed: {reason} ===\n");
            return ExitCode::SUCCESS;
        }
    };
    println!("on {}", device.name());
    let mut bench = Bench::new(device, shapes);
    linear::bench(&mut bench);
    match gpu.map(Cublas::new) {
        None => {}
        Some(Ok(library)) => cublas::bench(&mut bench, library),
        Some(Err(reason)) => eprintln!("cuBLAS is not timed: {reason}"),
    }
    experts::bench(&mut bench);
    attention::bench(&mut bench);
    elementwise::bench(&mut bench);
    sample::bench(&mut bench);
    bench.finish();
    ExitCode::SUCCESS
}
