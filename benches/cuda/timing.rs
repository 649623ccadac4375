//! How a kernel is timed: once alone for the check, then recorded, and replayed by the GPU's clock.

use crate::shapes::Shapes;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use phidias::engine::kernels::cuda::{Device, DeviceError, Recording};
use phidias::engine::{Isa, Kernels};
use std::sync::Arc;
use std::time::Duration;

/// Launches of a recording at most, but for those that make a turn whole.
const LAUNCHES: f64 = 64.0;
/// The seconds that it takes at most, likewise: the cost of a launch is then nothing beside them.
const SECONDS: f64 = 5e-3;
/// Rows at either end of a result that are compared.
const CHECKED: usize = 8;

/// A launch with all that it works on, to be done again and again.
pub trait Work {
    /// How many launches read different memory, one after the other.
    fn turns(&self) -> usize {
        1
    }

    fn launch(&self, device: &dyn Device, turn: usize) -> Result<(), DeviceError>;

    /// Compares what the first launch, of turn 0, has made with the definition.
    /// # Panics
    /// When they differ by more than the kernel may.
    fn check(&self) -> Result<(), DeviceError>;
}

/// What a figure counts, and how many of it.
#[derive(Clone, Copy, Debug)]
pub enum Cost {
    /// Where memory is the limit.
    Bytes(usize),
    /// Where arithmetic is.
    Operations(usize),
}

impl Cost {
    fn throughput(self) -> Throughput {
        match self {
            Self::Bytes(n) => Throughput::Bytes(n as u64),
            Self::Operations(n) => Throughput::Elements(n as u64),
        }
    }
}

/// So many tokens, rows or images.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub count: usize,
    pub cost: Cost,
}

/// Where everything is timed.
pub struct Bench {
    pub device: Arc<dyn Device>,
    pub shapes: Shapes,
    criterion: Criterion,
}

impl Bench {
    pub fn new(device: Arc<dyn Device>, shapes: Shapes) -> Self {
        Self {
            device,
            shapes,
            criterion: Criterion::default().configure_from_args(),
        }
    }

    /// Checks and times the cases that the command line asks for; only these are prepared. A group counts one
    /// thing, and its name says which.
    pub fn run<W: Work>(
        &mut self,
        what: &str,
        cases: &[Case],
        prepare: impl Fn(&Case) -> Result<W, DeviceError>,
    ) {
        for counted in ["bytes", "operations"] {
            let of_group = |case: &&Case| match case.cost {
                Cost::Bytes(_) => counted == "bytes",
                Cost::Operations(_) => counted == "operations",
            };
            let cases: Vec<_> = cases.iter().filter(of_group).collect();
            if cases.is_empty() {
                continue;
            }
            let mut group = (self.criterion).benchmark_group(format!("{what}, {counted}"));
            (group.sampling_mode(SamplingMode::Flat).sample_size(10))
                .warm_up_time(Duration::from_millis(300))
                .measurement_time(Duration::from_secs(1));
            for case in cases {
                let mut ready = None;
                group.throughput(case.cost.throughput());
                group.bench_function(BenchmarkId::from_parameter(case.count), |b| {
                    let ready = ready.get_or_insert_with(|| {
                        or_exit(prepare(case).and_then(|work| Ready::new(&self.device, work)))
                    });
                    b.iter_custom(|calls| or_exit(ready.time(calls)));
                });
            }
            group.finish();
        }
    }

    pub fn finish(&mut self) {
        self.criterion.final_summary();
    }
}

/// A device that fails ends the program: Criterion has no other way out of a measurement.
fn or_exit<T>(result: Result<T, DeviceError>) -> T {
    result.unwrap_or_else(|error| {
        eprintln!("cuda: {error}");
        std::process::exit(1)
    })
}

/// Work that was checked and recorded.
struct Ready<W> {
    device: Arc<dyn Device>,
    recording: Box<dyn Recording>,
    launches: u64,
    /// What the recording works on.
    _work: W,
}

impl<W: Work> Ready<W> {
    fn new(device: &Arc<dyn Device>, work: W) -> Result<Self, DeviceError> {
        work.launch(&**device, 0)?;
        work.check()?;
        let once = device.seconds(&mut || work.launch(&**device, 0))?;
        let turns = work.turns();
        let wanted = (SECONDS / once).clamp(1.0, LAUNCHES) as usize;
        let launches = wanted.next_multiple_of(turns);
        let recording = device
            .record(&mut || (0..launches).try_for_each(|i| work.launch(&**device, i % turns)))?;
        Ok(Self {
            device: Arc::clone(device),
            recording,
            launches: launches as u64,
            _work: work,
        })
    }

    /// The time of `calls` launches: their share of as many whole recordings as it takes.
    fn time(&self, calls: u64) -> Result<Duration, DeviceError> {
        let replays = calls.div_ceil(self.launches);
        let seconds = (self.device)
            .seconds(&mut || (0..replays).try_for_each(|_| self.recording.replay()))?;
        let share = calls as f64 / (replays * self.launches) as f64;
        Ok(Duration::from_secs_f64(seconds * share))
    }
}

/// The definition.
pub fn scalar() -> &'static Kernels {
    Kernels::for_isa(Isa::Scalar).expect("everywhere")
}

/// Which of `n` rows are compared: the first ones and the last ones.
pub fn checked(n: usize) -> impl Iterator<Item = usize> {
    (0..n).filter(move |i| *i < CHECKED || n - i <= CHECKED)
}

/// Compares values with the definition's: each may be off by `tolerance` times the largest, and by `slack`
/// of its own.
/// # Panics
/// When one is off by more.
pub fn assert_near(got: &[f32], want: &[f32], tolerance: f32, slack: impl Fn(usize) -> f32) {
    assert_eq!(got.len(), want.len(), "values and those expected");
    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.0, "the definition gives only zeros");
    let count = got.len();
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        // Not `>`: a NaN is never admitted.
        let near = (got - want).abs() <= tolerance * largest + slack(i);
        assert!(
            near,
            "value {i} of {count}: {got} for {want}, the largest is {largest}"
        );
    }
}

/// SplitMix64 (Steele, Lea & Flood 2014): values in -1..1.
pub struct Random(pub u64);

impl Random {
    pub fn value(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}
