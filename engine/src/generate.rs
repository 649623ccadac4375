//! The generation loop: prompt in, tokens and text out, for anything that is a [`Sequence`].
//!
//! Feed the prompt; then, until something ends it: sample a token, show its text as far as it is
//! certain, feed the token to the model.
//!
//! # Which tokens are in the cache afterwards
//!
//! The logits of a token are needed only to choose the one after it, so the *last* sampled token is
//! never fed. After [`generate`] the sequence holds what it held before, the prompt and every sampled
//! token but the last, whatever the reason for the end, and each of them is in the cache. The last
//! one is [`Outcome::pending`]. A chat goes on by putting it in front of the next turn's tokens; the
//! ids are used again as they are, for text that is encoded anew does not always give the same ids.
//!
//! # Lookup
//!
//! With [`GenerateOptions::lookup`] a pass also computes tokens that the sequence itself proposes (see
//! [`crate::lookup`]). The loop stays the same: it samples one token after another from the logits
//! after the tokens before it, with the same history and the same draw. Only where the logits come
//! from differs: if the token just sampled is the one that the last pass computed next, they are there
//! already; if not, the rest of that pass is taken back. So tokens, text, log-probabilities and the
//! end are those of generating one by one, bit for bit, if the sequence computes a row independently
//! of the rows beside it.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::Cancel;
use crate::lookup::{LookupStats, MAX_LOOKUP, NgramIndex};
use crate::sampling::{Candidates, ParamError, SampleError, Sampled, Sampler, SamplingParams};

/// What a pass says of the token that follows one of its own.
#[derive(Clone, Debug, PartialEq)]
pub enum Next<'a> {
    /// All logits, `[vocab]`.
    Logits(&'a [f32]),
    /// The likeliest tokens. All logits are there yet, see [`Sequence::logits`].
    Candidates(Candidates),
}

/// A sequence of tokens with its KV cache, in the hands of a model.
pub trait Sequence {
    /// What can go wrong in a forward pass.
    type Error: std::error::Error + 'static;

    /// The tokens whose keys and values are in the cache.
    fn ids(&self) -> &[u32];

    /// The number of tokens the model knows, and so of logits.
    fn vocab(&self) -> usize;

    /// The most tokens the sequence may hold.
    fn context(&self) -> usize;

    /// Appends `tokens` and says what may follow each of the last `rows` of them (both at least one), in
    /// order: `each(position, next)`. More than one row are computed in one pass. Where `candidates` of the
    /// likeliest tokens might do (at most [`MOST`](crate::sampling::MOST)), the sequence may say them instead
    /// of all logits; whether they suffice the sampler sees.
    ///
    /// # Errors
    /// A token that the model does not have, cancellation, or a failure inside; then the sequence is
    /// as before.
    fn extend(
        &mut self,
        tokens: &[u32],
        rows: usize,
        candidates: Option<usize>,
        each: &mut dyn FnMut(usize, Next<'_>),
    ) -> Result<(), Self::Error>;

    /// All logits `[vocab]` after the token at `position`, for which the last [`Sequence::extend`] gave
    /// candidates or which was its last, whatever was forgotten since.
    ///
    /// # Errors
    /// A failure inside.
    fn logits(&mut self, position: usize) -> Result<&[f32], Self::Error>;

    /// Forgets the tokens from `len` on.
    fn truncate(&mut self, len: usize);

    /// How many tokens may follow the next one in the same pass so that each of them gets the logits
    /// that it gets alone. The context bounds it, and so does a length at which the model changes for
    /// all of a pass.
    fn lookahead(&self) -> usize {
        self.context().saturating_sub(self.ids().len() + 1)
    }
}

/// Turns ids into text as it becomes certain: never half a character.
pub trait Detokenize {
    /// What can go wrong.
    type Error: std::error::Error + 'static;

    /// Takes the next token and returns the text that became certain, often none.
    ///
    /// # Errors
    /// A token that cannot be decoded.
    fn push(&mut self, id: u32) -> Result<String, Self::Error>;

    /// Returns what was held back; the answer is at its end.
    ///
    /// # Errors
    /// When it cannot be decoded.
    fn finish(&mut self) -> Result<String, Self::Error>;
}

/// What to generate and when to stop.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The most tokens to sample; 0 only fills the cache.
    pub max_new_tokens: usize,
    /// Tokens that end the answer. Their text is not part of it.
    pub stop_tokens: BTreeSet<u32>,
    /// Texts that end the answer, wherever tokens begin and end. They are not part of it.
    pub stop_strings: Vec<String>,
    /// How tokens are chosen. Every generation starts at the beginning of the seed's stream: it
    /// depends on the sequence, the prompt and these options, not on what was generated earlier.
    pub sampling: SamplingParams,
    /// The most tokens that the sequence itself proposes for one pass, at most [`MAX_LOOKUP`]; 0 is
    /// off. It changes the time that an answer takes and nothing else.
    pub lookup: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: usize::MAX,
            stop_tokens: BTreeSet::new(),
            stop_strings: Vec::new(),
            sampling: SamplingParams::default(),
            lookup: 0,
        }
    }
}

/// What happens on the way. The texts of all events, one after another, are the answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was sampled.
    Token {
        /// The token.
        id: u32,
        /// Its log-probability, if asked for; see [`crate::sampling::Sampled`].
        logprob: Option<f32>,
        /// The likeliest tokens and their log-probabilities, as many as asked for.
        top: Vec<(u32, f32)>,
        /// The text that became certain with it: whole characters that cannot be the beginning of
        /// a stop string. It may be empty, or come from several tokens.
        text: String,
    },
    /// The answer is over, and this end of it, held back until now, was no stop string.
    Text(String),
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// This stop token was sampled.
    StopToken(u32),
    /// The text reached this stop string (its index in the options).
    StopString(usize),
    /// `max_new_tokens` were sampled.
    Length,
    /// The sequence holds as many tokens as the context allows.
    ContextFull,
    /// The switch was set, or the receiver of the events had enough.
    Cancelled,
}

/// How a generation went.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The sampled tokens, a stop token included.
    pub ids: Vec<u32>,
    /// The last sampled token, which is not in the cache; see the head of this file.
    pub pending: Option<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Prompt tokens fed to the model: all, or none when it was cancelled before the end of them.
    pub prompt_tokens: usize,
    /// Time from the start to the logits after the prompt.
    pub prefill: Duration,
    /// Time from there to the end, sampling and the receiver's own time included.
    pub decode: Duration,
    /// Forward passes after the prompt's, and what was proposed and accepted in them.
    pub lookup: LookupStats,
}

impl Outcome {
    /// Prompt tokens a second; `None` if nothing was prefilled.
    pub fn prefill_rate(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Tokens a second, after the first one, which costs no pass of its own: its logits are the
    /// prefill's. `None` if there was no other.
    pub fn decode_rate(&self) -> Option<f64> {
        rate(self.ids.len().saturating_sub(1), self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

/// Why a generation could not begin or go on. `S`: the sequence's error, `D`: the detokenizer's.
///
/// Whatever text was certain has been handed out, and the sequence holds only tokens that are in its
/// cache.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError<S, D>
where
    S: std::error::Error + 'static,
    D: std::error::Error + 'static,
{
    /// Nothing to predict from.
    #[error("prompt: expected at least one token, found none")]
    EmptyPrompt,
    /// The prompt does not fit.
    #[error(
        "prompt: expected at most {} tokens (context of {context}, {held} of it taken), found {prompt}",
        .context.saturating_sub(*.held)
    )]
    PromptTooLong {
        /// Tokens in the sequence before the prompt.
        held: usize,
        /// Tokens in the prompt.
        prompt: usize,
        /// The most tokens the sequence may hold.
        context: usize,
    },
    /// A stop string that would stop everything.
    #[error("stop_strings: expected text, found an empty string at index {index}")]
    EmptyStopString {
        /// Its index in the options.
        index: usize,
    },
    /// More tokens to propose for a pass than it may have.
    #[error("lookup: expected at most {MAX_LOOKUP} proposed tokens, found {found}")]
    Lookup {
        /// The number asked for.
        found: usize,
    },
    /// A sampling parameter out of range.
    #[error(transparent)]
    Params(#[from] ParamError),
    /// No token can be chosen: the model's logits are not numbers, or all are masked.
    #[error("token {position} of the sequence: {source}")]
    Sample {
        /// How many tokens came before.
        position: usize,
        /// What is wrong with the logits.
        source: SampleError,
    },
    /// The model failed.
    #[error(transparent)]
    Sequence(S),
    /// The token cannot be turned into text.
    #[error("token id {id} has no text: {source}")]
    Detokenize {
        /// The token (the last one before, when the rest of the text is the problem).
        id: u32,
        /// What the detokenizer says.
        source: D,
    },
}

/// The error of generating with `S` and `D`.
pub type ErrorOf<S, D> = GenerateError<<S as Sequence>::Error, <D as Detokenize>::Error>;

/// Appends `prompt` to the sequence and samples an answer.
///
/// `on_event` hears of everything as it happens; breaking from it cancels, as `cancel` does: both
/// are looked at between forward passes. Penalties see every token of the sequence, prompt and
/// answer. If a stop string appears only in what is held back until the end, the text still ends
/// before it, and it is the finish reason.
///
/// # Errors
/// A prompt that is empty or does not fit, options out of range, logits that are not numbers, and
/// what the sequence and the detokenizer report.
pub fn generate<S: Sequence, D: Detokenize>(
    sequence: &mut S,
    prompt: &[u32],
    options: &GenerateOptions,
    detokenizer: &mut D,
    cancel: &Cancel,
    on_event: impl FnMut(Event) -> ControlFlow<()>,
) -> Result<Outcome, ErrorOf<S, D>> {
    let (held, context) = (sequence.ids().len(), sequence.context());
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    let end = held
        .checked_add(prompt.len())
        .filter(|&end| end <= context)
        .ok_or(GenerateError::PromptTooLong {
            held,
            prompt: prompt.len(),
            context,
        })?;
    let stop = StopStrings::new(&options.stop_strings)
        .map_err(|index| GenerateError::EmptyStopString { index })?;
    if options.lookup > MAX_LOOKUP {
        return Err(GenerateError::Lookup {
            found: options.lookup,
        });
    }
    let sampler = Sampler::new(options.sampling.clone(), sequence.vocab())?;
    let mut history = Vec::with_capacity(end);
    history.extend_from_slice(sequence.ids());
    history.extend_from_slice(prompt);
    let mut run = Run {
        sequence,
        options,
        detokenizer,
        cancel,
        on_event,
        sampler,
        stop,
        history,
        index: NgramIndex::default(),
        pass: Pass::default(),
        certain: held,
        stopped: false,
        outcome: Outcome {
            ids: Vec::new(),
            pending: None,
            finish: FinishReason::Length,
            prompt_tokens: 0,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
            lookup: LookupStats::default(),
        },
    };
    let start = Instant::now();
    let ready = run.prefill(prompt);
    run.outcome.prefill = start.elapsed();
    let decode = Instant::now();
    let finish = match ready {
        Ok(true) => run.decode(),
        Ok(false) => Ok(FinishReason::Cancelled),
        Err(error) => Err(error),
    };
    run.sequence.truncate(run.certain);
    // Held-back text is the reader's also when the answer ends in an error.
    let flushed = run.flush();
    run.outcome.finish = finish?;
    if let Some(index) = flushed? {
        run.outcome.finish = FinishReason::StopString(index);
    }
    run.outcome.decode = decode.elapsed();
    Ok(run.outcome)
}

/// One generation under way.
struct Run<'a, S, D, F> {
    sequence: &'a mut S,
    options: &'a GenerateOptions,
    detokenizer: &'a mut D,
    cancel: &'a Cancel,
    on_event: F,
    sampler: Sampler,
    stop: StopStrings<'a>,
    history: Vec<u32>, // the sequence's tokens, prompt and sampled ones included
    index: NgramIndex, // of the history, brought up to date when it is asked
    pass: Pass,
    certain: usize, // tokens of the history that are in the sequence; what it holds beyond is guessed
    stopped: bool,  // the receiver broke off
    outcome: Outcome,
}

/// The last forward pass: the logits after its last certain token, and after each guess behind it.
#[derive(Default)]
struct Pass {
    logits: Vec<f32>,            // [1 + guesses, vocab], or none
    candidates: Vec<Candidates>, // [1 + guesses], or none: one of the two
    tokens: Vec<u32>,            // [1 + guesses], after the prompt; empty before
    row: usize,                  // where the next token is sampled from
}

impl Pass {
    fn push(&mut self, next: Next<'_>) {
        match next {
            Next::Logits(row) => self.logits.extend_from_slice(row),
            Next::Candidates(candidates) => self.candidates.push(candidates),
        }
    }

    /// The logits that the next token is sampled from.
    fn logits(&self) -> &[f32] {
        let vocab = self.logits.len() / self.tokens.len().max(1);
        &self.logits[self.row * vocab..][..vocab]
    }
}

impl<S: Sequence, D: Detokenize, F: FnMut(Event) -> ControlFlow<()>> Run<'_, S, D, F> {
    fn emit(&mut self, event: Event) {
        self.stopped |= (self.on_event)(event).is_break();
    }

    fn cancelled(&self) -> bool {
        self.stopped || self.cancel.is_cancelled()
    }

    /// Whether a pass succeeded; it did not if it was cancelled.
    fn passed(&self, result: Result<(), S::Error>) -> Result<bool, ErrorOf<S, D>> {
        match result {
            Ok(()) => Ok(true),
            // The sequence looks at the same switch and ends a long pass early.
            Err(_) if self.cancel.is_cancelled() => Ok(false),
            Err(error) => Err(GenerateError::Sequence(error)),
        }
    }

    /// Feeds the prompt; `false` if it was cancelled.
    fn prefill(&mut self, prompt: &[u32]) -> Result<bool, ErrorOf<S, D>> {
        if self.cancelled() {
            return Ok(false);
        }
        let pass = &mut self.pass;
        let result =
            (self.sequence).extend(prompt, 1, self.sampler.candidates(), &mut |_, next| {
                pass.push(next);
            });
        if !self.passed(result)? {
            return Ok(false);
        }
        self.certain += prompt.len();
        self.outcome.prompt_tokens = prompt.len();
        Ok(true)
    }

    /// Feeds `id`, the last of the history, and what is proposed to follow it; `false` if it was
    /// cancelled.
    fn feed(&mut self, id: u32) -> Result<bool, ErrorOf<S, D>> {
        self.sequence.truncate(self.certain);
        let pass = &mut self.pass;
        pass.logits.clear();
        pass.candidates.clear();
        pass.row = 0;
        let mut tokens = std::mem::take(&mut pass.tokens);
        tokens.clear();
        tokens.push(id);
        // A pass gives one token more than it has guesses.
        let budget = self.options.max_new_tokens - self.outcome.ids.len() - 1;
        let room = self.options.lookup.min(budget);
        if room > 0 {
            self.index.update(&self.history);
            let room = room.min(self.sequence.lookahead());
            self.index.propose(&self.history, room, &mut tokens);
            // Nothing is sampled after a stop token; a placeholder for an image is never sampled.
            let stops = &self.options.stop_tokens;
            let wanted = |id: &u32| (*id as usize) < self.sequence.vocab() && !stops.contains(id);
            let guesses = tokens[1..].iter().take_while(|id| wanted(id)).count();
            tokens.truncate(1 + guesses);
        }
        let (rows, candidates) = (tokens.len(), self.sampler.candidates());
        let mut each = |_, next: Next<'_>| pass.push(next);
        let result = (self.sequence).extend(&tokens, rows, candidates, &mut each);
        let guesses = rows - 1;
        pass.tokens = tokens;
        if !self.passed(result)? {
            return Ok(false);
        }
        self.certain += 1;
        self.outcome.lookup.passes += 1;
        self.outcome.lookup.proposed += guesses;
        Ok(true)
    }

    /// Samples from the logits of the last pass and on, until something ends the answer.
    fn decode(&mut self) -> Result<FinishReason, ErrorOf<S, D>> {
        loop {
            if self.outcome.ids.len() >= self.options.max_new_tokens {
                return Ok(FinishReason::Length);
            }
            if self.cancelled() {
                return Ok(FinishReason::Cancelled);
            }
            if let Some(id) = self.outcome.pending {
                if self.certain >= self.sequence.context() {
                    return Ok(FinishReason::ContextFull);
                }
                if self.pass.tokens.get(self.pass.row + 1) == Some(&id) {
                    self.pass.row += 1;
                    self.certain += 1;
                    self.outcome.lookup.accepted += 1;
                } else if !self.feed(id)? {
                    return Ok(FinishReason::Cancelled);
                }
                self.outcome.pending = None;
            }
            if let Some(finish) = self.token()? {
                return Ok(finish);
            }
        }
    }

    /// Samples from the candidates if they suffice, and from all logits if not.
    fn sample(&mut self) -> Result<Sampled, ErrorOf<S, D>> {
        let candidates = self.pass.candidates.get(self.pass.row);
        let sampled = match candidates.and_then(|some| self.sampler.sample_candidates(some)) {
            Some(sampled) => sampled,
            None => {
                let logits = match candidates {
                    Some(_) => {
                        (self.sequence.logits(self.certain - 1)).map_err(GenerateError::Sequence)?
                    }
                    None => self.pass.logits(),
                };
                self.sampler.sample(logits, &self.history)
            }
        };
        sampled.map_err(|source| GenerateError::Sample {
            position: self.history.len(),
            source,
        })
    }

    /// Samples one token and shows it; a reason if it ends the answer.
    fn token(&mut self) -> Result<Option<FinishReason>, ErrorOf<S, D>> {
        let sampled = self.sample()?;
        let id = sampled.id;
        self.history.push(id);
        self.outcome.ids.push(id);
        self.outcome.pending = Some(id);
        let (text, finish) = if self.options.stop_tokens.contains(&id) {
            (String::new(), Some(FinishReason::StopToken(id)))
        } else {
            let text = self
                .detokenizer
                .push(id)
                .map_err(|source| GenerateError::Detokenize { id, source })?;
            let (text, stop) = self.stop.push(&text);
            (text, stop.map(FinishReason::StopString))
        };
        self.emit(Event::Token {
            id,
            logprob: sampled.logprob,
            top: sampled.top,
            text,
        });
        Ok(finish)
    }

    /// Hands out what the detokenizer and the stop strings held back; a stop string's index if one
    /// appears in it.
    fn flush(&mut self) -> Result<Option<usize>, ErrorOf<S, D>> {
        if self.stop.found {
            return Ok(None); // what follows the stop string is nobody's
        }
        let rest = self.detokenizer.finish();
        let (mut text, stop) = self.stop.push(rest.as_deref().unwrap_or_default());
        text.push_str(&self.stop.finish());
        if !text.is_empty() {
            self.emit(Event::Text(text));
        }
        match rest {
            Ok(_) => Ok(stop),
            Err(source) => Err(GenerateError::Detokenize {
                id: self.history.last().copied().unwrap_or_default(),
                source,
            }),
        }
    }
}

/// Watches a text that comes in pieces for the first stop string.
///
/// The answer ends at the stop string that is complete first, of several complete at the same place
/// at the longest; so the result does not depend on how the text was cut into pieces. Text is held
/// back as long as it could be the beginning of a stop string.
struct StopStrings<'a> {
    stops: &'a [String],
    held: String, // a proper prefix of some stop string
    found: bool,
}

impl<'a> StopStrings<'a> {
    /// Fails with the index of an empty stop string.
    fn new(stops: &'a [String]) -> Result<Self, usize> {
        match stops.iter().position(String::is_empty) {
            Some(index) => Err(index),
            None => Ok(Self {
                stops,
                held: String::new(),
                found: false,
            }),
        }
    }

    /// Takes the next piece; returns the text that is certain, and which stop string ended it.
    fn push(&mut self, text: &str) -> (String, Option<usize>) {
        if self.found {
            return (String::new(), None);
        }
        self.held.push_str(text);
        let first = (0..)
            .zip(self.stops)
            .filter_map(|(index, stop)| {
                let start = self.held.find(stop.as_str())?;
                Some((start + stop.len(), start, index))
            })
            .min();
        if let Some((_, start, index)) = first {
            self.found = true;
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), Some(index));
        }
        let hold = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - hold);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// The text is over: what was held back is no stop string.
    fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length in bytes of the longest end of `text` that is a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(len, _)| len)
        .rev()
        .find(|&len| text.ends_with(&stop[..len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A model that says what the script says: after `prompt` tokens the script's first id, and so on.
    struct Scripted {
        ids: Vec<u32>,
        script: Vec<u32>,
        prompt: usize,
        context: usize,
        calls: Vec<usize>,
        fail_at: Option<usize>, // the length from which extending fails
        nan_at: Option<usize>,  // the length at which the logits are not numbers
        border: usize,          // a length that no pass may cross unless it begins there
        rows: Vec<Vec<f32>>,    // the logits of the last pass
        end: usize,             // its length
        device: Option<usize>,  // says so many candidates at most, where some might do
        fetched: usize,         // rows of logits that were asked for then
    }

    const VOCAB: usize = 64;

    impl Scripted {
        fn new(prompt: usize, script: &[u32]) -> Self {
            Self {
                ids: Vec::new(),
                script: script.to_vec(),
                prompt,
                context: 1000,
                calls: Vec::new(),
                fail_at: None,
                nan_at: None,
                border: 0,
                rows: Vec::new(),
                end: 0,
                device: None,
                fetched: 0,
            }
        }

        /// The logits after the last token.
        fn row(&self) -> Vec<f32> {
            let len = self.ids.len();
            let mut logits = vec![0.0; VOCAB];
            let next = len
                .checked_sub(self.prompt)
                .and_then(|i| self.script.get(i));
            logits[next.copied().unwrap_or(0) as usize] = 5.0;
            if self.nan_at == Some(len) {
                logits[3] = f32::NAN;
            }
            logits
        }
    }

    #[derive(Clone, Debug, PartialEq, thiserror::Error)]
    #[error("the model broke")]
    struct Broken;

    impl Sequence for Scripted {
        type Error = Broken;
        fn ids(&self) -> &[u32] {
            &self.ids
        }
        fn vocab(&self) -> usize {
            VOCAB
        }
        fn context(&self) -> usize {
            self.context
        }
        fn extend(
            &mut self,
            tokens: &[u32],
            rows: usize,
            candidates: Option<usize>,
            each: &mut dyn FnMut(usize, Next<'_>),
        ) -> Result<(), Broken> {
            let len = self.ids.len() + tokens.len();
            assert!((1..=tokens.len()).contains(&rows) && len <= self.context);
            if self.fail_at.is_some_and(|at| len >= at) {
                return Err(Broken);
            }
            self.calls.push(tokens.len());
            self.rows.clear();
            self.end = len;
            for id in tokens {
                self.ids.push(*id);
                self.rows.push(self.row());
            }
            self.rows.drain(..tokens.len() - rows);
            for (i, row) in self.rows.iter().enumerate() {
                each(
                    len - rows + i,
                    match candidates.zip(self.device) {
                        Some((count, most)) => {
                            Next::Candidates(Candidates::of(row, count.min(most)))
                        }
                        None => Next::Logits(row),
                    },
                );
            }
            Ok(())
        }
        fn logits(&mut self, position: usize) -> Result<&[f32], Broken> {
            assert!(self.device.is_some());
            self.fetched += 1;
            Ok(&self.rows[position + self.rows.len() - self.end])
        }
        fn truncate(&mut self, len: usize) {
            self.ids.truncate(len);
        }
        fn lookahead(&self) -> usize {
            let next = self.ids.len() + 1;
            let end = if next <= self.border {
                self.border
            } else {
                self.context
            };
            end.min(self.context).saturating_sub(next)
        }
    }

    /// Token `i` is the bytes of `pieces[i]`; like the real one it keeps incomplete characters back.
    struct Pieces<'a> {
        pieces: &'a [&'a [u8]],
        bytes: Vec<u8>,
    }

    #[derive(Clone, Debug, PartialEq, thiserror::Error)]
    #[error("no such piece")]
    struct NoPiece;

    impl Detokenize for Pieces<'_> {
        type Error = NoPiece;
        fn push(&mut self, id: u32) -> Result<String, NoPiece> {
            let piece = self.pieces.get(id as usize).ok_or(NoPiece)?;
            self.bytes.extend_from_slice(piece);
            let valid = match std::str::from_utf8(&self.bytes) {
                Ok(text) => text.len(),
                Err(error) => error.valid_up_to(),
            };
            let rest = self.bytes.split_off(valid);
            let text = String::from_utf8(std::mem::replace(&mut self.bytes, rest));
            Ok(text.unwrap())
        }
        fn finish(&mut self) -> Result<String, NoPiece> {
            Ok(String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned())
        }
    }

    struct Heard {
        outcome: Result<Outcome, GenerateError<Broken, NoPiece>>,
        events: Vec<Event>,
    }

    impl Heard {
        fn text(&self) -> String {
            self.texts().concat()
        }
        /// The text of each token, and of the end if there is any.
        fn texts(&self) -> Vec<&str> {
            let texts = self.events.iter().map(|event| match event {
                Event::Token { text, .. } | Event::Text(text) => text.as_str(),
            });
            texts.collect()
        }
        fn finish(&self) -> FinishReason {
            self.outcome.as_ref().unwrap().finish
        }
    }

    fn hear(
        sequence: &mut Scripted,
        prompt: &[u32],
        options: &GenerateOptions,
        pieces: &[&[u8]],
    ) -> Heard {
        let mut events = Vec::new();
        let outcome = generate(
            sequence,
            prompt,
            options,
            &mut Pieces {
                pieces,
                bytes: Vec::new(),
            },
            &Cancel::default(),
            |event| {
                events.push(event);
                ControlFlow::Continue(())
            },
        );
        Heard { outcome, events }
    }

    /// Generates the pieces one after another, with these stop strings.
    fn say(pieces: &[&[u8]], stops: &[&str]) -> Heard {
        let script: Vec<u32> = (0..pieces.len() as u32).collect();
        let options = GenerateOptions {
            max_new_tokens: pieces.len(),
            stop_strings: stops.iter().map(|s| s.to_string()).collect(),
            ..GenerateOptions::default()
        };
        hear(&mut Scripted::new(1, &script), &[0], &options, pieces)
    }

    const ABC: &[&[u8]] = &[b"a", b"b", b"c", b"d", b"e"];

    fn limited(max_new_tokens: usize) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens,
            ..GenerateOptions::default()
        }
    }

    #[test]
    fn the_last_token_is_pending_and_all_others_are_in_the_cache() {
        let mut sequence = Scripted::new(2, &[3, 1, 2]);
        let heard = hear(&mut sequence, &[9, 8], &limited(3), ABC);
        let outcome = heard.outcome.as_ref().unwrap();
        assert_eq!(outcome.ids, [3, 1, 2]);
        assert_eq!(outcome.pending, Some(2));
        assert_eq!(outcome.finish, FinishReason::Length);
        assert_eq!(outcome.prompt_tokens, 2);
        assert_eq!(sequence.ids, [9, 8, 3, 1]);
        assert_eq!(heard.texts(), ["d", "b", "c"]);

        // The next turn begins with the pending token and sees the whole history.
        sequence.script = vec![0, 0, 0, 0, 4];
        let heard = hear(&mut sequence, &[2, 7], &limited(1), ABC);
        assert_eq!(heard.outcome.unwrap().ids, [4]);
        assert_eq!(sequence.ids, [9, 8, 3, 1, 2, 7]);
    }

    /// All logits are asked for once for each token that the candidates do not decide, and for no other.
    #[test]
    fn logits_are_fetched_only_where_candidates_do_not_suffice() {
        let fetched = |most, sampling: SamplingParams| {
            let mut sequence = Scripted::new(1, &[1, 2, 3, 1, 2]);
            sequence.device = Some(most);
            let options = GenerateOptions {
                sampling,
                ..limited(5)
            };
            let heard = hear(&mut sequence, &[0], &options, &[b"x" as &[u8]; VOCAB]);
            assert_eq!(heard.outcome.unwrap().ids.len(), 5);
            sequence.fetched
        };
        let hot = |top_k, top_p| SamplingParams {
            temperature: 1.0,
            top_k,
            top_p,
            ..SamplingParams::default()
        };
        assert_eq!(fetched(9, SamplingParams::default()), 0);
        assert_eq!(fetched(9, hot(9, 0.99)), 0);
        assert_eq!(fetched(9, hot(10, 1.0)), 5);
        // The script's token has 0.70 of the probability, and each of the others 0.005.
        assert_eq!(fetched(9, hot(0, 0.71)), 0);
        assert_eq!(fetched(9, hot(0, 0.9)), 5);
        // Nobody says candidates where they never do.
        assert_eq!(fetched(9, hot(0, 1.0)), 0);
    }

    #[test]
    fn no_new_tokens_still_fills_the_cache() {
        let mut sequence = Scripted::new(5, &[1]);
        let outcome = hear(&mut sequence, &[9; 5], &limited(0), ABC)
            .outcome
            .unwrap();
        assert_eq!(sequence.calls, [5]);
        assert_eq!(
            (outcome.prompt_tokens, outcome.ids, outcome.pending),
            (5, vec![], None)
        );
        assert_eq!(outcome.finish, FinishReason::Length);
    }

    #[test]
    fn a_stop_token_is_counted_but_not_shown() {
        let mut sequence = Scripted::new(1, &[0, 1, 2, 3]);
        let options = GenerateOptions {
            stop_tokens: BTreeSet::from([2, 40]),
            stop_strings: vec!["bx".into()],
            ..limited(10)
        };
        let heard = hear(&mut sequence, &[9], &options, ABC);
        assert_eq!(heard.finish(), FinishReason::StopToken(2));
        assert_eq!(heard.outcome.as_ref().unwrap().ids, [0, 1, 2]);
        assert_eq!(heard.outcome.as_ref().unwrap().pending, Some(2));
        assert_eq!(sequence.ids, [9, 0, 1]);
        // "b" could have been the beginning of "bx" until the answer ended.
        assert_eq!(heard.texts(), ["a", "", "", "b"]);
    }

    #[test]
    fn the_context_fills_to_its_last_token() {
        let mut sequence = Scripted::new(2, &[0, 1, 2, 3]);
        sequence.context = 4;
        let heard = hear(&mut sequence, &[9, 9], &limited(10), ABC);
        assert_eq!(heard.finish(), FinishReason::ContextFull);
        assert_eq!(sequence.ids, [9, 9, 0, 1]);
        let outcome = heard.outcome.unwrap();
        // Four tokens in the cache allow one more prediction.
        assert_eq!((outcome.ids, outcome.pending), (vec![0, 1, 2], Some(2)));
    }

    #[test]
    fn prompts_that_do_not_fit_are_refused_with_both_numbers() {
        let mut sequence = Scripted::new(0, &[]);
        sequence.context = 4;
        sequence.ids = vec![1, 2, 3];
        let heard = hear(&mut sequence, &[1, 2], &limited(1), ABC);
        let error = heard.outcome.unwrap_err();
        assert_eq!(
            error.to_string(),
            "prompt: expected at most 1 tokens (context of 4, 3 of it taken), found 2"
        );
        let heard = hear(&mut sequence, &[], &limited(1), ABC);
        assert_eq!(heard.outcome, Err(GenerateError::EmptyPrompt));
        assert_eq!(sequence.calls, [] as [usize; 0]);
    }

    #[test]
    fn options_out_of_range_are_refused_before_any_work() {
        let mut sequence = Scripted::new(1, &[]);
        let mut options = limited(1);
        options.stop_strings = vec!["x".into(), String::new()];
        let heard = hear(&mut sequence, &[1], &options, ABC);
        let error = heard.outcome.unwrap_err();
        assert_eq!(error, GenerateError::EmptyStopString { index: 1 });
        let mut options = limited(1);
        options.sampling.logit_bias = vec![(VOCAB as u32, 0.0)];
        let heard = hear(&mut sequence, &[1], &options, ABC);
        assert!(matches!(heard.outcome, Err(GenerateError::Params(_))));
        let mut options = limited(1);
        options.lookup = 32;
        let heard = hear(&mut sequence, &[1], &options, ABC);
        let error = heard.outcome.unwrap_err();
        assert_eq!(
            error.to_string(),
            "lookup: expected at most 31 proposed tokens, found 32"
        );
        assert_eq!(sequence.calls, [] as [usize; 0]);
    }

    #[test]
    fn logits_that_are_not_numbers_end_the_generation_and_keep_its_text() {
        let mut sequence = Scripted::new(1, &[0, 1, 2]);
        sequence.nan_at = Some(3);
        let mut options = limited(9);
        options.stop_strings = vec!["bc".into()];
        let heard = hear(&mut sequence, &[9], &options, ABC);
        assert_eq!(heard.text(), "ab");
        assert_eq!(sequence.ids, [9, 0, 1]);
        assert_eq!(
            heard.outcome.unwrap_err().to_string(),
            "token 3 of the sequence: logits: expected finite numbers, found NaN for token 3"
        );
    }

    #[test]
    fn errors_of_the_model_and_of_the_detokenizer_come_through() {
        for (fail_at, text) in [(1, ""), (3, "ab")] {
            let mut sequence = Scripted::new(1, &[0, 1, 2]);
            sequence.fail_at = Some(fail_at);
            let heard = hear(&mut sequence, &[9], &limited(9), ABC);
            assert_eq!(heard.text(), text);
            assert_eq!(heard.outcome, Err(GenerateError::Sequence(Broken)));
        }
        let heard = hear(&mut Scripted::new(1, &[0, 50]), &[9], &limited(9), ABC);
        assert_eq!(heard.text(), "a");
        assert_eq!(
            heard.outcome.unwrap_err().to_string(),
            "token id 50 has no text: no such piece"
        );
    }

    #[test]
    fn cancelling_between_tokens_leaves_a_sequence_to_go_on_from() {
        let cancel = Cancel::default();
        let switch = cancel.clone();
        let mut sequence = Scripted::new(1, &[0, 1, 2, 3]);
        let mut detokenizer = Pieces {
            pieces: ABC,
            bytes: Vec::new(),
        };
        let mut text = String::new();
        let mut options = limited(10);
        options.stop_strings = vec!["bx".into()];
        let outcome = generate(
            &mut sequence,
            &[9],
            &options,
            &mut detokenizer,
            &cancel,
            |event| {
                if let Event::Token { id: 1, .. } = event {
                    switch.cancel();
                }
                let (Event::Token { text: t, .. } | Event::Text(t)) = event;
                text += &t;
                ControlFlow::Continue(())
            },
        )
        .unwrap();
        assert_eq!(outcome.finish, FinishReason::Cancelled);
        assert_eq!((outcome.ids, outcome.pending), (vec![0, 1], Some(1)));
        assert_eq!(sequence.ids, [9, 0]);
        assert_eq!(text, "ab");

        // Still set: not even the prompt is fed, until it is cleared.
        let again = |sequence: &mut Scripted, cancel: &Cancel| {
            let mut detokenizer = Pieces {
                pieces: ABC,
                bytes: Vec::new(),
            };
            generate(
                sequence,
                &[1],
                &limited(2),
                &mut detokenizer,
                cancel,
                |_| ControlFlow::Break(()),
            )
            .unwrap()
        };
        let outcome = again(&mut sequence, &cancel);
        assert_eq!(outcome.finish, FinishReason::Cancelled);
        assert_eq!((outcome.prompt_tokens, sequence.ids.len()), (0, 2));
        cancel.reset();
        // And a receiver that breaks at the first token has the same effect.
        let outcome = again(&mut sequence, &cancel);
        assert_eq!(outcome.finish, FinishReason::Cancelled);
        assert_eq!((outcome.prompt_tokens, outcome.ids.len()), (1, 1));
        assert_eq!(sequence.ids, [9, 0, 1]);
    }

    #[test]
    fn events_carry_log_probabilities_when_asked() {
        let mut options = limited(1);
        options.sampling.logprobs = Some(2);
        let heard = hear(&mut Scripted::new(1, &[4]), &[9], &options, ABC);
        // softmax of 63 zeros and one 5
        let log_z = (63.0 + 5f32.exp()).ln();
        let Some(Event::Token {
            id: 4,
            logprob: Some(logprob),
            top,
            ..
        }) = heard.events.first()
        else {
            panic!("{:?}", heard.events);
        };
        assert!((logprob - (5.0 - log_z)).abs() < 1e-6);
        assert_eq!(top[0], (4, *logprob));
        assert_eq!(top[1].0, 0);
        assert!((top[1].1 + log_z).abs() < 1e-6);
    }

    #[test]
    fn penalties_see_the_prompt_and_the_answer() {
        let mut options = limited(3);
        options.sampling.repeat_penalty = 10.0;
        // Said once, the script's 5 is worth 5 / 10 - 2, less than the zeros of what was never said.
        options.sampling.presence_penalty = 2.0;
        let mut sequence = Scripted::new(1, &[1, 1, 1]);
        let heard = hear(&mut sequence, &[9], &options, ABC);
        assert_eq!(heard.outcome.unwrap().ids, [1, 0, 2]);
        let mut sequence = Scripted::new(2, &[1, 1, 1]);
        let heard = hear(&mut sequence, &[1, 9], &options, ABC);
        assert_eq!(heard.outcome.unwrap().ids, [0, 2, 3]);
    }

    #[test]
    fn a_stop_string_may_straddle_tokens() {
        let heard = say(&[b"one ", b"<|e", b"nd", b"|> two"], &["<|end|>"]);
        assert_eq!(heard.texts(), ["one ", "", "", ""]);
        assert_eq!(heard.finish(), FinishReason::StopString(0));
        assert_eq!(heard.outcome.unwrap().ids.len(), 4);
        // What only began like one is shown as soon as that is clear, the rest of it held on.
        let heard = say(&[b"<|e", b"n", b"ough<", b"|"], &["<|end|>"]);
        assert_eq!(heard.texts(), ["", "", "<|enough", "", "<|"]);
        assert_eq!(heard.finish(), FinishReason::Length);
    }

    #[test]
    fn overlapping_beginnings_of_a_stop_string_are_followed() {
        let heard = say(&[b"a", b"a", b"a", b"b", b"c"], &["aab"]);
        assert_eq!(heard.texts(), ["", "", "a", ""]);
        assert_eq!(heard.finish(), FinishReason::StopString(0));
        assert_eq!(say(&[b"aaab"], &["aab"]).text(), "a");
        let heard = say(&[b"ab", b"ab", b"ac"], &["abac"]);
        assert_eq!(heard.texts(), ["", "ab", ""]);
    }

    #[test]
    fn of_several_stop_strings_the_first_complete_one_ends_the_answer() {
        let stops = &["cdef", "bcd", "d"];
        // "bcd" and "d" are complete at the same place: the longer one.
        for pieces in [vec![&b"abcdef"[..]], vec![b"ab", b"c", b"de", b"f"]] {
            let heard = say(&pieces, stops);
            assert_eq!(heard.text(), "a");
            assert_eq!(heard.finish(), FinishReason::StopString(1));
        }
    }

    #[test]
    fn stop_strings_of_many_bytes_and_split_characters() {
        // "héé—x" with characters cut between tokens; the stop string is "é—".
        let text = "héé—x".as_bytes();
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        let heard = say(&bytes, &["é—"]);
        assert_eq!(heard.text(), "hé");
        assert_eq!(heard.finish(), FinishReason::StopString(0));
        // An answer cut off inside a character ends with the replacement character,
        assert_eq!(say(&bytes[..2], &["é—"]).text(), "h\u{fffd}");
        // and a stop string found in that last piece counts.
        let heard = say(&bytes[..2], &["\u{fffd}"]);
        assert_eq!(heard.text(), "h");
        assert_eq!(heard.finish(), FinishReason::StopString(0));
    }

    fn looking_up(max_new_tokens: usize, lookup: usize) -> GenerateOptions {
        GenerateOptions {
            lookup,
            ..limited(max_new_tokens)
        }
    }

    #[test]
    fn a_repetition_costs_few_passes() {
        let script: Vec<u32> = (0..40).map(|i| i % 5).collect();
        let mut sequence = Scripted::new(1, &script);
        let heard = hear(&mut sequence, &[9], &looking_up(40, 7), ABC);
        let outcome = heard.outcome.unwrap();
        assert_eq!(outcome.ids, script);
        assert_eq!(outcome.pending, Some(4));
        assert_eq!(sequence.ids.len(), 40);
        // 0 to 4, 0 and 1 one by one; the rest, 33 tokens, eight a pass, and the last one alone.
        assert_eq!(sequence.calls, [1, 1, 1, 1, 1, 1, 1, 8, 8, 8, 8, 1]);
        let stats = LookupStats {
            passes: 11,
            proposed: 28,
            accepted: 28,
        };
        assert_eq!(outcome.lookup, stats);
        let text = [&[9], &script[..]].concat();
        assert_eq!(LookupStats::of_text(&text, 1, 7), stats);

        // Nothing is computed that could not be sampled any more.
        let mut sequence = Scripted::new(1, &script);
        hear(&mut sequence, &[9], &looking_up(38, 7), ABC);
        assert_eq!(sequence.calls, [1, 1, 1, 1, 1, 1, 1, 8, 8, 8, 7]);
    }

    #[test]
    fn a_wrong_guess_is_taken_back() {
        // 0 1 2 proposes what followed 0 1 2 in the prompt.
        let prompt = [9, 0, 1, 2, 3, 4, 3];
        let mut sequence = Scripted::new(prompt.len(), &[0, 1, 2, 3, 0, 0]);
        let heard = hear(&mut sequence, &prompt, &looking_up(6, 3), ABC);
        assert_eq!(sequence.ids, [&prompt[..], &[0, 1, 2, 3, 0]].concat());
        // After 0 1: guessed 2 3 4, of which 2 3 are right, then 0 instead of 4.
        assert_eq!(sequence.calls, [7, 1, 4, 1]);
        let outcome = heard.outcome.unwrap();
        let LookupStats {
            passes,
            proposed,
            accepted,
        } = outcome.lookup;
        assert_eq!((passes, proposed, accepted), (3, 3, 2));
        assert_eq!(heard.events.len(), 6, "an event for each token");
    }

    #[test]
    fn stop_tokens_and_placeholders_are_not_proposed() {
        for last in [40, VOCAB as u32, u32::MAX] {
            let prompt = [0, 1, 2, last, 3];
            let mut sequence = Scripted::new(prompt.len(), &[0, 1, 2, 40]);
            // The placeholders are in the sequence already, and only told to the loop.
            sequence.ids = prompt[..4].to_vec();
            let options = GenerateOptions {
                stop_tokens: BTreeSet::from([40]),
                ..looking_up(9, 5)
            };
            let heard = hear(&mut sequence, &prompt[4..], &options, ABC);
            assert_eq!(heard.finish(), FinishReason::StopToken(40));
            assert_eq!(sequence.calls, [1, 1, 2], "{last}");
        }
    }

    #[test]
    fn no_pass_crosses_a_border_that_its_first_token_does_not() {
        let script = vec![1; 30];
        let mut sequence = Scripted::new(4, &script);
        (sequence.border, sequence.context) = (11, 20);
        let heard = hear(&mut sequence, &[1; 4], &looking_up(30, 4), ABC);
        assert_eq!(heard.finish(), FinishReason::ContextFull);
        // 4, to 9, to the border at 11, beyond it to 16, to the context of 20.
        assert_eq!(sequence.calls, [4, 5, 2, 5, 4]);
        assert_eq!(sequence.ids.len(), 20);
    }

    /// The definition, on the whole text at once.
    fn cut(text: &str, stops: &[String]) -> String {
        let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
        for end in ends {
            let hit = stops.iter().filter(|stop| text[..end].ends_with(*stop));
            if let Some(longest) = hit.map(|stop| stop.len()).max() {
                return text[..end - longest].to_string();
            }
        }
        text.to_string()
    }

    /// Everything that a listener and the next turn can know of a generation, but its cost.
    fn told(sequence: &Scripted, heard: &Heard) -> String {
        let outcome = heard.outcome.clone().map(|o| (o.ids, o.pending, o.finish));
        format!("{:?} {outcome:?} {:?}", sequence.ids, heard.events)
    }

    proptest! {
        #[test]
        fn lookup_and_candidates_change_nothing_but_the_passes(
            script in proptest::collection::vec(0u32..5, 0..60),
            prompt in proptest::collection::vec(0u32..5, 1..20),
            lookup in 1usize..8,
            max_new_tokens in 0usize..70,
            context in 20usize..60,
            border in 0usize..60,
            nan_at in proptest::option::of(20usize..60),
            break_at in 0usize..100,
            stop_token in 3u32..9,
            stop in proptest::option::of("[a-c]{2,4}"),
            temperature in prop_oneof![Just(0.0f32), 0.1f32..0.9],
            frequency_penalty in prop_oneof![Just(0.0f32), 0.0f32..1.0],
            top_k in prop_oneof![Just(0usize), 1usize..8],
            top_p in prop_oneof![Just(1.0f32), 0.1f32..1.0],
            logprobs in proptest::option::of(0usize..3),
            most in 1usize..8,
            seed: u64,
        ) {
            let run = |lookup, device| {
                let mut sequence = Scripted::new(prompt.len(), &script);
                (sequence.context, sequence.border, sequence.nan_at) = (context, border, nan_at);
                sequence.device = device;
                let mut options = looking_up(max_new_tokens, lookup);
                options.stop_tokens.insert(stop_token);
                options.stop_strings.extend(stop.clone());
                options.sampling = SamplingParams {
                    temperature,
                    frequency_penalty,
                    seed,
                    top_k,
                    top_p,
                    logprobs,
                    ..SamplingParams::default()
                };
                let mut detokenizer = Pieces { pieces: ABC, bytes: Vec::new() };
                let mut events = Vec::new();
                let outcome = generate(
                    &mut sequence, &prompt, &options, &mut detokenizer, &Cancel::default(),
                    |event| {
                        events.push(event);
                        match events.len() == break_at {
                            true => ControlFlow::Break(()),
                            false => ControlFlow::Continue(()),
                        }
                    },
                );
                if let Ok(Outcome { ids, lookup: stats, finish, .. }) = &outcome {
                    let passes = stats.passes + stats.accepted;
                    assert_eq!(passes, ids.len().saturating_sub(1), "{finish:?}");
                    assert!(stats.accepted <= stats.proposed);
                }
                let heard = Heard { outcome, events };
                told(&sequence, &heard)
            };
            let want = run(0, None);
            prop_assert_eq!(&run(lookup, None), &want);
            prop_assert_eq!(&run(0, Some(most)), &want, "from candidates");
            prop_assert_eq!(&run(lookup, Some(most)), &want, "from candidates of several rows");
        }

        #[test]
        fn stop_strings_do_not_depend_on_where_the_text_is_cut(
            pieces in proptest::collection::vec("[abé]{0,3}", 0..12),
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let mut watch = StopStrings::new(&stops).unwrap();
            let mut shown = String::new();
            let mut found = false;
            for piece in &pieces {
                let (text, stop) = watch.push(piece);
                shown += &text;
                found |= stop.is_some();
                // Nothing is held that could be shown.
                let held = &watch.held;
                prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held.as_str())));
            }
            shown += &watch.finish();
            let whole = pieces.concat();
            prop_assert_eq!(&shown, &cut(&whole, &stops));
            prop_assert_eq!(found, stops.iter().any(|stop| whole.contains(stop.as_str())));
        }
    }
}
