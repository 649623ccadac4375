//! From logits to the next token.
//!
//! One call of [`Sampler::sample`] does, in this order:
//!
//! 1. **bias**: `score[t] = logit[t] + bias[t]`;
//! 2. **penalties** on every token of the window (the last `repeat_last_n` of prompt and answer):
//!    repetition first, then frequency and presence, see [`SamplingParams`];
//! 3. `temperature == 0`: the token with the greatest score, ties to the lowest id, and we are done;
//! 4. **top-k**, then **top-p**, then **min-p**, all on the distribution at temperature 1;
//! 5. **temperature**: `p[t] ∝ exp(score[t] / temperature)` over the tokens that are left, and a draw.
//!
//! Bias and repetition penalty come in the order of Hugging Face's `generate`
//! (`_get_logits_processor`); steps 4 and 5 in llama.cpp's default order (`penalties; top_k; top_p;
//! min_p; temperature`). Temperature last means that the filters do not depend on it: raising it
//! makes the choice among the good candidates more even and never lets a bad one in. (Hugging Face
//! applies temperature before the filters; at temperature 1 the two agree.)
//!
//! # The same stream on every machine
//!
//! The draw for the `k`-th token of a sampler is a function of the seed and of `k` alone:
//! bytes `8k .. 8k+8` of the ChaCha8 keystream whose 256-bit key is the seed (little-endian, then
//! zeros) and whose nonce is zero, read as a little-endian integer `x`, give
//! `u = (x >> 11) / 2^53` in `[0, 1)`. The chosen token is the first one, in ascending order of ids,
//! at which the running sum of weights exceeds `u` times their total. A later part of the stream can
//! therefore be replayed with [`Sampler::seek`], and speculative decoding draws what plain decoding
//! would have drawn. ChaCha is a published function with test vectors, so the stream cannot change
//! under us. All arithmetic is in f64, with `exp` and `ln` from the `libm` crate: the standard
//! library's call the platform's C library, whose last bit differs between systems.
//!
//! # From candidates
//!
//! Where the logits are in a device's memory, reading all of them takes longer than choosing. Most
//! parameters look at the likeliest tokens only: [`Sampler::candidates`] says how many of them might do,
//! and [`Sampler::sample_candidates`] chooses from those **the token that all logits would have given**,
//! from the same draw, by the same sums in the same order, or says that they do not suffice. Then all
//! logits have to be read. They suffice
//!
//! * for the greatest score: always;
//! * for top-k, with or without the other filters: always, up to [`MOST`] tokens;
//! * for top-p without top-k: where it keeps fewer than there are candidates, and the error of their
//!   mass, some millionths, does not decide how many;
//! * for min-p: where the last candidate is too improbable for it;
//! * for anything: where the rest of the vocabulary is masked.
//!
//! Bias and penalties move tokens up that no candidate list has, a plain temperature can draw any token,
//! and log-probabilities are relative to all of them: these take all logits, and so does a row with NaN or
//! +inf in it, whose error names the value.

use std::cmp::Ordering;

pub use phidias_kernels::candidates::{Candidates, MOST};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Scores this far below the best one are not candidates: `exp(-40)` is 4e-18, and all of a
/// vocabulary of a million such tokens together is less than the spacing of the draws (2^-53) times
/// a hundred thousand; no top-p below 1 can tell them from nothing either (1 - p is at least 6e-8).
const FLOOR_NATS: f64 = 40.0;

/// By how much of it a weight may be off, generously: `exp` in f64 is right to some units of 2^-53.
const WEIGHT_ERROR: f64 = 1e-12;

/// How the next token is chosen. The default is greedy, with every other stage neutral.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the scores before the softmax; at least 0. 0 takes the greatest score (greedy).
    pub temperature: f32,
    /// Keeps the `k` greatest scores (Fan et al. 2018, arXiv:1805.04833), of equal ones those with
    /// the lowest ids; 0 is off.
    pub top_k: usize,
    /// Keeps the shortest run of most probable tokens whose probabilities sum to at least this
    /// (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751), over what top-k left; in (0, 1],
    /// 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least this probable relative to the most probable one (Nguyen et al. 2024,
    /// arXiv:2407.01082); in [0, 1], 0 is off.
    pub min_p: f32,
    /// For every distinct token of the window, once however often it occurs: a negative score is
    /// multiplied by this, any other divided (Keskar et al. 2019, arXiv:1909.05858, as in Hugging
    /// Face's `RepetitionPenaltyLogitsProcessor`); above 0, 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once for every occurrence of a token in the window (OpenAI's API); in [-2, 2].
    pub frequency_penalty: f32,
    /// Subtracted once if a token occurs in the window at all (OpenAI's API); in [-2, 2].
    pub presence_penalty: f32,
    /// The window of the three penalties: how many of the last tokens of prompt and answer; `None`
    /// is all of them, which is Hugging Face's repetition penalty.
    pub repeat_last_n: Option<usize>,
    /// Chooses the stream of draws.
    pub seed: u64,
    /// Added to the logits of these tokens, each named at most once; finite, or `-inf` to forbid.
    pub logit_bias: Vec<(u32, f32)>,
    /// `Some(n)`: report the chosen token's log-probability and those of the `n` likeliest.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: None,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

/// A sampling parameter that cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ParamError {
    /// A number outside its range, or not a number.
    #[error("{field}: expected {expected}, found {found}")]
    OutOfRange {
        /// The field of [`SamplingParams`].
        field: &'static str,
        /// The range in words.
        expected: &'static str,
        /// The value.
        found: f32,
    },
    /// A biased token that the model does not have.
    #[error("logit_bias: expected token ids below {vocab}, found {found}")]
    BiasToken {
        /// The id.
        found: u32,
        /// The number of tokens.
        vocab: usize,
    },
    /// A token with two biases.
    #[error("logit_bias: expected each token once, found token {found} twice")]
    BiasTwice {
        /// The id.
        found: u32,
    },
    /// More alternatives asked for than there are tokens.
    #[error("logprobs: expected at most {vocab} (the vocabulary), found {found}")]
    Logprobs {
        /// The number asked for.
        found: usize,
        /// The number of tokens.
        vocab: usize,
    },
    /// A model without tokens, or with more than an id can name.
    #[error("vocabulary: expected 1 to 2^32 tokens, found {found}")]
    Vocab {
        /// The number of tokens.
        found: usize,
    },
}

impl SamplingParams {
    /// Checks every field against its range and against a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// The first field that is out of range. NaN is in no range.
    pub fn validate(&self, vocab: usize) -> Result<(), ParamError> {
        let check = |field, expected, found: f32, good: bool| {
            if good {
                Ok(())
            } else {
                Err(ParamError::OutOfRange {
                    field,
                    expected,
                    found,
                })
            }
        };
        if vocab == 0 || u32::try_from(vocab - 1).is_err() {
            return Err(ParamError::Vocab { found: vocab });
        }
        let t = self.temperature;
        check(
            "temperature",
            "a finite number, at least 0",
            t,
            t.is_finite() && t >= 0.0,
        )?;
        let p = self.top_p;
        check(
            "top_p",
            "a number above 0, at most 1",
            p,
            p > 0.0 && p <= 1.0,
        )?;
        let p = self.min_p;
        check("min_p", "a number from 0 to 1", p, (0.0..=1.0).contains(&p))?;
        let p = self.repeat_penalty;
        check(
            "repeat_penalty",
            "a finite number above 0",
            p,
            p.is_finite() && p > 0.0,
        )?;
        for (field, p) in [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
        ] {
            check(field, "a number from -2 to 2", p, (-2.0..=2.0).contains(&p))?;
        }
        let mut biased: Vec<u32> = Vec::with_capacity(self.logit_bias.len());
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab {
                return Err(ParamError::BiasToken { found: id, vocab });
            }
            check(
                "logit_bias",
                "a finite number, or -inf to forbid a token",
                bias,
                bias < f32::INFINITY, // false for NaN
            )?;
            biased.push(id);
        }
        biased.sort_unstable();
        if let Some(pair) = biased.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ParamError::BiasTwice { found: pair[0] });
        }
        if let Some(found) = self.logprobs.filter(|&n| n > vocab) {
            return Err(ParamError::Logprobs { found, vocab });
        }
        Ok(())
    }

    /// Whether any of the three penalties does anything.
    fn penalizes(&self) -> bool {
        self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// Logits from which no token can be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// Not as many logits as tokens.
    #[error("logits: expected {expected} of them (the vocabulary), found {found}")]
    Length {
        /// The vocabulary.
        expected: usize,
        /// The length of the slice.
        found: usize,
    },
    /// NaN or +inf.
    #[error("logits: expected finite numbers, found {value} for token {index}")]
    NonFinite {
        /// The token whose logit it is.
        index: usize,
        /// The value.
        value: f32,
    },
    /// Every token is at -inf, by the logits or by the bias.
    #[error("logits: expected at least one token allowed, found all {vocab} masked (-inf)")]
    AllMasked {
        /// The vocabulary.
        vocab: usize,
    },
}

/// A chosen token.
///
/// The log-probabilities are natural logarithms of the model's own distribution, the softmax of the
/// raw logits *before* bias, penalties, filters and temperature: they say what the model thought of
/// the token and do not depend on how it was sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its log-probability, if [`SamplingParams::logprobs`] asked for it. `-inf` if the model masks
    /// the token (which cannot be chosen then).
    pub logprob: Option<f32>,
    /// The likeliest tokens and their log-probabilities, the likeliest first, of equal ones the
    /// lowest id first; as many as asked for.
    pub top: Vec<(u32, f32)>,
}

/// Chooses tokens one after another. Cheap to clone: the state is the number of tokens drawn.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    vocab: usize,
    draws: u64,
    scratch: Scratch,
}

/// A token that may still be drawn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    score: f64,
    weight: f64, // exp(score - best), or its temperature-scaled form in the last stage
}

impl Candidate {
    /// Greatest score first, of equal ones the lowest id.
    fn by_rank(&self, other: &Self) -> Ordering {
        other
            .score
            .total_cmp(&self.score)
            .then(self.id.cmp(&other.id))
    }
}

/// Buffers that live from token to token. They carry no state, so a clone starts with empty ones.
#[derive(Debug, Default)]
struct Scratch {
    scores: Vec<f64>, // [vocab]
    counts: Vec<u32>, // [vocab], all 0 between calls
    candidates: Vec<Candidate>,
    maxima: Vec<f64>, // of groups of scores
}

impl Clone for Scratch {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Sampler {
    /// A sampler at the start of its stream.
    ///
    /// # Errors
    /// What [`SamplingParams::validate`] finds.
    pub fn new(params: SamplingParams, vocab: usize) -> Result<Self, ParamError> {
        params.validate(vocab)?;
        Ok(Self {
            params,
            vocab,
            draws: 0,
            scratch: Scratch::default(),
        })
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// How many tokens have been chosen: the `k` of the next draw.
    pub fn draws(&self) -> u64 {
        self.draws
    }

    /// Goes to draw number `k`, forwards or backwards. The next token is chosen exactly as the
    /// `k`-th one (counted from 0) of a fresh sampler would be from the same logits and history.
    pub fn seek(&mut self, k: u64) {
        self.draws = k;
    }

    /// Chooses the next token. `logits`: `[vocab]`; `history`: prompt and answer so far, of which
    /// ids outside the vocabulary (placeholders for images) are passed over.
    ///
    /// Every choice, a greedy one too, moves the stream on by one draw; an error does not.
    ///
    /// # Errors
    /// A wrong number of logits, NaN or +inf among them, or all of them masked.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<Sampled, SampleError> {
        if logits.len() != self.vocab {
            return Err(SampleError::Length {
                expected: self.vocab,
                found: logits.len(),
            });
        }
        if let Some(index) = logits
            .iter()
            .position(|&x| x.is_nan() || x == f32::INFINITY)
        {
            let value = logits[index];
            return Err(SampleError::NonFinite { index, value });
        }
        self.score(logits, history);
        let best =
            argmax(&self.scratch.scores).ok_or(SampleError::AllMasked { vocab: self.vocab })?;
        let id = if self.params.temperature == 0.0 {
            best
        } else {
            self.filter(best);
            self.draw(best, self.scratch.scores[best as usize])
        };
        self.draws = self.draws.wrapping_add(1);
        let (logprob, top) = match self.params.logprobs {
            None => (None, Vec::new()),
            Some(n) => {
                let log_z = log_sum_exp(logits);
                let logprob = |id: u32| (f64::from(logits[id as usize]) - log_z) as f32;
                let top = likeliest(logits, n);
                (
                    Some(logprob(id)),
                    top.into_iter().map(|id| (id, logprob(id))).collect(),
                )
            }
        };
        Ok(Sampled { id, logprob, top })
    }

    /// How many of the likeliest tokens might do in place of all logits; `None` where they never would.
    #[must_use]
    pub fn candidates(&self) -> Option<usize> {
        let params = &self.params;
        if params.penalizes() || !params.logit_bias.is_empty() || params.logprobs.is_some() {
            return None;
        }
        let count = match params.top_k {
            _ if params.temperature == 0.0 => 1,
            k @ 1..=MOST => k,
            // That many are read as fast as a few, and decide nearly always.
            0 if params.top_p < 1.0 => MOST,
            _ if params.top_p == 1.0 && params.min_p > 0.0 => MOST,
            _ => return None,
        };
        Some(count.min(self.vocab))
    }

    /// Chooses the next token from the likeliest ones: the one that [`Sampler::sample`] would have chosen
    /// from all logits. `None` where that takes all of them; it is then as if this had not been called.
    ///
    /// # Errors
    /// All logits masked, as [`Sampler::sample`] reports it.
    pub fn sample_candidates(
        &mut self,
        candidates: &Candidates,
    ) -> Option<Result<Sampled, SampleError>> {
        if self.candidates().is_none() || candidates.refused.is_some() {
            return None;
        }
        let Some(&(best, max)) = candidates.list.first() else {
            return Some(Err(SampleError::AllMasked { vocab: self.vocab }));
        };
        let id = if self.params.temperature == 0.0 {
            best
        } else {
            self.filter_candidates(candidates)?;
            self.draw(best, f64::from(max))
        };
        self.draws = self.draws.wrapping_add(1);
        Some(Ok(Sampled {
            id,
            logprob: None,
            top: Vec::new(),
        }))
    }

    /// Bias and penalties: fills `scratch.scores`. f64 cannot overflow here, so a score is finite
    /// or `-inf`.
    fn score(&mut self, logits: &[f32], history: &[u32]) {
        let Scratch { scores, counts, .. } = &mut self.scratch;
        let params = &self.params;
        scores.clear();
        // Adding 0.0 turns -0.0 into 0.0: equal logits must be equal in the total order too.
        scores.extend(logits.iter().map(|&x| f64::from(x) + 0.0));
        for &(id, bias) in &params.logit_bias {
            scores[id as usize] += f64::from(bias);
        }
        if !params.penalizes() {
            return;
        }
        let window = params.repeat_last_n.unwrap_or(history.len());
        let window = &history[history.len().saturating_sub(window)..];
        counts.resize(self.vocab, 0);
        for &id in window {
            if let Some(count) = counts.get_mut(id as usize) {
                *count = count.saturating_add(1);
            }
        }
        let repeat = f64::from(params.repeat_penalty);
        let frequency = f64::from(params.frequency_penalty);
        let presence = f64::from(params.presence_penalty);
        for &id in window {
            // The first visit of a token takes its count away: each is penalised once.
            let Some(count) = counts.get_mut(id as usize).map(std::mem::take) else {
                continue;
            };
            if count == 0 {
                continue;
            }
            let score = &mut scores[id as usize];
            *score = if *score < 0.0 {
                *score * repeat
            } else {
                *score / repeat
            };
            *score -= f64::from(count) * frequency + presence;
        }
    }

    /// Top-k, top-p and min-p: leaves in `scratch.candidates` the tokens that may be drawn, in
    /// ascending order of ids. Partial selection throughout: never a sort of the whole vocabulary.
    fn filter(&mut self, best: u32) {
        let max = self.scratch.scores[best as usize];
        let mut floor = self.floor(max);
        let Scratch {
            scores,
            candidates,
            maxima,
            ..
        } = &mut self.scratch;
        let k = self.params.top_k;
        if k > 0 {
            floor = floor.max(reached_by(scores, k, maxima));
        }
        candidates.clear();
        candidates.extend(
            (0u32..)
                .zip(scores.iter())
                .filter(|&(_, &score)| score >= floor && score > f64::NEG_INFINITY)
                .map(|(id, &score)| Candidate {
                    id,
                    score,
                    weight: 0.0,
                }),
        );
        if k > 0 && k < candidates.len() {
            candidates.select_nth_unstable_by(k - 1, Candidate::by_rank);
            candidates.truncate(k);
            // What an unstable selection leaves behind is in no defined order, and sums must be.
            candidates.sort_unstable_by_key(|c| c.id);
        }
        self.weigh(max);
        self.keep_top_p();
        self.keep_min_p();
    }

    /// What [`Sampler::filter`] leaves, from the likeliest tokens; `None` where they do not tell.
    fn filter_candidates(&mut self, from: &Candidates) -> Option<()> {
        let list = &from.list;
        let (max, last) = (f64::from(list[0].1), f64::from(list[list.len() - 1].1));
        let floor = self.floor(max);
        let params = &self.params;
        // Whether what top-k leaves is in the list. Equal scores are in the order of ids, here and there.
        let whole = from.complete || (1..=list.len()).contains(&params.top_k);
        let kept = if whole {
            match params.top_k {
                0 => list.len(),
                k => k.min(list.len()),
            }
        } else if params.top_k == 0 && params.top_p < 1.0 {
            from.nucleus(params.top_p)?
        } else if params.top_p == 1.0
            && libm::exp(last - max) < f64::from(params.min_p) * (1.0 - WEIGHT_ERROR)
        {
            list.len()
        } else {
            return None;
        };
        let candidates = &mut self.scratch.candidates;
        candidates.clear();
        candidates.extend(list[..kept].iter().map(|&(id, score)| Candidate {
            id,
            score: f64::from(score),
            weight: 0.0,
        }));
        candidates.retain(|c| c.score >= floor);
        candidates.sort_unstable_by_key(|c| c.id);
        self.weigh(max);
        // Otherwise they are the nucleus, or there is none.
        if whole {
            self.keep_top_p();
        }
        self.keep_min_p();
        Some(())
    }

    /// The score below which no token is drawn.
    fn floor(&self, max: f64) -> f64 {
        // Temperatures above 1 raise what lies low, so the floor goes down with them.
        max - FLOOR_NATS * f64::from(self.params.temperature).max(1.0)
    }

    /// The weights that top-p and min-p compare.
    fn weigh(&mut self, max: f64) {
        if self.params.top_p < 1.0 || self.params.min_p > 0.0 {
            for c in &mut self.scratch.candidates {
                c.weight = libm::exp(c.score - max);
            }
        }
    }

    /// Top-p.
    fn keep_top_p(&mut self) {
        let top_p = f64::from(self.params.top_p);
        if top_p < 1.0 {
            let candidates = &mut self.scratch.candidates;
            let total: f64 = candidates.iter().map(|c| c.weight).sum();
            // All tokens below this weight together are half of what top-p leaves out at most, so
            // none of them is in the nucleus: most of the vocabulary goes without any sorting.
            let tail = 0.5 * (1.0 - top_p) * total / candidates.len() as f64;
            candidates.retain(|c| c.weight >= tail);
            let kept = nucleus(candidates, top_p * total);
            candidates.truncate(kept);
            candidates.sort_unstable_by_key(|c| c.id);
        }
    }

    /// Min-p.
    fn keep_min_p(&mut self) {
        let least = f64::from(self.params.min_p);
        if least > 0.0 {
            self.scratch.candidates.retain(|c| c.weight >= least);
        }
    }

    /// Temperature and the draw over `scratch.candidates`; `max` is the score of `best`.
    fn draw(&mut self, best: u32, max: f64) -> u32 {
        let temperature = f64::from(self.params.temperature);
        let mut total = 0.0;
        for c in &mut self.scratch.candidates {
            c.weight = libm::exp((c.score - max) / temperature);
            total += c.weight;
        }
        let target = uniform(self.params.seed, self.draws) * total;
        let mut sum = 0.0;
        let mut last = best;
        for c in &self.scratch.candidates {
            sum += c.weight;
            if sum > target {
                return c.id;
            }
            if c.weight > 0.0 {
                last = c.id;
            }
        }
        last // the product was rounded up to the total
    }
}

/// Draw number `k` of `seed`, in `[0, 1)`; defined at the head of this file.
fn uniform(seed: u64, k: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_word_pos(2 * u128::from(k));
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The greatest score's token, the lowest of equal ones; `None` if all are `-inf`.
fn argmax(scores: &[f64]) -> Option<u32> {
    let mut best = (f64::NEG_INFINITY, None);
    for (id, &score) in (0u32..).zip(scores) {
        if score > best.0 {
            best = (score, Some(id));
        }
    }
    best.1
}

/// A score that `k` tokens reach at least, `-inf` where this finds none: what is below it is not among
/// the `k` greatest. The scores are dealt out to groups, each group's maximum is a token's score, and
/// so the `k`-th greatest maximum is reached by `k` tokens. Where `k` is small beside the number of
/// groups hardly more reach it.
fn reached_by(scores: &[f64], k: usize, maxima: &mut Vec<f64>) -> f64 {
    /// Neighbours go to different groups, which compares whole registers at a time.
    const WIDTH: usize = 8;
    const GROUP: usize = 32;
    maxima.clear();
    for block in scores.chunks(GROUP * WIDTH) {
        let mut greatest = [f64::NEG_INFINITY; WIDTH];
        for row in block.chunks(WIDTH) {
            for (greatest, &score) in greatest.iter_mut().zip(row) {
                *greatest = if score > *greatest { score } else { *greatest };
            }
        }
        maxima.extend(greatest);
    }
    if maxima.len() < k {
        return f64::NEG_INFINITY;
    }
    *maxima
        .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a))
        .1
}

/// Moves the most probable candidates to the front, most probable first, until their weights sum to
/// `target`, and says how many that took (at least one). Selects 64, then four times as many, and so
/// on: a usual nucleus is found in the first round.
fn nucleus(candidates: &mut [Candidate], target: f64) -> usize {
    let (mut sorted, mut step, mut mass) = (0, 64, 0.0);
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let take = step.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take - 1, Candidate::by_rank);
        }
        rest[..take].sort_unstable_by(Candidate::by_rank);
        for (i, c) in rest[..take].iter().enumerate() {
            mass += c.weight;
            if mass >= target {
                return sorted + i + 1;
            }
        }
        sorted += take;
        step *= 4;
    }
    candidates.len()
}

/// `ln Σ exp(x)`, with the greatest taken out so that nothing overflows. At least one is not `-inf`.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|&x| libm::exp(f64::from(x) - max)).sum();
    max + libm::log(sum)
}

/// The `n` greatest logits' tokens, greatest first, of equal ones the lowest id first.
fn likeliest(logits: &[f32], n: usize) -> Vec<u32> {
    if n == 0 {
        return Vec::new();
    }
    // -0.0 and 0.0 are equal logits, which total_cmp alone would not say: adding 0.0 joins them.
    let by_rank = |&a: &u32, &b: &u32| {
        let (x, y) = (logits[a as usize] + 0.0, logits[b as usize] + 0.0);
        y.total_cmp(&x).then(a.cmp(&b))
    };
    let mut ids: Vec<u32> = (0u32..).zip(logits).map(|(id, _)| id).collect();
    if n < ids.len() {
        ids.select_nth_unstable_by(n - 1, by_rank);
        ids.truncate(n);
    }
    ids.sort_unstable_by(by_rank);
    ids
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn sampler(params: SamplingParams, vocab: usize) -> Sampler {
        Sampler::new(params, vocab).unwrap()
    }

    /// The token chosen from these logits at the start of the stream.
    fn once(params: SamplingParams, logits: &[f32], history: &[u32]) -> u32 {
        let mut sampler = sampler(params, logits.len());
        sampler.sample(logits, history).unwrap().id
    }

    /// Every token that 2000 draws bring up.
    fn seen(params: SamplingParams, logits: &[f32]) -> BTreeSet<u32> {
        let mut sampler = sampler(params, logits.len());
        (0..2000)
            .map(|_| sampler.sample(logits, &[]).unwrap().id)
            .collect()
    }

    fn hot(temperature: f32) -> SamplingParams {
        SamplingParams {
            temperature,
            ..SamplingParams::default()
        }
    }

    fn ln(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    fn set(ids: &[u32]) -> BTreeSet<u32> {
        ids.iter().copied().collect()
    }

    #[test]
    fn greedy_takes_the_greatest_and_the_lowest_id_of_equals() {
        let greedy = SamplingParams::default;
        assert_eq!(once(greedy(), &[1.0, 3.0, 3.0, 2.0], &[]), 1);
        assert_eq!(once(greedy(), &[-0.0, 0.0], &[]), 0);
        assert_eq!(once(greedy(), &[f32::NEG_INFINITY, -5.0], &[]), 1);
        assert_eq!(once(greedy(), &[f32::MIN], &[]), 0);
    }

    #[test]
    fn top_k_of_one_is_greedy_at_any_temperature() {
        for temperature in [1e-30, 1.0, f32::MAX] {
            let params = SamplingParams {
                top_k: 1,
                ..hot(temperature)
            };
            assert_eq!(seen(params, &[1.0, 3.0, 3.0, 2.0]), set(&[1]));
        }
    }

    #[test]
    fn a_temperature_near_zero_is_greedy_and_a_vast_one_uniform() {
        assert_eq!(seen(hot(f32::MIN_POSITIVE), &[1.0, 3.0, 2.0]), set(&[1]));
        // Even what lies 1000 nats down takes part when the temperature says so.
        assert_eq!(seen(hot(f32::MAX), &[0.0, -1000.0, 7.0]), set(&[0, 1, 2]));
    }

    #[test]
    fn logits_that_are_not_numbers_are_refused_by_index_and_value() {
        let mut sampler = sampler(hot(1.0), 3);
        for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let error = sampler.sample(&[0.0, f32::NEG_INFINITY, value], &[]);
            assert_eq!(
                error.unwrap_err().to_string(),
                format!("logits: expected finite numbers, found {text} for token 2")
            );
        }
        assert_eq!(
            sampler.sample(&[0.0; 4], &[]),
            Err(SampleError::Length {
                expected: 3,
                found: 4
            })
        );
        assert_eq!(
            sampler.sample(&[f32::NEG_INFINITY; 3], &[]),
            Err(SampleError::AllMasked { vocab: 3 })
        );
        assert_eq!(sampler.draws(), 0, "an error does not use up a draw");
    }

    #[test]
    fn bias_can_forbid_tokens_but_not_all_of_them() {
        let forbid = |ids: &[u32]| SamplingParams {
            logit_bias: ids.iter().map(|&id| (id, f32::NEG_INFINITY)).collect(),
            ..hot(1.0)
        };
        assert_eq!(seen(forbid(&[1]), &[0.0; 3]), set(&[0, 2]));
        let error = sampler(forbid(&[0, 1, 2]), 3).sample(&[0.0; 3], &[]);
        assert_eq!(error, Err(SampleError::AllMasked { vocab: 3 }));
    }

    #[test]
    fn parameters_out_of_range_are_refused_by_name() {
        type Change = fn(&mut SamplingParams);
        let cases: &[(&str, Change)] = &[
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.1),
            ("top_p", |p| p.top_p = f32::NAN),
            ("min_p", |p| p.min_p = -0.1),
            ("min_p", |p| p.min_p = 1.1),
            ("min_p", |p| p.min_p = f32::NAN),
            ("repeat_penalty", |p| p.repeat_penalty = 0.0),
            ("repeat_penalty", |p| p.repeat_penalty = -1.0),
            ("repeat_penalty", |p| p.repeat_penalty = f32::NAN),
            ("repeat_penalty", |p| p.repeat_penalty = f32::INFINITY),
            ("frequency_penalty", |p| p.frequency_penalty = 2.1),
            ("frequency_penalty", |p| p.frequency_penalty = f32::NAN),
            ("presence_penalty", |p| p.presence_penalty = -2.1),
            ("presence_penalty", |p| p.presence_penalty = f32::NAN),
            ("logit_bias", |p| p.logit_bias = vec![(8, 0.0)]),
            ("logit_bias", |p| p.logit_bias = vec![(3, 0.0), (3, 1.0)]),
            ("logit_bias", |p| p.logit_bias = vec![(3, f32::NAN)]),
            ("logit_bias", |p| p.logit_bias = vec![(3, f32::INFINITY)]),
            ("logprobs", |p| p.logprobs = Some(9)),
        ];
        assert_eq!(SamplingParams::default().validate(8), Ok(()));
        for (field, change) in cases {
            let mut params = SamplingParams::default();
            change(&mut params);
            let error = Sampler::new(params, 8).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{field}: expected ")), "{error}");
            assert!(error.contains(", found "), "{error}");
        }
        let error = SamplingParams::default().validate(0);
        assert_eq!(error, Err(ParamError::Vocab { found: 0 }));
        let limits = SamplingParams {
            top_k: usize::MAX,
            min_p: 1.0,
            repeat_penalty: f32::MAX,
            frequency_penalty: -2.0,
            presence_penalty: 2.0,
            repeat_last_n: Some(usize::MAX),
            seed: u64::MAX,
            logprobs: Some(8),
            ..hot(f32::MAX)
        };
        assert_eq!(limits.validate(8), Ok(()));
    }

    /// Test vector TC1 (all-zero key and nonce, 8 rounds, 256-bit key) of
    /// draft-strombergson-chacha-test-vectors: the keystream begins
    /// 3e 00 ef 2f 89 5f 40 d6 | 7f 5b b8 e8 1f 09 a5 a1; the draws are those bytes.
    #[test]
    fn the_stream_is_the_chacha8_keystream() {
        let unit = |x: u64| (x >> 11) as f64 / (1u64 << 53) as f64;
        assert_eq!(uniform(0, 0), unit(0xd640_5f89_2fef_003e));
        assert_eq!(uniform(0, 1), unit(0xa1a5_091f_e8b8_5b7f));
        for (seed, k) in [(0, 2), (7, 1 << 40), (u64::MAX, u64::MAX)] {
            assert!((0.0..1.0).contains(&uniform(seed, k)));
        }
    }

    /// Written down once, and found the same by a program in another language that follows the
    /// head of this file; a change here breaks every script that relies on a seed.
    #[test]
    fn the_same_tokens_for_the_same_seed_for_ever() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 100) as f32 * 0.05).collect();
        let params = SamplingParams {
            top_k: 60,
            top_p: 0.95,
            min_p: 0.01,
            repeat_penalty: 1.1,
            seed: 42,
            ..hot(0.8)
        };
        let mut sampler = sampler(params, 100);
        let mut ids = Vec::new();
        for _ in 0..12 {
            let id = sampler.sample(&logits, &ids).unwrap().id;
            ids.push(id);
        }
        assert_eq!(ids, GOLDEN);
    }
    const GOLDEN: [u32; 12] = [35, 27, 51, 37, 81, 8, 53, 27, 51, 81, 59, 81];

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let logits = ln(&[0.1, 0.2, 0.3, 0.4]);
        let mut whole = sampler(hot(1.0), 4);
        let ids: Vec<u32> = (0..50)
            .map(|_| whole.sample(&logits, &[]).unwrap().id)
            .collect();
        let mut again = whole.clone();
        for k in [49, 0, 20, 21] {
            again.seek(k);
            assert_eq!(again.sample(&logits, &[]).unwrap().id, ids[k as usize]);
            assert_eq!(again.draws(), k + 1);
        }
        let mut other = sampler(
            SamplingParams {
                seed: 1,
                ..hot(1.0)
            },
            4,
        );
        let others: Vec<u32> = (0..50)
            .map(|_| other.sample(&logits, &[]).unwrap().id)
            .collect();
        assert_ne!(ids, others);
    }

    /// Pearson's chi-square over 20,000 draws against softmax(logits / temperature) of 8 tokens, 7
    /// degrees of freedom: 29.88 is exceeded by chance once in ten thousand, and the seed is fixed.
    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 1.0, 0.25];
        for (seed, temperature) in [(1, 0.7f32), (2, 1.0), (3, 2.5)] {
            let params = SamplingParams {
                seed,
                ..hot(temperature)
            };
            let mut sampler = sampler(params, 8);
            let draws = 20_000;
            let mut counts = [0.0f64; 8];
            for _ in 0..draws {
                counts[sampler.sample(&logits, &[]).unwrap().id as usize] += 1.0;
            }
            let weights = logits.map(|x| f64::from(x / temperature).exp());
            let total: f64 = weights.iter().sum();
            let chi2: f64 = (0..8)
                .map(|i| {
                    let expected = weights[i] / total * f64::from(draws);
                    (counts[i] - expected).powi(2) / expected
                })
                .sum();
            assert!(chi2 < 29.88, "temperature {temperature}: {chi2}");
            // Too good to be true is a fault as well: 0.40 is the other end, once in ten thousand.
            assert!(chi2 > 0.40, "temperature {temperature}: {chi2}");
        }
    }

    #[test]
    fn top_k_keeps_k_and_of_equals_the_lowest_ids() {
        let top_k = |top_k| SamplingParams { top_k, ..hot(1.0) };
        let logits = [1.0, 2.0, 1.0, 1.0];
        assert_eq!(seen(top_k(2), &logits), set(&[0, 1]));
        assert_eq!(seen(top_k(3), &logits), set(&[0, 1, 2]));
        assert_eq!(seen(top_k(0), &logits), set(&[0, 1, 2, 3]));
        assert_eq!(seen(top_k(4), &logits), set(&[0, 1, 2, 3]));
        assert_eq!(seen(top_k(usize::MAX), &logits), set(&[0, 1, 2, 3]));
    }

    /// The bound that spares most of a vocabulary: all of the k greatest pass it, ties of the last
    /// included, and where groups are many few others do.
    #[test]
    fn top_k_of_a_large_vocabulary_is_the_head_of_a_full_sort() {
        for (vocab, levels) in [
            (255, 9),
            (257, 1),
            (2000, 50),
            (32_064, 20),
            (32_064, 1 << 20),
        ] {
            let level = |i| (uniform(vocab, i) * f64::from(levels)).floor() as f32;
            let logits: Vec<f32> = (0..vocab)
                .map(|i| level(i) * 12.0 / levels as f32)
                .collect();
            let scores: Vec<f64> = logits.iter().map(|v| f64::from(*v)).collect();
            for top_k in [1, 2, 7, 8, 9, 40, 63, 64, 65, 1000, 1008, 1009, 40_000] {
                let bound = reached_by(&scores, top_k, &mut Vec::new());
                let reach = scores.iter().filter(|s| **s >= bound).count();
                assert!(reach >= top_k.min(logits.len()), "{vocab} {top_k}");
                if levels > 1000 && top_k <= 40 {
                    assert!(reach <= 2 * top_k, "{reach} for {top_k}");
                }
                let params = SamplingParams { top_k, ..hot(1.0) };
                let mut sampler = sampler(params, logits.len());
                sampler.score(&logits, &[]);
                let best = argmax(&sampler.scratch.scores).unwrap();
                sampler.filter(best);
                let kept: Vec<u32> = sampler.scratch.candidates.iter().map(|c| c.id).collect();
                let mut want = likeliest(&logits, top_k);
                want.sort_unstable();
                assert_eq!(kept, want, "{vocab} {top_k}");
            }
        }
    }

    #[test]
    fn top_p_keeps_the_token_that_reaches_it() {
        let top_p = |top_p| SamplingParams { top_p, ..hot(1.0) };
        let logits = ln(&[0.125, 0.5, 0.125, 0.25]);
        assert_eq!(seen(top_p(f32::MIN_POSITIVE), &logits), set(&[1]));
        assert_eq!(seen(top_p(0.499), &logits), set(&[1]));
        assert_eq!(seen(top_p(0.501), &logits), set(&[1, 3]));
        assert_eq!(seen(top_p(0.76), &logits), set(&[0, 1, 3]));
        assert_eq!(seen(top_p(0.99), &logits), set(&[0, 1, 2, 3]));
        // Exactly representable: two of four equal tokens make one half, and no third is kept.
        assert_eq!(seen(top_p(0.5), &[0.0; 4]), set(&[0, 1]));
    }

    #[test]
    fn min_p_is_relative_to_the_best_and_includes_its_bound() {
        let min_p = |min_p| SamplingParams { min_p, ..hot(1.0) };
        let logits = ln(&[0.1, 0.5, 0.1, 0.3]);
        assert_eq!(seen(min_p(0.61), &logits), set(&[1]));
        assert_eq!(seen(min_p(0.59), &logits), set(&[1, 3]));
        assert_eq!(seen(min_p(0.19), &logits), set(&[0, 1, 2, 3]));
        assert_eq!(seen(min_p(1.0), &[2.0, 1.0, 2.0]), set(&[0, 2]));
    }

    #[test]
    fn filters_come_in_their_documented_order() {
        // top-p after top-k, on what is left: 0.4 of 0.7 reaches 0.55, 0.4 of 1 would not.
        let params = SamplingParams {
            top_k: 2,
            top_p: 0.55,
            ..hot(1.0)
        };
        assert_eq!(seen(params, &ln(&[0.4, 0.3, 0.2, 0.1])), set(&[0]));
        // min-p after top-p: before it, 0.5 of 0.8 would have reached 0.6 alone.
        let params = SamplingParams {
            top_p: 0.6,
            min_p: 0.5,
            ..hot(1.0)
        };
        assert_eq!(seen(params, &ln(&[0.5, 0.3, 0.15, 0.05])), set(&[0, 1]));
        // temperature last: at 100 all four are equal, and top-p before it still keeps only one.
        let params = SamplingParams {
            top_p: 0.5,
            ..hot(100.0)
        };
        assert_eq!(seen(params, &ln(&[0.7, 0.1, 0.1, 0.1])), set(&[0]));
        // bias before penalty: (-1 + 3) / 4 beats 0; -1 * 4 + 3 would not.
        let params = SamplingParams {
            logit_bias: vec![(1, 3.0)],
            repeat_penalty: 4.0,
            ..SamplingParams::default()
        };
        assert_eq!(once(params, &[0.0, -1.0], &[1]), 1);
    }

    #[test]
    fn the_repetition_penalty_divides_or_multiplies_once_per_token() {
        let scores = |params: SamplingParams, logits: &[f32], history: &[u32]| {
            let mut sampler = sampler(params, logits.len());
            sampler.score(logits, history);
            assert!(sampler.scratch.counts.iter().all(|&count| count == 0));
            sampler.scratch.scores
        };
        let repeat = SamplingParams {
            repeat_penalty: 2.0,
            ..SamplingParams::default()
        };
        let logits = [3.0, -3.0, 0.0, f32::NEG_INFINITY, 1.0];
        assert_eq!(
            scores(repeat.clone(), &logits, &[0, 1, 2, 3, 0, 0, 1, 99]),
            [1.5, -6.0, 0.0, f64::NEG_INFINITY, 1.0]
        );
        let windowed = |repeat_last_n| SamplingParams {
            repeat_last_n,
            ..repeat.clone()
        };
        let history = [0, 4, 1];
        assert_eq!(scores(windowed(None), &logits, &history)[0], 1.5);
        assert_eq!(scores(windowed(Some(3)), &logits, &history)[0], 1.5);
        assert_eq!(scores(windowed(Some(2)), &logits, &history)[0], 3.0);
        assert_eq!(scores(windowed(Some(0)), &logits, &history)[1], -3.0);
        // Repetition first, then frequency per occurrence and presence once.
        let all = SamplingParams {
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..repeat
        };
        assert_eq!(
            scores(all, &[4.0, 4.0, 4.0], &[0, 0, 0, 1]),
            [2.0 - 1.5 - 0.25, 2.0 - 0.5 - 0.25, 4.0]
        );
    }

    #[test]
    fn log_probabilities_are_those_of_the_raw_logits() {
        let logits = ln(&[0.125, 0.5, 0.125, 0.25]);
        let params = SamplingParams {
            logit_bias: vec![(1, f32::NEG_INFINITY)],
            repeat_penalty: 1.5,
            top_k: 1,
            logprobs: Some(3),
            ..hot(0.3)
        };
        let sampled = sampler(params, 4).sample(&logits, &[0, 1]).unwrap();
        let close = |a: f32, p: f32| assert!((a - p.ln()).abs() < 1e-6, "{a} for {p}");
        assert_eq!(sampled.id, 3);
        close(sampled.logprob.unwrap(), 0.25);
        let ids: Vec<u32> = sampled.top.iter().map(|t| t.0).collect();
        assert_eq!(ids, [1, 3, 0]);
        close(sampled.top[0].1, 0.5);
        close(sampled.top[2].1, 0.125);

        let none = sampler(hot(1.0), 4).sample(&logits, &[]).unwrap();
        assert_eq!((none.logprob, none.top), (None, vec![]));
        let params = SamplingParams {
            logprobs: Some(0),
            ..hot(0.0)
        };
        let own = sampler(params, 3).sample(&[-1e30, 0.0, f32::NEG_INFINITY], &[]);
        let own = own.unwrap();
        assert_eq!((own.id, own.logprob, own.top), (1, Some(0.0), vec![]));
    }

    /// The filters as they are defined, with full sorts and nothing clever.
    fn allowed(params: &SamplingParams, logits: &[f32]) -> BTreeSet<u32> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if params.top_k > 0 {
            order.truncate(params.top_k);
        }
        let best = f64::from(logits[order[0]]);
        let weight = |id: usize| libm::exp(f64::from(logits[id]) - best);
        if params.top_p < 1.0 {
            // The bound is taken with a margin far above any rounding: one token more is no fault.
            let total: f64 = order.iter().map(|&id| weight(id)).sum();
            let target = f64::from(params.top_p) * total * (1.0 + 1e-12);
            let mut mass = 0.0;
            let reached = order.iter().position(|&id| {
                mass += weight(id);
                mass >= target
            });
            order.truncate(reached.map_or(order.len(), |i| i + 1));
        }
        order.retain(|&id| weight(id) >= f64::from(params.min_p));
        order.into_iter().map(|id| id as u32).collect()
    }

    /// What a device would hand over of some logits: their mass is off by as much as it says it may be.
    fn handed_over(logits: &[f32], count: usize, off: f64) -> Candidates {
        let exact = Candidates::of(logits, count);
        Candidates {
            mass: match count {
                1 => f32::INFINITY,
                _ => (f64::from(exact.mass) * (1.0 + off)) as f32,
            },
            mass_error: exact.mass_error + off.abs(),
            complete: exact.list.len() < count || count == logits.len(),
            ..exact
        }
    }

    /// Whether candidates suffice; then they must give what all logits give, and move the stream alike.
    fn suffices(params: &SamplingParams, logits: &[f32], off: f64, seek: u64) -> bool {
        let mut whole = sampler(params.clone(), logits.len());
        whole.seek(seek);
        let mut part = whole.clone();
        let Some(count) = whole.candidates() else {
            let some = handed_over(logits, 7.min(logits.len()), off);
            assert_eq!(part.sample_candidates(&some), None);
            return false;
        };
        let want = whole.sample(logits, &[]);
        // More of them are as good.
        let count = match seek % 2 {
            0 => count,
            _ => count.next_power_of_two().min(logits.len()),
        };
        let got = part.sample_candidates(&handed_over(logits, count, off));
        if let Some(got) = &got {
            assert_eq!(*got, want, "{params:?}");
            assert_eq!(part.draws(), whole.draws());
        } else {
            assert_eq!(part.draws(), seek);
        }
        got.is_some()
    }

    /// A row as a model gives it: a few tokens far above a heap of others.
    fn usual(vocab: usize, seed: u64) -> Vec<f32> {
        let noise = |k| (1..=4).map(|j| uniform(seed * j, k)).sum::<f64>() - 2.0;
        let heap = (0..vocab as u64).map(|k| (noise(k) * 4.0) as f32);
        let rank = |id: usize| (id * 7919 + seed as usize * 31) % vocab;
        (heap.enumerate())
            .map(|(id, x)| x + 16.0 / (1.0 + rank(id) as f32))
            .collect()
    }

    /// Nearly always: a nucleus of more tokens than there are candidates is rare, one that a millionth decides
    /// rarer.
    #[test]
    fn candidates_suffice_for_usual_parameters() {
        let base = || hot(0.8);
        let cases: [(&str, SamplingParams, usize); 7] = [
            ("greedy", hot(0.0), 200),
            (
                "top-k",
                SamplingParams {
                    top_k: 40,
                    ..base()
                },
                200,
            ),
            (
                "most",
                SamplingParams {
                    top_k: MOST,
                    top_p: 0.999,
                    ..base()
                },
                200,
            ),
            (
                "top-p",
                SamplingParams {
                    top_p: 0.9,
                    ..base()
                },
                190,
            ),
            (
                "min-p",
                SamplingParams {
                    min_p: 0.05,
                    ..base()
                },
                190,
            ),
            (
                "all",
                SamplingParams {
                    top_k: 50,
                    top_p: 0.95,
                    min_p: 0.01,
                    ..base()
                },
                200,
            ),
            (
                "both",
                SamplingParams {
                    top_p: 0.9,
                    min_p: 0.02,
                    ..base()
                },
                190,
            ),
        ];
        for (what, params, least) in cases {
            let found = (1..=200)
                .filter(|seed| suffices(&params, &usual(4000, *seed), 1e-6, *seed))
                .count();
            assert!(found >= least, "{what}: {found} of 200");
        }
    }

    #[test]
    fn what_needs_every_logit_asks_for_no_candidates() {
        let asked = |change: &dyn Fn(&mut SamplingParams)| {
            let mut params = hot(1.0);
            change(&mut params);
            sampler(params, 1000).candidates()
        };
        assert_eq!(asked(&|p| p.temperature = 0.0), Some(1));
        assert_eq!(asked(&|p| p.top_k = 40), Some(40));
        assert_eq!(asked(&|p| p.top_p = 0.9), Some(MOST));
        assert_eq!(asked(&|p| p.min_p = 0.1), Some(MOST));
        assert_eq!(asked(&|p| (p.top_k, p.min_p) = (MOST + 1, 0.1)), Some(MOST));
        assert_eq!(asked(&|_| ()), None);
        assert_eq!(asked(&|p| p.top_k = MOST + 1), None);
        assert_eq!(asked(&|p| (p.top_k, p.top_p) = (MOST + 1, 0.9)), None);
        let greedy: [&dyn Fn(&mut SamplingParams); 5] = [
            &|p| p.repeat_penalty = 1.1,
            &|p| p.frequency_penalty = 0.1,
            &|p| p.presence_penalty = -0.1,
            &|p| p.logit_bias = vec![(3, 1.0)],
            &|p| p.logprobs = Some(0),
        ];
        for change in greedy {
            assert_eq!(asked(&|p| (p.temperature = 0.0, change(p)).0), None);
        }
        assert_eq!(sampler(hot(0.0), 1).candidates(), Some(1));
        let params = SamplingParams {
            top_k: 9,
            ..hot(1.0)
        };
        assert_eq!(sampler(params, 5).candidates(), Some(5));
    }

    /// Errors of all logits are theirs; of those that nothing is wrong with but that all are masked the
    /// candidates know.
    #[test]
    fn candidates_of_refused_logits_leave_the_error_to_them() {
        let masked = [f32::NEG_INFINITY; 4];
        for params in [
            hot(0.0),
            SamplingParams {
                top_k: 2,
                ..hot(1.0)
            },
        ] {
            assert!(suffices(&params, &masked, 0.0, 3));
            for value in [f32::NAN, f32::INFINITY] {
                let mut logits = [1.0, 2.0, 3.0, 0.5];
                logits[1] = value;
                assert!(!suffices(&params, &logits, 0.0, 3));
            }
        }
    }

    proptest! {
        #[test]
        fn the_choice_is_always_an_allowed_one(
            logits in proptest::collection::vec(-12.0f32..12.0, 1..700),
            temperature in 0.0f32..3.0,
            top_k in 0usize..800,
            top_p in 0.001f32..=1.0,
            min_p in 0.0f32..=1.0,
            seed: u64,
        ) {
            let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() };
            let allowed = allowed(&params, &logits);
            let mut sampler = sampler(params, logits.len());
            for _ in 0..8 {
                let id = sampler.sample(&logits, &[]).unwrap().id;
                prop_assert!(allowed.contains(&id), "{} not in {:?}", id, allowed);
            }
            // And nothing that is allowed was lost on the way.
            sampler.score(&logits, &[]);
            let best = argmax(&sampler.scratch.scores).unwrap();
            sampler.filter(best);
            let kept = sampler.scratch.candidates.len();
            prop_assert!(kept == allowed.len() || kept + 1 == allowed.len());
        }

        #[test]
        fn candidates_give_what_all_logits_give(
            row in prop_oneof![
                // Of a few levels, so that most are equal; some masked, some no numbers.
                proptest::collection::vec((-6i8..6).prop_map(f32::from), 1..900),
                proptest::collection::vec(
                    prop_oneof![8 => -9.0f32..9.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(-0.0f32)],
                    1..600,
                ),
                proptest::collection::vec(
                    prop_oneof![99 => -90.0f32..90.0, 1 => Just(f32::NAN), 1 => Just(f32::INFINITY)],
                    1..40,
                ),
                (1usize..1500, any::<u16>()).prop_map(|(vocab, seed)| usual(vocab, u64::from(seed))),
            ],
            temperature in prop_oneof![Just(0.0f32), 0.01f32..3.0],
            top_k in prop_oneof![Just(0usize), 1usize..300],
            top_p in prop_oneof![Just(1.0f32), 0.001f32..1.0, Just(1.0 - f32::EPSILON)],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..=1.0, Just(1e-7f32)],
            penalty in prop_oneof![9 => Just(1.0f32), 1 => 0.5f32..2.0],
            off in -1e-3f64..1e-3,
            seed: u64,
        ) {
            let params = SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                repeat_penalty: penalty,
                seed,
                ..SamplingParams::default()
            };
            let vocab = row.len();
            let sufficed: Vec<bool> = (0..4).map(|k| suffices(&params, &row, off, k)).collect();
            // These always do.
            let numbers = !row.iter().any(|x| x.is_nan() || *x == f32::INFINITY);
            let few = temperature == 0.0 || (1..=MOST).contains(&top_k) || (vocab <= MOST && top_p < 1.0);
            if numbers && penalty == 1.0 && few && (top_k <= MOST || temperature == 0.0) {
                prop_assert!(sufficed.iter().all(|known| *known), "{:?} of {}", params, vocab);
            }
        }

        #[test]
        fn likeliest_is_the_head_of_a_full_sort(
            logits in proptest::collection::vec(-3i8..3, 1..200),
            n in 0usize..250,
        ) {
            let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            order.truncate(n);
            prop_assert_eq!(likeliest(&logits, n), order);
        }
    }
}
