//! The machine's own limits, measured: read bandwidth and multiply-adds in registers.
//!
//! Each limit is the best variant's median of several repetitions, all threads at once. They are
//! measured beside what is judged by them, not once for ever: memory bandwidth was seen to move by
//! half within a minute on a shared host.

use crate::cancel::Cancel;
use crate::huge::HugeBox;
use crate::machine::Machine;
use crate::pool::Pool;
use phidias_kernels::cpu::Isa;
use phidias_kernels::cpu::peak::{MultiplyLoop, Number, Reading};
use rayon::prelude::*;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Smallest and largest of some samples, and the one in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// In the middle; of an even number, the mean of the two.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// The spread of samples; `None` when there are none.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        };
        Some(Self { min, median, max })
    }
}

/// How thoroughly to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeakOptions {
    /// Bytes to read; must exceed the last cache by far.
    pub buffer: usize,
    /// Time of one repetition of a register loop.
    pub loop_time: Duration,
    /// Repetitions of everything.
    pub repetitions: usize,
}

impl PeakOptions {
    /// Enough for figures: four times the last cache and at least 1 GiB, but no more than a quarter
    /// of the memory that can be had.
    #[must_use]
    pub fn thorough(machine: &Machine) -> Self {
        let want = (machine.last_cache.unwrap_or(0).saturating_mul(4)).max(1 << 30);
        let room = machine.memory_available.map_or(u64::MAX, |a| a / 4);
        Self {
            buffer: want.min(usize::try_from(room).unwrap_or(usize::MAX)),
            loop_time: Duration::from_millis(20),
            repetitions: 7,
        }
    }

    /// As little as runs every loop: for tests of the program, no figures.
    #[must_use]
    pub fn rough() -> Self {
        Self {
            buffer: 4 << 20,
            loop_time: Duration::from_micros(200),
            repetitions: 2,
        }
    }
}

/// Why there are no peaks.
#[derive(Debug, thiserror::Error)]
pub enum PeakError {
    /// The memory to read was refused.
    #[error("{bytes} bytes to measure the bandwidth with: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// Stopped from outside.
    #[error("cancelled")]
    Cancelled,
    /// The device failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Device(#[from] crate::backend::DeviceFailed),
}

/// One way to reach for a limit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peak {
    /// What was done: an instruction, a pattern of reading.
    pub variant: String,
    /// 10^9 bytes, or operations, a second; all threads together.
    pub rate: Spread,
    /// The plainest table of kernels that can have the instruction; none where no table decides.
    #[serde(skip)]
    pub isa: Option<Isa>,
}

/// The limits of this machine with a number of threads, or of a device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peaks {
    /// Threads of the CPU; 0: a device.
    pub threads: usize,
    /// Bytes that were read.
    pub buffer_bytes: usize,
    /// GB/s from memory, each way of reading.
    pub read: Vec<Peak>,
    /// Gop/s with bytes, each instruction; a multiply-add is two operations.
    pub int8: Vec<Peak>,
    /// Gop/s with bf16; empty where no instruction multiplies it.
    pub bf16: Vec<Peak>,
    /// Gop/s with f32.
    pub f32: Vec<Peak>,
}

impl Peak {
    pub(crate) fn of(variant: String, rates: &[f64]) -> Self {
        Self {
            variant,
            rate: Spread::of(rates).expect("at least one repetition"),
            isa: None,
        }
    }

    /// Whether it is a limit of a table of `isa`; on a device, which has none, all are.
    #[must_use]
    pub fn limits(&self, isa: Option<Isa>) -> bool {
        match (isa, self.isa) {
            (Some(table), Some(needed)) => table.includes(needed),
            _ => true,
        }
    }
}

impl Peaks {
    /// Measures everything. `progress` hears of measurements done, and of all.
    /// # Errors
    /// [`PeakError`].
    /// # Panics
    /// When a loop does not compute what it should: a limit of something else is none.
    pub fn measure(
        pool: &Pool,
        options: &PeakOptions,
        cancel: &Cancel,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, PeakError> {
        let loops: Vec<_> = (Number::ALL.into_iter())
            .flat_map(MultiplyLoop::available)
            .collect();
        let repetitions = options.repetitions.max(1);
        let total = (loops.len() + Reading::ALL.len()) * repetitions;
        let mut done = 0;
        let mut next = || {
            progress(done, total);
            done += 1;
            if cancel.is_cancelled() {
                return Err(PeakError::Cancelled);
            }
            Ok(())
        };
        // Every variant once, then every variant again: when the machine changes its speed on the
        // way, all of them see it.
        let rounds: Vec<u64> = (loops.iter())
            .map(|l| rounds(pool, options.loop_time, l))
            .collect();
        let mut rates = vec![Vec::new(); loops.len()];
        for _ in 0..repetitions {
            for ((l, rounds), rates) in loops.iter().zip(&rounds).zip(&mut rates) {
                next()?;
                let time = on_all(pool, |_| l.run(*rounds));
                let operations = l.operations(*rounds) * pool.threads() as f64;
                rates.push(operations / time.as_secs_f64() / 1e9);
            }
        }
        let of = |number| {
            (loops.iter().zip(&rates))
                .filter(|(l, _)| l.number() == number)
                .map(|(l, rates)| Peak {
                    isa: Some(l.isa()),
                    ..Peak::of(l.instruction().to_owned(), rates)
                })
                .collect()
        };
        let buffer = filled(pool, options.buffer)?;
        let mut read = vec![Vec::new(); Reading::ALL.len()];
        for _ in 0..repetitions {
            for (reading, rates) in Reading::ALL.into_iter().zip(&mut read) {
                next()?;
                rates.push(read_once(pool, reading, &buffer) / 1e9);
            }
        }
        progress(total, total);
        Ok(Self {
            threads: pool.threads(),
            buffer_bytes: buffer.len(),
            read: (Reading::ALL.iter().zip(&read))
                .map(|(reading, rates)| Peak::of(reading.name(), rates))
                .collect(),
            int8: of(Number::Int8),
            bf16: of(Number::Bf16),
            f32: of(Number::F32),
        })
    }

    /// Read bandwidth, GB/s.
    #[must_use]
    pub fn read_gb_s(&self) -> f64 {
        best(&self.read).map_or(0.0, |p| p.rate.median)
    }

    /// The fastest that a table of `isa` can multiply a kind of number, Gop/s; 0 where none of its
    /// instructions does.
    #[must_use]
    pub fn gop_s(&self, number: Number, isa: Option<Isa>) -> f64 {
        let loops = self.loops(number).iter();
        let rates = loops.filter(|p| p.limits(isa)).map(|p| p.rate.median);
        rates.fold(0.0, f64::max)
    }

    /// The loops of a kind of number.
    #[must_use]
    pub fn loops(&self, number: Number) -> &[Peak] {
        match number {
            Number::Int8 => &self.int8,
            Number::Bf16 => &self.bf16,
            Number::F32 => &self.f32,
        }
    }
}

/// The fastest of some variants, by its median.
#[must_use]
pub fn best(peaks: &[Peak]) -> Option<&Peak> {
    (peaks.iter()).max_by(|a, b| a.rate.median.total_cmp(&b.rate.median))
}

/// Runs `work` on every thread of the pool at once and times the slowest.
fn on_all(pool: &Pool, work: impl Fn(usize) + Sync) -> Duration {
    pool.install(|| {
        let start = Instant::now();
        rayon::broadcast(|context| work(context.index()));
        start.elapsed()
    })
}

/// Rounds of a loop that take about `time`, found by doubling; this also wakes the cores.
fn rounds(pool: &Pool, time: Duration, l: &MultiplyLoop) -> u64 {
    assert!(l.is_exact(), "{} computes something else", l.instruction());
    let mut rounds = 1 << 10;
    while on_all(pool, |_| l.run(rounds)) < time / 2 {
        rounds *= 2;
    }
    rounds
}

/// Bytes a second of one pass, each thread over its part.
fn read_once(pool: &Pool, reading: Reading, bytes: &[u8]) -> f64 {
    let lines = bytes.len() / LINE;
    let at = |i: usize| lines * i / pool.threads() * LINE;
    let part = |i: usize| &bytes[at(i)..at(i + 1)];
    let covered: usize = (0..pool.threads())
        .map(|i| reading.covers(part(i).len()))
        .sum();
    let time = on_all(pool, |i| {
        std::hint::black_box(reading.sum(part(i)));
    });
    covered as f64 / time.as_secs_f64()
}

const LINE: usize = 64;

/// Memory on huge pages, where the system gives them. Each thread writes the part that it reads
/// later, so that it lies near it.
fn filled(pool: &Pool, len: usize) -> Result<HugeBox<u8>, PeakError> {
    let len = len.max(LINE);
    let mut memory =
        HugeBox::zeroed(len).map_err(|source| PeakError::Memory { bytes: len, source })?;
    let share = (len / LINE).div_ceil(pool.threads()) * LINE;
    pool.install(|| {
        (memory.par_chunks_mut(share))
            .with_max_len(1)
            .for_each(|part| part.fill(0x5a));
    });
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(&[]), None);
        let of = |samples: &[f64]| {
            let s = Spread::of(samples).unwrap();
            (s.min, s.median, s.max)
        };
        assert_eq!(of(&[3.0]), (3.0, 3.0, 3.0));
        assert_eq!(of(&[3.0, 1.0, 2.0]), (1.0, 2.0, 3.0));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), (1.0, 2.5, 4.0));
    }

    #[test]
    fn every_limit_is_measured_and_positive() {
        let pool = Pool::new(Some(3)).unwrap();
        let mut seen = Vec::new();
        let told = |done, total| seen.push((done, total));
        let peaks = Peaks::measure(&pool, &PeakOptions::rough(), &Cancel::default(), told).unwrap();
        assert_eq!((peaks.threads, peaks.buffer_bytes), (3, 4 << 20));
        assert_eq!(peaks.read.len(), Reading::ALL.len());
        let variants = [&peaks.read, &peaks.int8, &peaks.bf16, &peaks.f32];
        let total = 2 * variants.map(Vec::len).iter().sum::<usize>();
        assert_eq!(seen.first(), Some(&(0, total)));
        assert_eq!(seen.last(), Some(&(total, total)));
        for rate in [
            peaks.read_gb_s(),
            peaks.gop_s(Number::Int8, None),
            peaks.gop_s(Number::F32, Some(Isa::Scalar)),
        ] {
            assert!(rate.is_finite() && rate > 0.0);
        }
        assert_eq!(peaks.gop_s(Number::Bf16, Some(Isa::Scalar)), 0.0);
    }

    #[test]
    fn a_table_is_limited_by_the_fastest_loop_that_it_can_have() {
        let peak = |variant: &str, isa, rate| Peak {
            isa,
            ..Peak::of(variant.to_owned(), &[rate])
        };
        let peaks = Peaks {
            threads: 1,
            buffer_bytes: 0,
            read: Vec::new(),
            int8: vec![
                peak("tiles", Some(Isa::Amx), 6900.0),
                peak("wide", Some(Isa::Avx512), 900.0),
                peak("narrow", Some(Isa::AvxVnni), 1000.0),
                peak("plain", Some(Isa::Scalar), 50.0),
            ],
            bf16: Vec::new(),
            f32: Vec::new(),
        };
        let of = |isa| peaks.gop_s(Number::Int8, isa);
        assert_eq!(of(None), 6900.0);
        assert_eq!(of(Some(Isa::Amx)), 6900.0);
        // Wider is not always faster.
        assert_eq!(of(Some(Isa::Avx512)), 1000.0);
        assert_eq!(of(Some(Isa::Avx2)), 50.0);
        assert_eq!(of(Some(Isa::Scalar)), 50.0);
    }

    #[test]
    fn cancellation_and_impossible_memory_are_errors() {
        let pool = Pool::new(Some(1)).unwrap();
        let cancel = Cancel::default();
        cancel.cancel();
        let cancelled = Peaks::measure(&pool, &PeakOptions::rough(), &cancel, |_, _| {});
        assert!(matches!(cancelled, Err(PeakError::Cancelled)));
        assert!(matches!(
            filled(&pool, usize::MAX / 2),
            Err(PeakError::Memory { .. })
        ));
    }

    #[test]
    fn the_buffer_exceeds_the_cache_and_leaves_memory_to_others() {
        let machine = Machine {
            last_cache: Some(512 << 20),
            memory_available: Some(1 << 40),
            ..Machine::default()
        };
        assert_eq!(PeakOptions::thorough(&machine).buffer, 2 << 30);
        let small = Machine {
            memory_available: Some(1 << 30),
            ..machine
        };
        assert_eq!(PeakOptions::thorough(&small).buffer, 256 << 20);
        let unknown = PeakOptions::thorough(&Machine::default());
        assert_eq!(unknown.buffer, 1 << 30);
    }
}
