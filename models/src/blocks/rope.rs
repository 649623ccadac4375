//! Rotary embedding: which frequencies a sequence is rotated with.
//!
//! LongRoPE has two lists of factors and the *length of the sequence* chooses: at most
//! `original_max_position_embeddings` positions use the short list, more use the long one, for all
//! positions from 0 on. The allocated context has no say.

use crate::config::Config;
use phidias_engine::backend::Rotations;

/// Which list of factors is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regime {
    /// The sequence fits the original length, or the model has one list only.
    Short,
    /// The sequence is longer.
    Long,
}

/// The frequencies of a model.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `[head_dim / 2]`
    short: Vec<f32>,
    /// `[head_dim / 2]` and the length beyond which they hold.
    long: Option<(Vec<f32>, usize)>,
    /// On cosine and sine.
    factor: f32,
}

impl Rope {
    /// The frequencies of a configuration.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let frequencies = |factor: Option<&[f32]>| -> Vec<f32> {
            (0..config.head_dim / 2)
                .map(|i| {
                    // 1 / (factor * theta^(2 i / head_dim)), each step rounded to f32 as the
                    // reference does: at position 4096 a difference of one unit in the last place
                    // would already move the angle.
                    let wavelength = config
                        .rope
                        .theta
                        .powf((2 * i) as f64 / config.head_dim as f64)
                        as f32;
                    1.0 / (factor.map_or(1.0, |f| f[i]) * wavelength)
                })
                .collect()
        };
        match &config.rope.long {
            None => Self {
                short: frequencies(None),
                long: None,
                factor: 1.0,
            },
            Some(long) => Self {
                short: frequencies(Some(&long.short_factor)),
                long: Some((
                    frequencies(Some(&long.long_factor)),
                    long.original_max_position_embeddings,
                )),
                factor: long.attention_factor,
            },
        }
    }

    /// The regime of a sequence of `len` tokens.
    #[must_use]
    pub fn regime(&self, len: usize) -> Regime {
        match &self.long {
            Some((_, original)) if len > *original => Regime::Long,
            _ => Regime::Short,
        }
    }

    /// The longest sequence in the regime of one of `len` tokens.
    #[must_use]
    pub fn regime_end(&self, len: usize) -> usize {
        match &self.long {
            Some((_, original)) if len <= *original => *original,
            _ => usize::MAX,
        }
    }

    fn frequencies(&self, regime: Regime) -> &[f32] {
        match (regime, &self.long) {
            (Regime::Long, Some((long, _))) => long,
            _ => &self.short,
        }
    }

    /// Cosine and sine of positions `first .. first + n`.
    pub fn rotations(&self, regime: Regime, first: usize, n: usize, out: &mut Rotations) {
        let frequencies = self.frequencies(regime);
        out.cos.reshape(n, frequencies.len());
        out.sin.reshape(n, frequencies.len());
        for t in 0..n {
            let position = (first + t) as f32;
            for (i, frequency) in frequencies.iter().enumerate() {
                // The angle in f32, as the reference has it; its cosine and sine to full precision.
                let (sin, cos) = f64::from(position * frequency).sin_cos();
                out.cos.row_mut(t)[i] = cos as f32 * self.factor;
                out.sin.row_mut(t)[i] = sin as f32 * self.factor;
            }
        }
    }

    /// Turns a key that was rotated in one regime into the other, in place; `head` is `[head_dim]`.
    ///
    /// This corrects the rotation exactly and nothing else: keys and values of deeper layers were
    /// computed from attention in the old regime and stay so.
    pub fn change(&self, from: Regime, to: Regime, position: usize, head: &mut [f32]) {
        let (a, b) = head.split_at_mut(self.short.len());
        let frequencies = self.frequencies(from).iter().zip(self.frequencies(to));
        for ((x, y), (from, to)) in a.iter_mut().zip(b).zip(frequencies) {
            let position = position as f32;
            let (sin, cos) = (f64::from(position * to) - f64::from(position * from)).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
        }
    }
}
