//! Where a model is measured: its limits and its clock.

use super::{BenchError, PeakOptions, Peaks, Progress, Step};
use phidias_engine::backend::Cpu;
use phidias_engine::kernels::cpu::peak::Number;
#[cfg(feature = "cuda")]
use phidias_engine::kernels::cuda::{Device, DeviceError};
use phidias_engine::{Cancel, Isa};
use phidias_models::{Session, WeightFormat};
#[cfg(feature = "cuda")]
use std::sync::Arc;
use std::time::Instant;

/// Where a session computes.
#[derive(Clone, Debug)]
pub enum Place {
    /// Some threads of the CPU, timed by its clock.
    Cpu(Cpu),
    /// A device, timed by its own events.
    #[cfg(feature = "cuda")]
    Device(Arc<dyn Device>),
}

impl Place {
    /// That of a session.
    #[must_use]
    pub fn of(session: &Session) -> Self {
        #[cfg(feature = "cuda")]
        if let Some(device) = session.device() {
            return Self::Device(Arc::clone(device));
        }
        Self::Cpu(session.cpu().expect("a session on the CPU").clone())
    }

    /// Its name in records.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(_) => "cpu".to_owned(),
            #[cfg(feature = "cuda")]
            Self::Device(device) => device.name(),
        }
    }

    /// The instructions that its kernels use.
    #[must_use]
    pub fn isa(&self) -> &'static str {
        match self {
            Self::Cpu(cpu) => cpu.kernels().isa().name(),
            #[cfg(feature = "cuda")]
            Self::Device(_) => "cuda",
        }
    }

    /// Threads of the CPU that compute.
    #[must_use]
    pub fn threads(&self) -> usize {
        match self {
            Self::Cpu(cpu) => cpu.pool().threads(),
            #[cfg(feature = "cuda")]
            Self::Device(_) => 0,
        }
    }

    /// The table whose limits are those of a pass with so many tokens over weights in `format`; a device has none.
    #[must_use]
    pub fn isa_for(&self, format: WeightFormat, tokens: usize) -> Option<Isa> {
        match self {
            Self::Cpu(cpu) => Some(cpu.kernels().isa_for(format.packed(), tokens)),
            #[cfg(feature = "cuda")]
            Self::Device(_) => None,
        }
    }

    /// What is multiplied where weights are stored in `format`: on the CPU bf16 is widened to f32.
    #[must_use]
    pub fn multiplies(&self, format: WeightFormat) -> Number {
        match (format, self) {
            (WeightFormat::Q4 | WeightFormat::Q8, _) => Number::Int8,
            #[cfg(feature = "cuda")]
            (WeightFormat::Bf16, Self::Device(_)) => Number::Bf16,
            (WeightFormat::Bf16 | WeightFormat::F32, _) => Number::F32,
        }
    }

    /// Measures its limits.
    /// # Errors
    /// What [`Peaks::measure`] reports.
    pub fn peaks(
        &self,
        options: &PeakOptions,
        cancel: &Cancel,
        progress: &Progress,
    ) -> Result<Peaks, BenchError> {
        let told = |done, total| {
            progress(Step {
                what: "the machine's limits",
                done,
                total,
            });
        };
        Ok(match self {
            Self::Cpu(cpu) => Peaks::measure(cpu.pool(), options, cancel, told)?,
            #[cfg(feature = "cuda")]
            Self::Device(device) => Peaks::of_device(device, options, cancel, told)?,
        })
    }

    /// Seconds that `work` takes, and its result.
    /// # Errors
    /// Those of `work`; a device that fails.
    pub fn seconds<R>(
        &self,
        work: impl FnOnce() -> Result<R, BenchError>,
    ) -> Result<(f64, R), BenchError> {
        match self {
            Self::Cpu(_) => {
                let start = Instant::now();
                let result = work()?;
                Ok((start.elapsed().as_secs_f64(), result))
            }
            #[cfg(feature = "cuda")]
            Self::Device(device) => {
                let (mut work, mut result) = (Some(work), None);
                let mut once = || -> Result<(), DeviceError> {
                    result = work.take().map(|work| work());
                    Ok(())
                };
                let seconds = device.seconds(&mut once).map_err(BenchError::Device)?;
                Ok((seconds, result.expect("work that was done")?))
            }
        }
    }
}
