//! How much prompt lookup gives: tokens per pass on a text that repeats itself and on one that does not.
//!
//! Two questions. [`text_rate`]: what a model that says exactly this text needs. The passes are a
//! property of the text and of the tokenizer, so random weights of a published model's shape tell the
//! time that the trained ones would take. [`lookup_rate`]: what this model needs when it goes on from a
//! prompt by itself.

use phidias_engine::Cancel;
use phidias_engine::generate::{Detokenize, GenerateError, GenerateOptions, generate};
use phidias_engine::lookup::LookupStats;
use phidias_models::{Error, Model, Session};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// A text to measure on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What reports call it.
    pub name: &'static str,
    /// The text.
    pub text: &'static str,
}

/// A tale that says most things three times, as tales do, and one that only uses the same words now
/// and then.
pub const SAMPLES: [Sample; 2] = [
    Sample {
        name: "refrain",
        text: "\
Once upon a time there was a little grey goose who found a grain of wheat by the side of the road. \
\"Who will help me to sow the grain of wheat?\" said the little grey goose.
\"Not I,\" said the fox, \"for I must sleep in the sun.\"
\"Not I,\" said the cat, \"for I must wash my face.\"
\"Not I,\" said the old grey wolf, \"for I must go into the wood.\"
\"Then I will do it myself,\" said the little grey goose, and so she did.
When the wheat was high and golden, she said: \"Who will help me to cut the wheat?\"
\"Not I,\" said the fox, \"for I must sleep in the sun.\"
\"Not I,\" said the cat, \"for I must wash my face.\"
\"Not I,\" said the old grey wolf, \"for I must go into the wood.\"
\"Then I will do it myself,\" said the little grey goose, and so she did.
When the wheat was cut and dry, she said: \"Who will help me to carry the wheat to the mill?\"
\"Not I,\" said the fox, \"for I must sleep in the sun.\"
\"Not I,\" said the cat, \"for I must wash my face.\"
\"Not I,\" said the old grey wolf, \"for I must go into the wood.\"
\"Then I will do it myself,\" said the little grey goose, and so she did.
When the flour was ground, she said: \"Who will help me to bake the bread?\"
",
    },
    Sample {
        name: "plain",
        text: "\
A fisherman's daughter lived in a house by the river, where the water comes down from the hills and runs \
into the sea. One autumn morning, when the mist was still in the reeds, something bright was caught in \
her net: a silver key, no longer than a thumb. Nobody in the village had a lock so small. She hung it \
round her neck and thought no more of it until the winter, when an old pedlar, half frozen, knocked at \
the door and asked for shelter. Her father gave him a bowl of soup, and she made up a bed for him by the \
stove. Before it was light he had gone on his way, and all he had left in the room was a wooden box. \
They pulled at the lid, they shook it, and at last they held it over the coals, but it would not open. \
Then the girl remembered the key. It turned softly in the lock, and inside there lay neither gold nor \
jewels, but seven seeds in a bed of moss, and a note in a careful hand: plant us on the night when the \
frost is hardest. The neighbours laughed at her. But under the stars of January she broke the ground \
with an iron spade, and by Easter there were seven apple trees along the bank of the river, as white as \
the geese that slept in their shade.
",
    },
];

/// The ids of a text as a prompt that is not a question.
/// # Errors
/// A model without a tokenizer, a text that it cannot encode.
pub fn text_ids(model: &Model, text: &str) -> Result<Vec<u32>, Error> {
    let tokenizer = &model.text()?.tokenizer;
    Ok(tokenizer.encode(text, tokenizer.default_bos())?)
}

/// Begins anew with `ids[..start]` and computes the passes in which a model says exactly
/// `ids[start..]`, with at most `lookup` tokens proposed for each. Nothing is sampled; the passes are
/// those of an answer as long as the sequence stays on one side of LongRoPE's original length. Before
/// each pass `told` hears how many of `ids` are certain; its time does not count. Afterwards the
/// session holds all of `ids` but the last.
/// # Errors
/// What the session reports.
/// # Panics
/// If `start` is 0 or beyond `ids`.
pub fn text_rate(
    session: &mut Session,
    ids: &[u32],
    start: usize,
    lookup: usize,
    mut told: impl FnMut(usize),
) -> Result<LookupRate, Error> {
    session.truncate(0);
    session.extend(&ids[..start])?;
    let mut elsewhere = Duration::ZERO;
    let begin = Instant::now();
    let stats = LookupStats::of_passes(ids, start, lookup, |at, tokens| {
        let pause = Instant::now();
        told(at);
        elsewhere += pause.elapsed();
        session.truncate(at);
        session.extend_all(tokens, |_, _| {})
    })?;
    Ok(LookupRate {
        stats,
        tokens: ids.len() - start,
        decode: begin.elapsed().saturating_sub(elsewhere),
    })
}

/// How an answer went; compare it with one that had no lookup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LookupRate {
    /// Passes, proposed and accepted tokens.
    pub stats: LookupStats,
    /// Tokens of the answer; the first one is the prompt's own.
    pub tokens: usize,
    /// Time after the prompt.
    pub decode: Duration,
}

impl LookupRate {
    /// Tokens a second after the first; `None` if there was no other.
    #[must_use]
    pub fn tok_s(&self) -> Option<f64> {
        let tokens = self.tokens.saturating_sub(1);
        (tokens > 0 && !self.decode.is_zero()).then(|| tokens as f64 / self.decode.as_secs_f64())
    }
}

/// Begins anew with `prompt` and says the `n` likeliest tokens after it, stop tokens or not (fewer if
/// the context is full), at most `lookup` of them proposed for a pass. The tokens do not depend on
/// `lookup`.
/// # Errors
/// A prompt that is empty or does not fit, a lookup beyond
/// [`MAX_LOOKUP`](phidias_engine::lookup::MAX_LOOKUP), and what the session reports.
pub fn lookup_rate(
    session: &mut Session,
    prompt: &[u32],
    n: usize,
    lookup: usize,
) -> Result<LookupRate, GenerateError<Error, Infallible>> {
    session.truncate(0);
    let options = GenerateOptions {
        max_new_tokens: n,
        lookup,
        ..GenerateOptions::default()
    };
    let never = Cancel::default();
    let outcome = generate(session, prompt, &options, &mut Silent, &never, |_| {
        ControlFlow::Continue(())
    })?;
    Ok(LookupRate {
        stats: outcome.lookup,
        tokens: outcome.ids.len(),
        decode: outcome.decode,
    })
}

/// Only the tokens are of interest.
struct Silent;

impl Detokenize for Silent {
    type Error = Infallible;
    fn push(&mut self, _: u32) -> Result<String, Infallible> {
        Ok(String::new())
    }
    fn finish(&mut self) -> Result<String, Infallible> {
        Ok(String::new())
    }
}
