//! What the checks of all families share.
//!
//! A check is a function of a device. It runs on the host device with threads in three orders, and on the
//! GPU when there is one; what cannot be run says so.

mod elementwise;

use super::{Device, DeviceError, HostDevice, Order};
use std::io::Write;
use std::sync::{Arc, Once};

/// Runs a check on every device there is.
/// # Panics
/// When the device fails at what the check expects to be done.
pub(super) fn each_device(check: impl Fn(&Arc<dyn Device>) -> Result<(), DeviceError>) {
    static REPORT: Once = Once::new();
    for order in Order::ALL {
        let device: Arc<dyn Device> = match HostDevice::new(order) {
            Ok(device) => Arc::new(device),
            Err(reason) => {
                // Written past the test harness, which swallows what a passing test prints.
                REPORT.call_once(|| {
                    let _ = writeln!(
                        std::io::stderr(),
                        "\n=== SKIPPED: CUDA kernels on the host: {reason} ===\n"
                    );
                });
                break;
            }
        };
        if let Err(error) = check(&device) {
            panic!("{}: {error}", device.name());
        }
    }
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
