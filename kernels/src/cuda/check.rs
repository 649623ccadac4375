//! What the checks of all families share.
//!
//! A check is a function of a device. It runs on the host device with threads in three orders, and on the
//! GPU when there is one; what cannot be run says so.

pub(super) mod elementwise;
mod experts;
mod linear;
pub(super) mod probe;

use super::{Device, DeviceError, Gpu, HostDevice, Order};
use std::io::Write;
use std::sync::{Arc, LazyLock, Mutex, Once, PoisonError};

/// Runs a check on every device there is, each its own, but for the GPU, which checks have in turns.
/// # Panics
/// When the device fails at what the check expects to be done.
pub(super) fn each_device(check: impl Fn(&Arc<dyn Device>) -> Result<(), DeviceError>) {
    static NO_HOST: Once = Once::new();
    static GPU: LazyLock<Option<Mutex<Arc<dyn Device>>>> = LazyLock::new(gpu);
    let run = |device: &Arc<dyn Device>| {
        if let Err(error) = check(device) {
            panic!("{}: {error}", device.name());
        }
    };
    for order in Order::ALL {
        match HostDevice::new(order) {
            Ok(device) => run(&(Arc::new(device) as Arc<dyn Device>)),
            Err(reason) => NO_HOST.call_once(|| skipped("on the host", &reason)),
        }
    }
    if let Some(gpu) = &*GPU {
        run(&gpu.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn gpu() -> Option<Mutex<Arc<dyn Device>>> {
    match Gpu::open(0, None) {
        Ok(device) => Some(Mutex::new(Arc::new(device))),
        Err(reason) => {
            skipped("on a GPU", &reason);
            None
        }
    }
}

/// Written past the test harness, which swallows what a passing test prints.
fn skipped(place: &str, reason: &DeviceError) {
    let _ = writeln!(
        std::io::stderr(),
        "\n=== SKIPPED: CUDA kernels {place}: {reason} ===\n"
    );
}

/// Half a unit in the last place of 1.
pub(super) const U: f64 = 1.0 / (1u64 << 24) as f64;

/// SplitMix64 (Steele, Lea & Flood 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// Uniform in -1..1.
    pub(super) fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    pub(super) fn values(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.value() * size).collect()
    }
}
