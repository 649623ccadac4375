//! A model's speed: prefill and decode, at any depth, with any number of threads.
//!
//! The cache is filled to the depth once and truncated back between repetitions. Token ids are fixed,
//! so each repetition computes the same thing, and that is checked: the logits after the last token
//! must be finite and, bit for bit, those of the first repetition. Sampling is not timed. A device is
//! timed by its own events, from before a pass is asked for until its logits are read.
//!
//! The machine's limits are measured before the first test, between two and after the last, so that
//! each test has its own just before and just after it.

use super::account::{Account, Work};
use super::limits::{Around, Limit, Roof};
use super::{
    BenchError, Conditions, PeakOptions, Peaks, Place, Progress, Spread, Step, finite_bits,
    token_ids,
};
use phidias_engine::generate::Sequence;
use phidias_engine::kv_cache::KvType;
use phidias_models::blocks::moe::LayerRouting;
use phidias_models::session::Prefill;
use phidias_models::{Config, Model, Session, SessionOptions};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Many tokens at once.
    Prefill,
    /// One token at a time.
    Decode,
}

/// One test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// What is timed.
    pub kind: Kind,
    /// Tokens, at least one.
    pub tokens: usize,
    /// Tokens that are in the cache before.
    pub depth: usize,
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Prefill => "pp",
            Kind::Decode => "tg",
        };
        write!(f, "{kind}{}", self.tokens)?;
        match self.depth {
            0 => Ok(()),
            depth => write!(f, " @ d{depth}"),
        }
    }
}

/// Why a model cannot run a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TestError {
    /// No tokens.
    #[error("{0}: expected at least one token")]
    Empty(Test),
    /// More positions than the model has.
    #[error(
        "{test}: needs {needed} positions, the model has {context}; ask for fewer tokens (-p, -n) or less depth (-d)"
    )]
    Context {
        /// The test.
        test: Test,
        /// Positions it needs.
        needed: usize,
        /// Positions there are.
        context: usize,
    },
    /// The sequence would outgrow the model's original length while it is timed.
    #[error(
        "{test}: the sequence outgrows the model's original length of {original} on the way, where the whole cache is computed again; choose a depth of at most {} or from {original} on",
        original.saturating_sub(test.tokens)
    )]
    Crossing {
        /// The test.
        test: Test,
        /// `original_max_position_embeddings`
        original: usize,
    },
}

impl Test {
    /// Whether a model of this configuration can run it.
    /// # Errors
    /// [`TestError`].
    pub fn check(self, config: &Config) -> Result<(), TestError> {
        let (test, context) = (self, config.max_position_embeddings);
        let needed = self.needed();
        if self.tokens == 0 {
            return Err(TestError::Empty(test));
        }
        if needed > context {
            return Err(TestError::Context {
                test,
                needed,
                context,
            });
        }
        match &config.rope.long {
            Some(long) if self.kind == Kind::Decode => {
                let original = long.original_max_position_embeddings;
                if self.depth < original && needed > original {
                    return Err(TestError::Crossing { test, original });
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Positions that it needs.
    fn needed(self) -> usize {
        self.depth.saturating_add(self.tokens)
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct ModelBench {
    /// Model, repetitions, threads and so on.
    pub conditions: Conditions,
    /// Tests, run in this order.
    pub tests: Vec<Test>,
    /// How the machine's limits are measured.
    pub peaks: PeakOptions,
}

/// One test's figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Record {
    /// Name of the model.
    pub model: String,
    /// Format of its matrices.
    pub format: &'static str,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads of the CPU; 0 on a device.
    pub threads: usize,
    /// What was timed.
    pub kind: Kind,
    /// Tokens.
    pub tokens: usize,
    /// Tokens in the cache before.
    pub depth: usize,
    /// Repetitions.
    pub reps: usize,
    /// Tokens a second.
    pub tok_s: Spread,
    /// Bytes a token must read: weights and cache.
    pub bytes_per_token: u64,
    /// Operations on the weights a token; those of attention are `attention_ops_per_token`.
    pub ops_per_token: u64,
    /// 10^9 bytes a second at the median.
    pub gb_s: f64,
    /// 10^9 operations a second at the median, attention not counted.
    pub gop_s: f64,
    /// Read bandwidth of the machine, mean of before and after.
    pub peak_gb_s: f64,
    /// Multiply-add rate of `peak_instruction`, mean of before and after.
    pub peak_gop_s: f64,
    /// Prefill: of the multiply-add rate. Decode: of the read bandwidth.
    pub share_of_peak: f64,
    /// What the cache stores.
    pub kv: &'static str,
    /// Of `bytes_per_token`: weights.
    pub weight_bytes_per_token: u64,
    /// Of `bytes_per_token`: keys and values.
    pub kv_bytes_per_token: u64,
    /// Operations on keys and values a token.
    pub attention_ops_per_token: u64,
    /// The numbers that `peak_gop_s` multiplies.
    pub peak_number: Limit,
    /// The fastest instruction for them that the table in use can have for as many tokens as a pass has.
    pub peak_instruction: String,
    /// The limit that allows the fewest tokens a second.
    pub bound: Limit,
    /// What computed: the CPU, or a device's name.
    pub device: String,
    /// Tokens a second of each repetition.
    pub samples: Vec<f64>,
    /// The limits just before the test and just after it.
    pub peaks: Around,
    /// Of each layer, how the tokens of all repetitions were spread over its experts.
    #[serde(skip)]
    pub routing: Vec<LayerRouting>,
}

/// What was timed.
struct Timed {
    test: Test,
    samples: Vec<f64>,
    routing: Vec<LayerRouting>,
    work: Work,
    /// Tokens that a pass has.
    a_pass: usize,
}

impl ModelBench {
    /// Whether the model can run every test; costs nothing.
    /// # Errors
    /// [`TestError`] of the first that it cannot.
    pub fn check(&self, config: &Config) -> Result<(), TestError> {
        self.tests.iter().try_for_each(|test| test.check(config))
    }

    /// Runs all tests; `each` gets the record of a test when it is done.
    /// # Errors
    /// A test that the model cannot run; what the model reports; cancellation.
    pub fn run<E: From<BenchError>>(
        &self,
        model: &Arc<Model>,
        progress: &Progress,
        mut each: impl FnMut(Record) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check(model.config()).map_err(BenchError::from)?;
        for &threads in &self.conditions.threads {
            self.with_threads(model, threads, progress, &mut each)?;
        }
        Ok(())
    }

    fn with_threads<E: From<BenchError>>(
        &self,
        model: &Arc<Model>,
        threads: usize,
        progress: &Progress,
        each: &mut impl FnMut(Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let context = self.tests.iter().map(|t| t.needed()).max().unwrap_or(1);
        let session = self.conditions.session(model, context, threads)?;
        let mut runner = Runner::new(session, progress);
        let kv_type = runner.session.cache().kind();
        let account = Account::of(model, kv_type);
        let place = runner.place.clone();
        let mut before = self.measure_peaks(&place, progress)?;
        for &test in &self.tests {
            let (samples, routing) = runner.time(test, self.conditions.repetitions)?;
            let reads: usize = routing.iter().map(|layer| layer.reads as usize).sum();
            let reads = reads / samples.len().max(1);
            let work = match test.kind {
                Kind::Prefill => account.prefill(test.depth, test.tokens, runner.chunk, reads),
                Kind::Decode => account.decode(test.depth, test.tokens),
            };
            let after = self.measure_peaks(&place, progress)?;
            let timed = Timed {
                test,
                samples,
                routing,
                work,
                a_pass: match test.kind {
                    Kind::Prefill => test.tokens.min(runner.chunk),
                    Kind::Decode => 1,
                },
            };
            each(self.record(model, &place, kv_type, timed, [&before, &after]))?;
            before = after;
        }
        Ok(())
    }

    fn measure_peaks(&self, place: &Place, progress: &Progress) -> Result<Peaks, BenchError> {
        place.peaks(&self.peaks, &self.conditions.cancel, progress)
    }

    fn record(
        &self,
        model: &Model,
        place: &Place,
        kv_type: KvType,
        timed: Timed,
        [before, after]: [&Peaks; 2],
    ) -> Record {
        let Timed {
            test,
            samples,
            routing,
            work,
            a_pass,
        } = timed;
        let tok_s = Spread::of(&samples).expect("at least one repetition");
        let isa = place.isa_for(model.format(), a_pass);
        let peaks = Around::of(before, after, isa);
        let peak_gb_s = peaks.mean(|l| l.read_gb_s);
        let Roof {
            number: peak_number,
            instruction: peak_instruction,
            gop_s: peak_gop_s,
        } = Roof::of(before, after, isa, place.multiplies(model.format()));
        let gb_s = work.bytes() * tok_s.median / 1e9;
        let gop_s = work.ops * tok_s.median / 1e9;
        let memory_binds = work.bytes() / peak_gb_s > work.ops / peak_gop_s;
        Record {
            model: self.conditions.name.clone(),
            format: model.format().name(),
            device: place.name(),
            isa: place.isa(),
            threads: place.threads(),
            kind: test.kind,
            tokens: test.tokens,
            depth: test.depth,
            reps: samples.len(),
            tok_s,
            bytes_per_token: whole(work.bytes()),
            ops_per_token: whole(work.ops),
            gb_s,
            gop_s,
            peak_gb_s,
            peak_gop_s,
            share_of_peak: match test.kind {
                Kind::Prefill => gop_s / peak_gop_s,
                Kind::Decode => gb_s / peak_gb_s,
            },
            kv: kv_type.name(),
            weight_bytes_per_token: whole(work.weight_bytes),
            kv_bytes_per_token: whole(work.kv_bytes),
            attention_ops_per_token: whole(work.attention_ops),
            peak_number,
            peak_instruction,
            bound: if memory_binds {
                Limit::Memory
            } else {
                peak_number
            },
            samples,
            peaks,
            routing,
        }
    }
}

/// A session that runs tests.
struct Runner {
    session: Session,
    place: Place,
    /// The fixed sequence; the cache always holds a part of its beginning.
    ids: Vec<u32>,
    progress: Progress,
    /// Whether the session is filling its cache: a prompt that is timed draws no bars.
    filling: Arc<AtomicBool>,
    chunk: usize,
}

impl Runner {
    fn new(mut session: Session, progress: &Progress) -> Self {
        let filling = Arc::new(AtomicBool::new(false));
        let (flag, told) = (Arc::clone(&filling), Arc::clone(progress));
        session.set_progress(move |p: Prefill| {
            if flag.load(Ordering::Relaxed) {
                told(Step {
                    what: "filling the cache",
                    done: p.done,
                    total: p.total,
                });
            }
        });
        Self {
            ids: token_ids(session.context(), session.model().config().vocab_size),
            progress: Arc::clone(progress),
            filling,
            chunk: SessionOptions::default().chunk,
            place: Place::of(&session),
            session,
        }
    }

    /// Tokens a second of each repetition, and the routing of all of them.
    fn time(
        &mut self,
        test: Test,
        repetitions: usize,
    ) -> Result<(Vec<f64>, Vec<LayerRouting>), BenchError> {
        self.fill(test.depth)?;
        self.warm_up(test)?;
        self.session.take_routing()?;
        let mut samples = Vec::new();
        let mut first = None;
        for repetition in 1..=repetitions.max(1) {
            let (seconds, logits) =
                self.repetition(test, test.tokens, repetition - 1, repetitions)?;
            let bits = finite_bits(&logits).ok_or(BenchError::NotFinite { test })?;
            if *first.get_or_insert_with(|| bits.clone()) != bits {
                return Err(BenchError::NotRepeatable { test, repetition });
            }
            samples.push(test.tokens as f64 / seconds);
        }
        Ok((samples, self.session.take_routing()?))
    }

    /// Brings the cache to `depth` tokens, with the frequencies that one token more asks for.
    fn fill(&mut self, depth: usize) -> Result<(), BenchError> {
        self.session.truncate(depth);
        let have = self.session.ids().len();
        self.filling.store(true, Ordering::Relaxed);
        // With more positions than the original length, the first chunk must know of the last.
        let filled = self.session.extend(&self.ids[have..=depth]).map(|_| ());
        self.filling.store(false, Ordering::Relaxed);
        filled?;
        self.session.truncate(depth);
        Ok(())
    }

    /// Touches what the test touches: a chunk of a prompt, some tokens of an answer. All of a prompt
    /// when it is that prompt that outgrows the original length, so that the cache is computed again
    /// here and not in the first repetition.
    fn warm_up(&mut self, test: Test) -> Result<(), BenchError> {
        const DECODED: usize = 8;
        let rope = &self.session.model().transformer().rope;
        let tokens = match test.kind {
            Kind::Decode => test.tokens.min(DECODED),
            Kind::Prefill if rope.regime(test.depth + 1) != rope.regime(test.needed()) => {
                test.tokens
            }
            Kind::Prefill => test.tokens.min(self.chunk),
        };
        self.repetition(test, tokens, 0, 0)?;
        Ok(())
    }

    /// The first `tokens` tokens of a test: seconds and the last logits. Ends as it began.
    fn repetition(
        &mut self,
        test: Test,
        tokens: usize,
        done: usize,
        total: usize,
    ) -> Result<(f64, Vec<f32>), BenchError> {
        let what = match total {
            0 => format!("{test}: warming up"),
            _ => test.to_string(),
        };
        let ids = &self.ids[test.depth..test.depth + tokens];
        let step = match test.kind {
            Kind::Prefill => tokens,
            Kind::Decode => 1,
        };
        let mut seconds = 0.0;
        for (i, part) in ids.chunks(step).enumerate() {
            (self.progress)(Step {
                what: &what,
                done: done * tokens + i * step,
                total: total * tokens,
            });
            let session = &mut self.session;
            // What greedy decoding asks for; on a device all logits are not part of it.
            let pass = || Ok(Sequence::extend(session, part, 1, Some(1), &mut |_, _| {})?);
            seconds += self.place.seconds(pass)?.0;
        }
        let last = test.depth + tokens - 1;
        let logits = self.session.logits(last)?.to_vec();
        self.session.truncate(test.depth);
        Ok((seconds, logits))
    }
}

/// An average over tokens, to the nearest whole number.
fn whole(value: f64) -> u64 {
    value.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn config() -> Config {
        let json = json!({
            "model_type": "phi3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "original_max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
            "rope_scaling": { "type": "longrope", "short_factor": ([1.0; 4]), "long_factor": ([2.0; 4]) },
        });
        Config::from_json(Path::new("config.json"), json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn tests_that_a_model_cannot_run_are_told_apart() {
        let config = config();
        let check = |kind, tokens, depth| {
            Test {
                kind,
                tokens,
                depth,
            }
            .check(&config)
        };
        assert!(matches!(
            check(Kind::Decode, 0, 3),
            Err(TestError::Empty(_))
        ));
        assert_eq!(check(Kind::Prefill, 128, 0), Ok(()));
        assert!(matches!(
            check(Kind::Prefill, 128, 1),
            Err(TestError::Context {
                needed: 129,
                context: 128,
                ..
            })
        ));
        assert!(check(Kind::Prefill, usize::MAX, usize::MAX).is_err());
        // A prompt may outgrow the original length, in one step; an answer may not while timed.
        assert_eq!(check(Kind::Prefill, 60, 10), Ok(()));
        assert_eq!(check(Kind::Decode, 60, 4), Ok(()));
        assert_eq!(check(Kind::Decode, 60, 64), Ok(()));
        let error = check(Kind::Decode, 60, 5).unwrap_err();
        assert!(matches!(error, TestError::Crossing { original: 64, .. }));
        assert!(
            error.to_string().contains("at most 4 or from 64 on"),
            "{error}"
        );
    }

    #[test]
    fn names_are_those_of_llama_bench() {
        let name = |kind, tokens, depth| {
            Test {
                kind,
                tokens,
                depth,
            }
            .to_string()
        };
        assert_eq!(name(Kind::Prefill, 512, 0), "pp512");
        assert_eq!(name(Kind::Decode, 64, 4096), "tg64 @ d4096");
    }
}
