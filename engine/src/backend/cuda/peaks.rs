//! The limits of a device, measured.

use super::weights::failed;
use crate::cancel::Cancel;
use crate::peaks::{Peak, PeakError, PeakOptions, Peaks};
use phidias_kernels::cpu::peak::Number;
use phidias_kernels::cuda::peak::{Loops, MOST_ROUNDS};
use phidias_kernels::cuda::{Device, DeviceError, Memory};
use std::sync::Arc;

/// What is measured beside the loops.
const READS: [&str; 2] = ["read", "copied, both ways"];

impl Peaks {
    /// The limits of a device, by its own clock: as [`Peaks::measure`], with at most half of its free memory.
    /// # Errors
    /// [`PeakError`].
    /// # Panics
    /// When a loop does not compute what it should.
    pub fn of_device(
        device: &Arc<dyn Device>,
        options: &PeakOptions,
        cancel: &Cancel,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, PeakError> {
        let failed = |error: DeviceError| PeakError::Device(failed(&**device, error));
        let repetitions = options.repetitions.max(1);
        let total = (Number::ALL.len() + READS.len()) * repetitions;
        let mut done = 0;
        let mut next = || {
            progress(done, total);
            done += 1;
            match cancel.is_cancelled() {
                true => Err(PeakError::Cancelled),
                false => Ok(()),
            }
        };
        let loops = Loops::new(device).map_err(failed)?;
        let free = device.free_memory().map_err(failed)?;
        // Half is read, half is what it is copied to; whole pieces, as many as one call reads.
        let buffer = (options.buffer.min(free / 2).min(8 << 30) / 512 * 512).max(512);
        let memory = Memory::zeroed(device, buffer).map_err(failed)?;
        let (from, to) = {
            let all = memory.span::<u32>();
            let half = all.len() / 2;
            (all.slice(..half), all.slice(half..))
        };

        let mut rounds = Vec::new();
        for number in Number::ALL {
            rounds.push(lasting(&loops, number, options).map_err(failed)?);
        }
        let mut rates = vec![Vec::new(); Number::ALL.len() + READS.len()];
        for _ in 0..repetitions {
            let mut rates = rates.iter_mut();
            for (number, rounds) in Number::ALL.into_iter().zip(&rounds) {
                next()?;
                let seconds = loops.multiply(number, *rounds).map_err(failed)?;
                let rate = loops.operations(number, *rounds) / seconds;
                rates.next().expect("one each").push(rate / 1e9);
            }
            next()?;
            let (seconds, _) = loops.read(memory.span()).map_err(failed)?;
            let read = rates.next().expect("one each");
            read.push(buffer as f64 / seconds / 1e9);
            next()?;
            let seconds = (device.seconds(&mut || from.copy_to(to))).map_err(failed)?;
            let copied = rates.next().expect("one each");
            copied.push(buffer as f64 / seconds / 1e9);
        }
        progress(total, total);
        let [int8, bf16, f32, read, copied] =
            <[Vec<f64>; 5]>::try_from(rates).expect("three numbers and two ways of reading");
        let one = |variant: &str, rates: &[f64]| vec![Peak::of(variant.to_owned(), rates)];
        Ok(Self {
            threads: 0,
            buffer_bytes: buffer,
            read: [one(READS[0], &read), one(READS[1], &copied)].concat(),
            int8: one("mma.sync m16n8k32", &int8),
            bf16: one("mma.sync m16n8k16", &bf16),
            f32: one("fma", &f32),
        })
    }
}

/// Rounds of a loop that take about as long as is wanted.
fn lasting(loops: &Loops, number: Number, options: &PeakOptions) -> Result<u32, DeviceError> {
    let mut rounds = 16;
    while rounds < MOST_ROUNDS
        && loops.multiply(number, rounds)? < options.loop_time.as_secs_f64() / 2.0
    {
        rounds *= 2;
    }
    Ok(rounds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use phidias_kernels::cuda::{HostDevice, Order};
    use std::io::Write;

    #[test]
    fn every_limit_of_a_device_is_measured_and_positive() {
        let device: Arc<dyn Device> = match HostDevice::new(Order::Forward) {
            Ok(device) => Arc::new(device),
            Err(error) => {
                let mut stderr = std::io::stderr();
                let _ = writeln!(stderr, "\n=== SKIPPED: peaks of a device: {error} ===\n");
                return;
            }
        };
        let options = PeakOptions {
            buffer: 1 << 20,
            ..PeakOptions::rough()
        };
        let mut seen = Vec::new();
        let told = |done, total| seen.push((done, total));
        let peaks = Peaks::of_device(&device, &options, &Cancel::default(), told).unwrap();
        assert_eq!((peaks.threads, peaks.buffer_bytes), (0, 1 << 20));
        assert_eq!(
            (seen.first(), seen.last()),
            (Some(&(0, 10)), Some(&(10, 10)))
        );
        let rates = Number::ALL.map(|number| peaks.gop_s(number, None));
        for rate in rates.into_iter().chain([peaks.read_gb_s()]) {
            assert!(rate.is_finite() && rate > 0.0, "{rate}");
        }
        let cancel = Cancel::default();
        cancel.cancel();
        let cancelled = Peaks::of_device(&device, &options, &cancel, |_, _| {});
        assert!(matches!(cancelled, Err(PeakError::Cancelled)));
    }
}
