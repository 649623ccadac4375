//! A picture on its way to the decoder: what each stage takes.
//!
//! ```text
//! decode     the file's bytes into pixels
//! prepare    resized, laid on white
//! encode     cut, normalised, and all crops through CLIP: operations of its matrices for the tokens of
//!            every crop, 4 tokens^2 hidden more a crop and layer for the scores and weighted values
//! project    the projector's matrices for every row
//! ```
//!
//! A share is of the 8-bit multiply-adds measured around the test, of the f32 ones where the weights are
//! floats; attention, which is f32 throughout, counts like the rest.

use super::limits::{Around, Roof};
use super::{BenchError, Conditions, PeakOptions, Place, Progress, Spread, Step};
use phidias_engine::pool::Pool;
use phidias_models::image::{ImageProcessor, Picture, Processed};
use phidias_models::{Error, Model};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// What to measure.
#[derive(Clone, Debug)]
pub struct PictureBench {
    /// What it is measured under.
    pub conditions: Conditions,
    /// How the machine's limits are measured, before and after.
    pub peaks: PeakOptions,
}

/// One picture's figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PictureRecord {
    /// Model.
    pub model: String,
    /// Format of its weights.
    pub format: &'static str,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Always `picture`.
    pub kind: &'static str,
    /// Crops, the global view included.
    pub crops: usize,
    /// Positions that the picture takes.
    pub tokens: usize,
    /// Timed repetitions.
    pub reps: usize,
    /// Seconds.
    pub decode_s: Spread,
    /// Seconds.
    pub prepare_s: Spread,
    /// Seconds.
    pub encode_s: Spread,
    /// Seconds.
    pub project_s: Spread,
    /// Operations of encoder and projector.
    pub ops: f64,
    /// 10^9 operations a second of both, at the medians.
    pub gop_s: f64,
    /// Multiply-add rate of `peak_instruction`, mean of before and after.
    pub peak_gop_s: f64,
    /// Of that rate.
    pub share_of_peak: f64,
    /// The fastest instruction for the weights' numbers that the table in use can have.
    pub peak_instruction: String,
    /// What encoded: the CPU, or a device's name.
    pub device: String,
    /// The limits before and after.
    pub peaks: Around,
}

/// Seconds of the stages of one repetition.
#[derive(Default)]
struct Stages {
    decode: Vec<f64>,
    prepare: Vec<f64>,
    encode: Vec<f64>,
    project: Vec<f64>,
}

impl PictureBench {
    /// Times one picture with each number of threads.
    /// # Errors
    /// A model that sees none, a picture that cannot be read, features that are not finite or differ from
    /// one repetition to the next, cancellation.
    pub fn run<E: From<BenchError>>(
        &self,
        model: &Arc<Model>,
        file: &Path,
        processor: &ImageProcessor,
        progress: &Progress,
        mut each: impl FnMut(PictureRecord) -> Result<(), E>,
    ) -> Result<(), E> {
        for &threads in &self.conditions.threads {
            each(self.measure(model, file, processor, threads, progress)?)?;
        }
        Ok(())
    }

    fn measure(
        &self,
        model: &Arc<Model>,
        file: &Path,
        processor: &ImageProcessor,
        threads: usize,
        progress: &Progress,
    ) -> Result<PictureRecord, BenchError> {
        let c = &self.conditions;
        let (vision, _) = model.vision()?;
        let mut session = c.session(model, 1, threads)?;
        let place = Place::of(&session);
        // The resize is the CPU's, wherever the encoder is.
        let pool = Pool::new(Some(threads)).map_err(Error::from)?;
        let told = |what: &str, done, total| progress(Step { what, done, total });
        let limits = || place.peaks(&self.peaks, &c.cancel, progress);
        let before = limits()?;
        let mut stages = Stages::default();
        let mut first: Option<Vec<u32>> = None;
        let mut prepared: Option<Processed> = None;
        for repetition in 0..=c.repetitions {
            told("the picture", repetition, c.repetitions + 1);
            let start = Instant::now();
            let picture = Picture::open(file).map_err(Error::from)?;
            let decoded = Instant::now();
            let processed = pool.install(|| processor.process(&picture));
            let processed = processed.map_err(Error::from)?;
            let ready = Instant::now();
            let mut encoded = ready;
            let pictures = std::slice::from_ref(&processed);
            let features = session.encode(pictures, &mut |_| encoded = Instant::now())?;
            let end = Instant::now();
            let bits = features.iter().map(|f| super::finite_bits(f.data()));
            let Some(bits) = bits.collect::<Option<Vec<_>>>() else {
                return Err(BenchError::Picture("features that are not finite"));
            };
            let bits = bits.concat();
            if first.get_or_insert_with(|| bits.clone()) != &bits {
                return Err(BenchError::Picture("other features each time"));
            }
            prepared = Some(processed);
            if repetition == 0 {
                continue; // takes its memory
            }
            stages.decode.push((decoded - start).as_secs_f64());
            stages.prepare.push((ready - decoded).as_secs_f64());
            stages.encode.push((encoded - ready).as_secs_f64());
            stages.project.push((end - encoded).as_secs_f64());
        }
        let after = limits()?;
        let picture = prepared.expect("at least the warm-up");
        let spread = |samples: &[f64]| Spread::of(samples).expect("at least one repetition");
        let (encode_s, project_s) = (spread(&stages.encode), spread(&stages.project));
        let ops = vision.operations(picture.crops(), picture.tokens());
        let gop_s = ops / 1e9 / (encode_s.median + project_s.median);
        let isa = place.isa_for(model.format(), picture.tokens());
        let roof = Roof::of(&before, &after, isa, place.multiplies(model.format()));
        Ok(PictureRecord {
            model: c.name.clone(),
            format: model.format().name(),
            device: place.name(),
            isa: place.isa(),
            threads: place.threads(),
            kind: "picture",
            crops: picture.crops(),
            tokens: picture.tokens(),
            reps: c.repetitions,
            decode_s: spread(&stages.decode),
            prepare_s: spread(&stages.prepare),
            encode_s,
            project_s,
            ops,
            gop_s,
            peak_gop_s: roof.gop_s,
            share_of_peak: gop_s / roof.gop_s,
            peak_instruction: roof.instruction,
            peaks: Around::of(&before, &after, isa),
        })
    }
}
