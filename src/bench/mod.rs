//! Measuring: how fast a model runs, as a share of what the machine can do.
//!
//! [`account`] counts what a token must read and compute, [`model`] times it, and
//! [`phidias_engine::peaks`] says what the machine could do at best, measured in the same run;
//! [`limits`], how much of that a table of kernels can have.
//! [`kernels`] times the [`operations`] of a forward pass alone, [`roofline`] draws them. [`lookup`]
//! times whole texts, with guesses and without; [`picture`] what a vision model does with a picture.

pub mod account;
pub mod kernels;
pub mod limits;
pub mod lookup;
pub mod model;
pub mod operations;
pub mod picture;
pub mod place;
pub mod roofline;

pub use account::{Account, Work};
pub use kernels::{KernelBench, KernelRecord};
pub use limits::{Around, Limit, Limits, Roof};
pub use lookup::{LookupBench, LookupError, LookupRecord};
pub use model::{ModelBench, Record, Test, TestError};
pub use phidias_engine::peaks::{Peak, PeakError, PeakOptions, Peaks, Spread};
pub use picture::{PictureBench, PictureRecord};
pub use place::Place;

use phidias_engine::kv_cache::KvType;
use phidias_engine::{Cancel, Kernels};
use phidias_models::{Model, Session, SessionOptions};
use std::sync::Arc;

/// What a measurement is doing.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The part of the work.
    pub what: &'a str,
    /// How much of it is done.
    pub done: usize,
    /// How much there is; 0 when it has no parts.
    pub total: usize,
}

/// Told what a measurement is doing, between the times that count.
pub type Progress = Arc<dyn Fn(Step<'_>) + Send + Sync>;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A test that this model cannot run.
    #[error(transparent)]
    Test(#[from] TestError),
    /// A text that this model cannot say, or said otherwise.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// What the model reports.
    #[error(transparent)]
    Model(#[from] phidias_models::Error),
    /// What the peaks report.
    #[error(transparent)]
    Peaks(#[from] PeakError),
    /// The device failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Device(phidias_engine::kernels::cuda::DeviceError),
    /// The answer is no answer, so its speed means nothing.
    #[error("{test}: the logits hold a value that is not finite; nothing was timed")]
    NotFinite {
        /// The test.
        test: Test,
    },
    /// A kernel computes something else than its definition.
    #[error("{kernel}: the {isa} table's result differs from the scalar one's; nothing was timed")]
    WrongResult {
        /// Kernel and shape.
        kernel: String,
        /// The table.
        isa: phidias_engine::Isa,
    },
    /// The allocator refused.
    #[error("out of memory: {bytes} bytes of weights more were asked for")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// Pictures that are not seen alike, or not at all.
    #[error("the picture: the encoder gave {0}; its speed means nothing")]
    Picture(&'static str),
    /// Two repetitions of one computation differ.
    #[error(
        "{test}: repetition {repetition} gave other logits than the first; its speed means nothing"
    )]
    NotRepeatable {
        /// The test.
        test: Test,
        /// Which repetition, from 1.
        repetition: usize,
    },
}

/// What a model is measured under.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// The model's name in the records.
    pub name: String,
    /// Timed repetitions of each test, after a warm-up.
    pub repetitions: usize,
    /// Numbers of threads; everything with the first, then with the next. On a device they do not matter.
    pub threads: Vec<usize>,
    /// What the cache stores; `None`: as [`SessionOptions`] has it.
    pub kv_type: Option<KvType>,
    /// The kernels.
    pub kernels: &'static Kernels,
    /// Stops everything.
    pub cancel: Cancel,
}

impl Conditions {
    /// A session under them.
    fn session(
        &self,
        model: &Arc<Model>,
        context: usize,
        threads: usize,
    ) -> Result<Session, BenchError> {
        let options = SessionOptions {
            context: Some(context),
            kv_type: self.kv_type,
            threads: Some(threads),
            kernels: Some(self.kernels),
            ..SessionOptions::default()
        };
        let mut session = Session::new(Arc::clone(model), &options)?;
        session.set_cancel(self.cancel.clone());
        Ok(session)
    }
}

/// The bits of logits; `None` when one of them is not finite.
fn finite_bits(logits: &[f32]) -> Option<Vec<u32>> {
    let bits = |v: &f32| v.is_finite().then(|| v.to_bits());
    logits.iter().map(bits).collect()
}

/// Token ids that are always the same and look random.
#[must_use]
pub fn token_ids(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0u64;
    (0..count)
        .map(|_| (split_mix(&mut state) % vocab.max(1) as u64) as u32)
        .collect()
}

/// SplitMix64 (Steele, Lea & Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
