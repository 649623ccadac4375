//! How well a model predicts a text, and how far another one is from it.
//!
//! The text is tokenized whole and cut into windows of `context` tokens that overlap by half. The
//! first window scores all of its tokens, later ones the second half of theirs, so that every token
//! is scored once and, after the beginning, with at least half a window before it. Each window
//! begins with the BOS token where the tokenizer adds one, so that the first token is scored too.
//!
//! ```text
//! nll            = mean of -ln p(token)                             nats a token
//! perplexity     = exp(nll)
//! bits per byte  = nll * tokens / ln 2 / bytes of the text          the same for every tokenizer
//! KL divergence  = sum over v of p(v) (ln p(v) - ln q(v))           p: the other model, q: this one
//! ```

use phidias_models::text::Bos;
use phidias_models::{Error, Model, Session};

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// Tokens scored.
    pub tokens: usize,
    /// Bytes of the text.
    pub bytes: usize,
    /// Nats a token.
    pub nll: f64,
    /// Against another model, when there is one.
    pub against: Option<Distance>,
}

/// How far a model is from another one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distance {
    /// Mean Kullback-Leibler divergence, nats a token.
    pub kl_mean: f64,
    /// The divergence that 99 % of the tokens stay below.
    pub kl_p99: f64,
    /// Share of tokens where both find the same one likeliest.
    pub top1_agreement: f64,
}

impl Figures {
    /// `exp(nll)`
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.nll.exp()
    }

    /// Bits of information a byte of text.
    #[must_use]
    pub fn bits_per_byte(&self) -> f64 {
        self.nll * self.tokens as f64 / std::f64::consts::LN_2 / self.bytes as f64
    }
}

/// A window of the text: its tokens (BOS apart), and how many at its start are context only.
struct Window {
    range: std::ops::Range<usize>,
    unscored: usize,
}

/// Windows of at most `size` tokens that advance by half.
fn windows(tokens: usize, size: usize) -> Vec<Window> {
    let step = (size / 2).max(1);
    let mut windows = vec![Window {
        range: 0..size.min(tokens),
        unscored: 0,
    }];
    while let Some(last) = windows.last().filter(|w| w.range.end < tokens) {
        let start = last.range.start + step;
        let end = (start + size).min(tokens);
        windows.push(Window {
            range: start..end,
            unscored: last.range.end - start,
        });
    }
    windows
}

/// A text as a model's tokens.
#[derive(Clone, Debug)]
pub struct Encoded {
    ids: Vec<u32>,
    /// Of the text.
    bytes: usize,
}

impl Encoded {
    /// Encodes a text.
    /// # Errors
    /// A model without a tokenizer; what the tokenizer reports.
    pub fn of(text: &str, model: &Model) -> Result<Self, Error> {
        Ok(Self {
            ids: model.text()?.tokenizer.encode(text, Bos::Omit)?,
            bytes: text.len(),
        })
    }
}

/// Measures the session's model on `text`, encoded for it, in windows of the session's context; `against` is a
/// session of another model (or format) with the same vocabulary. `progress` hears of tokens done
/// and in all.
/// # Errors
/// What the sessions report; [`Error::NoTokens`] for an empty text,
/// [`Error::NotFinite`] for damaged weights.
pub fn evaluate(
    session: &mut Session,
    mut against: Option<&mut Session>,
    text: &Encoded,
    mut progress: impl FnMut(usize, usize),
) -> Result<Figures, Error> {
    let model = session.model().clone();
    let Encoded { ids, bytes } = text;
    let tokenizer = &model.text()?.tokenizer;
    let bos = match tokenizer.default_bos() {
        Bos::Add => tokenizer.bos_id(),
        Bos::Omit => None,
    };
    let room = session
        .context()
        .min(against.as_ref().map_or(usize::MAX, |s| s.context()));
    let size = room.saturating_sub(usize::from(bos.is_some())).max(1);
    if ids.is_empty() {
        return Err(Error::NoTokens);
    }
    let vocab = model.config().vocab_size;
    let other_model = against.as_ref().map(|session| session.model().clone());
    let (mut tokens, mut nll) = (0usize, 0.0f64);
    let (mut divergences, mut agreements) = (Vec::new(), 0usize);
    for window in windows(ids.len(), size) {
        let mut input: Vec<u32> = bos.into_iter().collect();
        input.extend_from_slice(&ids[window.range.clone()]);
        // Row t of the logits predicts token t + 1 of the input.
        let first = window.unscored + usize::from(bos.is_some());
        let scored = |row: usize| row + 1 >= first.max(1) && row + 1 < input.len();
        let mut other: Vec<f32> = Vec::new();
        if let Some(against) = against.as_deref_mut() {
            against.truncate(0);
            against.extend_all(&input, |row, logits| {
                if scored(row) {
                    other.extend_from_slice(logits);
                }
            })?;
        }
        let mut others = other.chunks_exact(vocab);
        let not_finite = |model: &Model, row: usize| Error::NotFinite {
            path: model.path().to_owned(),
            position: window.range.start + row + 1 - usize::from(bos.is_some()),
        };
        let mut damage = None;
        session.truncate(0);
        session.extend_all(&input, |row, logits| {
            if !scored(row) {
                return;
            }
            let log_z = log_sum_exp(logits);
            if !log_z.is_finite() {
                damage.get_or_insert_with(|| not_finite(&model, row));
                return;
            }
            nll += log_z - f64::from(logits[input[row + 1] as usize]);
            tokens += 1;
            if let Some(p) = others.next() {
                match divergence(p, logits, log_z) {
                    Some(nats) => divergences.push(nats),
                    None => {
                        let other = other_model.as_deref().expect("it gave the row");
                        damage.get_or_insert_with(|| not_finite(other, row));
                    }
                }
                agreements += usize::from(argmax(p) == argmax(logits));
            }
        })?;
        if let Some(damage) = damage {
            return Err(damage);
        }
        progress(window.range.end, ids.len());
    }
    divergences.sort_by(f64::total_cmp);
    let distance = (!divergences.is_empty()).then(|| Distance {
        kl_mean: divergences.iter().sum::<f64>() / divergences.len() as f64,
        kl_p99: divergences[(divergences.len() - 1) * 99 / 100],
        top1_agreement: agreements as f64 / divergences.len() as f64,
    });
    Ok(Figures {
        tokens,
        bytes: *bytes,
        nll: nll / tokens.max(1) as f64,
        against: distance,
    })
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits
        .iter()
        .map(|v| (f64::from(*v) - max).exp())
        .sum::<f64>()
        .ln()
}

/// KL(p || q) of two rows of logits; `q_log_z` is the log of q's normaliser. `None` where p is not finite.
fn divergence(p: &[f32], q: &[f32], q_log_z: f64) -> Option<f64> {
    let p_log_z = log_sum_exp(p);
    if !p_log_z.is_finite() {
        return None;
    }
    let terms = p.iter().zip(q).map(|(p, q)| {
        let log_p = f64::from(*p) - p_log_z;
        log_p.exp() * (log_p - (f64::from(*q) - q_log_z))
    });
    // Rounding may leave a tiny negative sum where both are equal.
    Some(terms.sum::<f64>().max(0.0))
}

fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_score_every_token_once() {
        for (tokens, size) in [(1, 8), (8, 8), (9, 8), (100, 8), (101, 7), (5, 1), (6, 2)] {
            let mut next = 0;
            for w in windows(tokens, size) {
                assert_eq!(
                    w.range.start + w.unscored,
                    next,
                    "{tokens} in windows of {size}"
                );
                assert!(w.range.len() <= size && w.unscored < w.range.len());
                next = w.range.end;
            }
            assert_eq!(next, tokens);
        }
    }

    #[test]
    fn divergence_is_zero_for_equal_rows_and_known_otherwise() {
        let p = [0.0, 3f32.ln()]; // 1/4, 3/4
        assert_eq!(divergence(&p, &p, log_sum_exp(&p)), Some(0.0));
        assert_eq!(divergence(&[f32::NAN, 0.0], &p, log_sum_exp(&p)), None);
        let q = [0.0, 0.0]; // 1/2, 1/2
        let want = 0.25 * (0.25f64 / 0.5).ln() + 0.75 * (0.75f64 / 0.5).ln();
        assert!((divergence(&p, &q, log_sum_exp(&q)).unwrap() - want).abs() < 1e-7);
        // Ids that are no tokens have the lowest float and no part in it.
        let [p, q] = [p, q].map(|row| [row[0], f32::MIN, row[1]]);
        assert!((divergence(&p, &q, log_sum_exp(&q)).unwrap() - want).abs() < 1e-7);
    }
}
