//! The kernels alone: time, bytes, operations, and which limit of the machine binds.
//!
//! Each operation's result on a few tokens is compared with the scalar table's before it is timed.
//! An operation is limited by memory when its bytes take longer at the read bandwidth than its
//! operations at the rate of the multipliers, and its share is that longer time by the measured one.
//! Weights and caches are larger together than the last cache; activations are not, so what works on
//! activations alone can be faster than memory.

use super::limits::{Around, Limit, Roof};
use super::operations::{CHECKED, Operation, Prepared, all};
use super::{BenchError, PeakOptions, Peaks, Progress, Spread, Step};
use phidias_engine::backend::Cpu;
use phidias_engine::pool::Pool;
use phidias_engine::{Cancel, Isa, Kernels};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Clone, Debug)]
pub struct KernelBench {
    /// The operations.
    pub operations: Vec<Operation>,
    /// Threads.
    pub threads: usize,
    /// The kernels.
    pub kernels: &'static Kernels,
    /// How the machine's limits are measured, before and after.
    pub peaks: PeakOptions,
    /// Bytes of weights that are visited in turn.
    pub working_set: usize,
    /// Time to spend on each operation and number of tokens.
    pub time: Duration,
    /// Stops everything.
    pub cancel: Cancel,
}

/// One operation's figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelRecord {
    /// Family of kernels and format.
    pub kernel: String,
    /// Shape in words.
    pub shape: String,
    /// Tokens.
    pub tokens: usize,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Calls that were timed.
    pub calls: usize,
    /// Seconds a call.
    pub seconds: Spread,
    /// Bytes that a call must read and write.
    pub bytes: usize,
    /// Operations of a call.
    pub ops: usize,
    /// 10^9 bytes a second at the median.
    pub gb_s: f64,
    /// 10^9 operations a second at the median.
    pub gop_s: f64,
    /// Read bandwidth of the machine, mean of before and after.
    pub peak_gb_s: f64,
    /// Multiply-add rate of `peak_instruction`, mean of before and after.
    pub peak_gop_s: f64,
    /// The numbers that `peak_gop_s` multiplies.
    pub peak_number: Limit,
    /// The fastest instruction for them that the table in use can have for so many tokens.
    pub peak_instruction: String,
    /// The limit that binds.
    pub bound: Limit,
    /// Of that limit.
    pub share_of_peak: f64,
    /// The limits before and after.
    pub peaks: Around,
}

impl KernelRecord {
    /// The limit that binds, by name.
    #[must_use]
    pub fn limit(&self) -> &str {
        match self.bound {
            Limit::Memory => "memory",
            _ => &self.peak_instruction,
        }
    }

    /// The roofs that some records are under, each once.
    #[must_use]
    pub fn roofs(records: &[Self]) -> Vec<Roof> {
        let mut roofs: Vec<Roof> = Vec::new();
        for r in records {
            if roofs
                .iter()
                .all(|roof| roof.instruction != r.peak_instruction)
            {
                roofs.push(Roof {
                    number: r.peak_number,
                    instruction: r.peak_instruction.clone(),
                    gop_s: r.peak_gop_s,
                });
            }
        }
        roofs
    }
}

impl KernelBench {
    /// Every operation, with figures of the usual care.
    #[must_use]
    pub fn new(
        kernels: &'static Kernels,
        threads: usize,
        peaks: PeakOptions,
        last_cache: Option<usize>,
        cancel: Cancel,
    ) -> Self {
        Self {
            operations: all(),
            threads,
            kernels,
            peaks,
            working_set: (3 * last_cache.unwrap_or(0)).clamp(192 << 20, 1 << 30),
            time: Duration::from_millis(400),
            cancel,
        }
    }

    /// Times everything.
    /// # Errors
    /// A result that is not the scalar table's; memory that is refused; cancellation.
    pub fn run(&self, progress: &Progress) -> Result<Vec<KernelRecord>, BenchError> {
        let pool = Arc::new(Pool::new(Some(self.threads)).map_err(phidias_models::Error::from)?);
        let cpu = Cpu::new(self.kernels, Arc::clone(&pool));
        let limits = || {
            let told = |done, total| {
                progress(Step {
                    what: "the machine's limits",
                    done,
                    total,
                });
            };
            Peaks::measure(&pool, &self.peaks, &self.cancel, told)
        };
        let before = limits()?;
        let mut timed = Vec::new();
        for (i, operation) in self.operations.iter().enumerate() {
            let what = format!("{} {}", operation.kernel(), operation.shape());
            progress(Step {
                what: &what,
                done: i,
                total: self.operations.len(),
            });
            self.stopped()?;
            let mut prepared = operation.prepare(&cpu, self.working_set, &self.cancel)?;
            check(&cpu, &mut prepared, &what)?;
            for tokens in operation.tokens() {
                prepared.set_tokens(&cpu, tokens);
                let samples = self.time(&cpu, &mut prepared)?;
                timed.push((operation, tokens, prepared.stored(), samples));
            }
        }
        let after = limits()?;
        Ok((timed.into_iter())
            .map(|(operation, tokens, stored, samples)| {
                self.record(operation, tokens, stored, &samples, [&before, &after])
            })
            .collect())
    }

    fn stopped(&self) -> Result<(), BenchError> {
        if self.cancel.is_cancelled() {
            return Err(phidias_models::Error::Cancelled.into());
        }
        Ok(())
    }

    /// Seconds a call, several samples. Short calls are timed in groups, inside one entry into the pool.
    fn time(&self, cpu: &Cpu, prepared: &mut Prepared) -> Result<Vec<f64>, BenchError> {
        const SAMPLE: Duration = Duration::from_millis(2);
        const SAMPLES: usize = 100;
        const FEWEST: usize = 3;
        timed(cpu, prepared, 1); // takes its memory
        let once = timed(cpu, prepared, 1);
        let group = (SAMPLE.as_secs_f64() / once.max(1e-9))
            .ceil()
            .clamp(1.0, 1e4) as usize;
        let mut samples = Vec::new();
        let start = Instant::now();
        while samples.len() < FEWEST || (start.elapsed() < self.time && samples.len() < SAMPLES) {
            self.stopped()?;
            samples.push(timed(cpu, prepared, group));
        }
        Ok(samples)
    }

    fn record(
        &self,
        operation: &Operation,
        tokens: usize,
        stored: usize,
        samples: &[f64],
        [before, after]: [&Peaks; 2],
    ) -> KernelRecord {
        let cost = operation.cost(tokens, stored);
        let seconds = Spread::of(samples).expect("at least one sample");
        let (bytes, ops) = (cost.bytes as f64 / 1e9, cost.ops as f64 / 1e9);
        let isa = Some(self.kernels.isa_for(operation.packed(), tokens));
        let peaks = Around::of(before, after, isa);
        let peak_gb_s = peaks.mean(|l| l.read_gb_s);
        let Roof {
            number: peak_number,
            instruction: peak_instruction,
            gop_s: peak_gop_s,
        } = Roof::of(before, after, isa, cost.number);
        let (memory, compute) = (bytes / peak_gb_s, ops / peak_gop_s);
        KernelRecord {
            kernel: operation.kernel(),
            shape: operation.shape(),
            tokens,
            isa: self.kernels.isa().name(),
            threads: self.threads,
            calls: samples.len(),
            seconds,
            bytes: cost.bytes,
            ops: cost.ops,
            gb_s: bytes / seconds.median,
            gop_s: ops / seconds.median,
            peak_gb_s,
            peak_gop_s,
            peak_number,
            peak_instruction,
            bound: if memory > compute {
                Limit::Memory
            } else {
                peak_number
            },
            share_of_peak: memory.max(compute) / seconds.median,
            peaks,
        }
    }
}

/// Seconds a call, of `calls` calls.
fn timed(cpu: &Cpu, prepared: &mut Prepared, calls: usize) -> f64 {
    prepared.time(cpu, calls).as_secs_f64() / calls as f64
}

/// Compares the results on a few tokens with the scalar table's. Sums of thousands of products are
/// rounded in another order at most: far below a thousandth of the largest result.
fn check(cpu: &Cpu, prepared: &mut Prepared, what: &str) -> Result<(), BenchError> {
    let scalar = Kernels::for_isa(Isa::Scalar).expect("everywhere");
    let definition = Cpu::new(scalar, Arc::clone(cpu.pool()));
    let mut result = |cpu: &Cpu| {
        prepared.set_tokens(cpu, CHECKED);
        timed(cpu, prepared, 1);
        prepared.result(cpu)
    };
    let (want, got) = (result(&definition), result(cpu));
    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let equal = |(a, b): (&f32, &f32)| (a - b).abs() <= largest * 1e-3;
    if want.len() != got.len() || largest == 0.0 || !want.iter().zip(&got).all(equal) {
        return Err(BenchError::WrongResult {
            kernel: what.to_owned(),
            isa: cpu.kernels().isa(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use phidias_models::WeightFormat;

    #[test]
    fn small_operations_are_checked_and_timed() {
        let linear = |format| Operation::Linear {
            format,
            name: "small",
            rows: 48,
            cols: 128,
            tokens: &[1, 3],
        };
        let bench = KernelBench {
            operations: vec![
                linear(WeightFormat::Q4),
                linear(WeightFormat::F32),
                Operation::RmsNorm,
                Operation::Quantize,
                Operation::Rope,
                Operation::SiluMul,
                Operation::LayerNorm,
                Operation::Gegelu,
                Operation::QuickGelu,
                Operation::Gelu,
            ],
            working_set: 10_000,
            time: Duration::ZERO,
            ..KernelBench::new(
                Kernels::best(),
                2,
                PeakOptions::rough(),
                None,
                Cancel::default(),
            )
        };
        let progress: Progress = Arc::new(|_| {});
        let records = bench.run(&progress).unwrap();
        assert_eq!(records.len(), 12);
        for r in &records {
            assert!(r.seconds.min > 0.0 && r.share_of_peak > 0.0, "{r:?}");
            let ratio = r.gop_s / r.gb_s * r.bytes as f64 / r.ops as f64;
            assert!((ratio - 1.0).abs() < 1e-9);
        }
        assert_eq!(records[0].bytes, 48 * 128 / 32 * 18 + 4 * (48 + 128));
        assert_eq!((records[1].tokens, records[1].ops), (3, 2 * 3 * 48 * 128));
        bench.cancel.cancel();
        assert!(bench.run(&progress).is_err());
    }
}
