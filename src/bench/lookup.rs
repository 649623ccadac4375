//! How much sooner prompt lookup says a text: tokens a pass and tokens a second against none.
//!
//! Each of the [`SAMPLES`] is said token by token, by [`text_rate`]: what is computed is what an answer
//! of exactly this text computes, so random weights will do. The passes depend on the text, the
//! tokenizer and the number of guesses alone; the time is this machine's. Repetitions take turns, one
//! of every number of guesses and none among them, so that a machine that changes its speed changes it
//! for all. After each, the logits behind the whole text must be finite and, bit for bit, the same.

use super::{BenchError, Conditions, Place, Progress, Spread, Step, finite_bits};
use crate::lookup::{LookupRate, SAMPLES, text_rate};
use phidias_engine::lookup::{LookupStats, MAX_LOOKUP};
use phidias_models::text::Tokenizer;
use phidias_models::{Config, Error, Model, Session};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The first token is the prompt; all others are said.
const START: usize = 1;

/// Tokens of the warm-up.
const WARM_UP: usize = 32;

/// What to measure.
#[derive(Clone, Debug)]
pub struct LookupBench {
    /// Model, repetitions, threads and so on.
    pub conditions: Conditions,
    /// The most tokens to guess for a pass, each measured; none at all always is.
    pub lookups: Vec<usize>,
}

/// The figures of one text and number of guesses.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LookupRecord {
    /// Name of the model.
    pub model: String,
    /// Format of its matrices.
    pub format: &'static str,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Always `lookup`.
    pub kind: &'static str,
    /// Name of the text.
    pub text: &'static str,
    /// The most tokens that are guessed for a pass.
    pub lookup: usize,
    /// Tokens of the text that passes gave: `passes + accepted`.
    pub tokens: usize,
    /// Repetitions.
    pub reps: usize,
    /// Forward passes.
    pub passes: usize,
    /// Tokens computed in them on a guess.
    pub proposed: usize,
    /// Those of them that the text has.
    pub accepted: usize,
    /// Tokens that a pass gave on average.
    pub tokens_per_pass: f64,
    /// Tokens a second.
    pub tok_s: Spread,
    /// Median tokens a second by those of `lookup` 0.
    pub speedup: f64,
    /// What the cache stores.
    pub kv: &'static str,
    /// What computed: the CPU, or a device's name.
    pub device: String,
    /// Tokens a second of each repetition.
    pub samples: Vec<f64>,
}

/// Why lookup cannot be measured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// More guesses than a pass can take.
    #[error("a lookup of {0} tokens: expected 0 to {MAX_LOOKUP}")]
    TooMany(usize),
    /// Nothing to make tokens with.
    #[error(
        "{}: the folder has no tokenizer.json or .tiktoken file, and lookup is measured on texts",
        path.display()
    )]
    NoTokenizer {
        /// The model's folder.
        path: PathBuf,
    },
    /// A text that hardly has tokens.
    #[error("the text '{text}' has {tokens} tokens in this model: too few to be timed")]
    Short {
        /// The text.
        text: &'static str,
        /// Its tokens.
        tokens: usize,
    },
    /// A text that does not fit into the context.
    #[error("the text '{text}' has {tokens} tokens, the model {context} positions")]
    Context {
        /// The text.
        text: &'static str,
        /// Its tokens.
        tokens: usize,
        /// `max_position_embeddings`
        context: usize,
    },
    /// A text on whose way the whole cache would be computed again.
    #[error(
        "the text '{text}' has {tokens} tokens and outgrows the model's original length of {original}, where the whole cache is computed again"
    )]
    Crossing {
        /// The text.
        text: &'static str,
        /// Its tokens.
        tokens: usize,
        /// `original_max_position_embeddings`
        original: usize,
    },
    /// The answer is no answer.
    #[error(
        "lookup on '{text}': the logits hold a value that is not finite; its speed means nothing"
    )]
    NotFinite {
        /// The text.
        text: &'static str,
    },
    /// Lookup, or chance, changed the answer.
    #[error(
        "lookup on '{text}': the logits after guesses of {lookup} differ from the first ones; its speed means nothing"
    )]
    Differs {
        /// The text.
        text: &'static str,
        /// The most tokens that were guessed for a pass.
        lookup: usize,
    },
}

/// A text as this model's tokens.
struct Text {
    name: &'static str,
    ids: Vec<u32>,
}

/// How one number of guesses went.
struct Timed {
    lookup: usize,
    samples: Vec<f64>,
    stats: LookupStats,
}

impl LookupBench {
    /// Whether everything can be measured with this configuration and tokenizer of the folder `path`;
    /// takes hardly any time.
    /// # Errors
    /// The first [`LookupError`] that it meets; what the tokenizer reports.
    pub fn check(
        &self,
        config: &Config,
        tokenizer: Option<&Tokenizer>,
        path: &Path,
    ) -> Result<(), BenchError> {
        self.texts(config, tokenizer, path).map(|_| ())
    }

    fn texts(
        &self,
        config: &Config,
        tokenizer: Option<&Tokenizer>,
        path: &Path,
    ) -> Result<Vec<Text>, BenchError> {
        if let Some(&lookup) = self.lookups.iter().find(|n| **n > MAX_LOOKUP) {
            return Err(LookupError::TooMany(lookup).into());
        }
        let tokenizer = tokenizer.ok_or_else(|| LookupError::NoTokenizer {
            path: path.to_owned(),
        })?;
        let encoded = SAMPLES.map(|sample| {
            let ids =
                (tokenizer.encode(sample.text, tokenizer.default_bos())).map_err(Error::from)?;
            fits(config, sample.name, ids.len())?;
            Ok(Text {
                name: sample.name,
                ids,
            })
        });
        encoded.into_iter().collect()
    }

    /// 0 first, then what was asked for.
    fn lookups(&self) -> Vec<usize> {
        let asked = self.lookups.iter().copied().filter(|n| *n > 0);
        std::iter::once(0).chain(asked).collect()
    }

    /// Measures every text; `each` gets its records when it is done, that of no lookup first.
    /// # Errors
    /// As [`LookupBench::check`]; what the model reports; cancellation.
    pub fn run<E: From<BenchError>>(
        &self,
        model: &Arc<Model>,
        progress: &Progress,
        mut each: impl FnMut(LookupRecord) -> Result<(), E>,
    ) -> Result<(), E> {
        let tokenizer = model.text().ok().map(|t| &t.tokenizer);
        let texts = self.texts(model.config(), tokenizer, model.path())?;
        let context = texts.iter().map(|t| t.ids.len()).max().unwrap_or(1);
        for &threads in &self.conditions.threads {
            let mut session = self.conditions.session(model, context, threads)?;
            for text in &texts {
                let timed = self.time(&mut session, text, progress)?;
                for record in self.records(&session, text, timed) {
                    each(record)?;
                }
            }
        }
        Ok(())
    }

    fn time(
        &self,
        session: &mut Session,
        text: &Text,
        progress: &Progress,
    ) -> Result<Vec<Timed>, BenchError> {
        let what = format!("lookup on '{}'", text.name);
        let lookups = self.lookups();
        let repetitions = self.conditions.repetitions.max(1);
        let total = repetitions * lookups.len() * text.ids.len();
        let mut done = 0;
        let told = |done| {
            progress(Step {
                what: &what,
                done,
                total,
            });
        };
        let few = &text.ids[..text.ids.len().min(START + WARM_UP)];
        text_rate(session, few, START, MAX_LOOKUP, |_| told(0))?;
        let mut timed: Vec<Timed> = (lookups.into_iter())
            .map(|lookup| Timed {
                lookup,
                samples: Vec::new(),
                stats: LookupStats::default(),
            })
            .collect();
        let mut first = None;
        for _ in 0..repetitions {
            for Timed {
                lookup,
                samples,
                stats,
            } in &mut timed
            {
                let lookup = *lookup;
                let rate = text_rate(session, &text.ids, START, lookup, |at| told(done + at))?;
                done += text.ids.len();
                *stats = rate.stats;
                samples.push(speed(&rate, text)?);
                let logits = last_logits(session, text)?;
                if *first.get_or_insert_with(|| logits.clone()) != logits {
                    let text = text.name;
                    return Err(LookupError::Differs { text, lookup }.into());
                }
            }
        }
        Ok(timed)
    }

    fn records(&self, session: &Session, text: &Text, timed: Vec<Timed>) -> Vec<LookupRecord> {
        let spread = |t: &Timed| Spread::of(&t.samples).expect("at least one repetition");
        let without = timed.first().map(|t| spread(t).median);
        let place = Place::of(session);
        (timed.into_iter())
            .map(|t| {
                let tok_s = spread(&t);
                LookupRecord {
                    model: self.conditions.name.clone(),
                    format: session.model().format().name(),
                    device: place.name(),
                    isa: place.isa(),
                    threads: place.threads(),
                    kind: "lookup",
                    text: text.name,
                    lookup: t.lookup,
                    tokens: t.stats.passes + t.stats.accepted,
                    reps: t.samples.len(),
                    passes: t.stats.passes,
                    proposed: t.stats.proposed,
                    accepted: t.stats.accepted,
                    tokens_per_pass: t.stats.tokens_per_pass().expect("at least one pass"),
                    tok_s,
                    speedup: without.map_or(1.0, |without| tok_s.median / without),
                    kv: session.cache().kind().name(),
                    samples: t.samples,
                }
            })
            .collect()
    }
}

/// Whether a text of so many tokens can be said in one go.
fn fits(config: &Config, text: &'static str, tokens: usize) -> Result<(), LookupError> {
    let context = config.max_position_embeddings;
    let long = config.rope.long.as_ref();
    let original = long.map(|l| l.original_max_position_embeddings);
    // One token is the prompt, the next one its own: a pass is needed from the third on.
    if tokens < START + 2 {
        return Err(LookupError::Short { text, tokens });
    }
    if tokens > context {
        return Err(LookupError::Context {
            text,
            tokens,
            context,
        });
    }
    match original {
        Some(original) if tokens > original => Err(LookupError::Crossing {
            text,
            tokens,
            original,
        }),
        _ => Ok(()),
    }
}

fn speed(rate: &LookupRate, text: &Text) -> Result<f64, LookupError> {
    rate.tok_s().ok_or(LookupError::Short {
        text: text.name,
        tokens: text.ids.len(),
    })
}

/// The bits of the logits after the whole text, of which all but the last token has been computed.
fn last_logits(session: &mut Session, text: &Text) -> Result<Vec<u32>, BenchError> {
    let have = session.ids().len();
    let logits = session.extend(&text.ids[have..])?;
    let text = text.name;
    Ok(finite_bits(logits).ok_or(LookupError::NotFinite { text })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn texts_that_cannot_be_said_are_told_apart() {
        let json = json!({
            "model_type": "phi3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "original_max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
            "rope_scaling": { "type": "longrope", "short_factor": ([1.0; 4]), "long_factor": ([2.0; 4]) },
        });
        let config =
            Config::from_json(Path::new("config.json"), json.to_string().as_bytes()).unwrap();
        let check = |tokens| fits(&config, "x", tokens);
        assert!(matches!(check(2), Err(LookupError::Short { .. })));
        assert_eq!((check(3), check(64)), (Ok(()), Ok(())));
        assert!(matches!(
            check(65),
            Err(LookupError::Crossing { original: 64, .. })
        ));
        assert!(matches!(
            check(129),
            Err(LookupError::Context { context: 128, .. })
        ));
    }
}
