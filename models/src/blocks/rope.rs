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
    short: Frequencies,
    /// And the length beyond which they hold.
    long: Option<(Frequencies, usize)>,
    position_scale: f32,
}

/// The frequencies of one regime.
#[derive(Clone, Debug)]
struct Frequencies {
    /// `[head_dim / 2]`
    each: Vec<f32>,
    /// On cosine and sine.
    multiplier: f32,
}

impl Rope {
    /// The frequencies of a configuration.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let frequencies = |factor: Option<&[f32]>, multiplier| {
            let each = (0..config.head_dim / 2)
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
                .collect();
            Frequencies { each, multiplier }
        };
        let position_scale = config.rope.position_scale;
        match &config.rope.long {
            None => Self {
                short: frequencies(None, 1.0),
                long: None,
                position_scale,
            },
            Some(long) => Self {
                short: frequencies(Some(&long.short_factor), long.short_multiplier),
                long: Some((
                    frequencies(Some(&long.long_factor), long.long_multiplier),
                    long.original_max_position_embeddings,
                )),
                position_scale,
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

    fn frequencies(&self, regime: Regime) -> &Frequencies {
        match (regime, &self.long) {
            (Regime::Long, Some((long, _))) => long,
            _ => &self.short,
        }
    }

    /// Cosine and sine of positions `first .. first + n`.
    pub fn rotations(&self, regime: Regime, first: usize, n: usize, out: &mut Rotations) {
        let Frequencies { each, multiplier } = self.frequencies(regime);
        out.cos.reshape(n, each.len());
        out.sin.reshape(n, each.len());
        for t in 0..n {
            let position = (first + t) as f32 * self.position_scale;
            for (i, frequency) in each.iter().enumerate() {
                // The angle in f32, as the reference has it; its cosine and sine to full precision.
                let (sin, cos) = f64::from(position * frequency).sin_cos();
                out.cos.row_mut(t)[i] = cos as f32 * multiplier;
                out.sin.row_mut(t)[i] = sin as f32 * multiplier;
            }
        }
    }

    /// Turns a key that was rotated in one regime into the other, in place; `head` is `[head_dim]`.
    ///
    /// This corrects the rotation exactly and nothing else: keys and values of deeper layers were
    /// computed from attention in the old regime and stay so.
    pub fn change(&self, from: Regime, to: Regime, position: usize, head: &mut [f32]) {
        let (from, to) = (self.frequencies(from), self.frequencies(to));
        let (a, b) = head.split_at_mut(from.each.len());
        let rescale = to.multiplier / from.multiplier;
        let frequencies = from.each.iter().zip(&to.each);
        for ((x, y), (from, to)) in a.iter_mut().zip(b).zip(frequencies) {
            let position = position as f32 * self.position_scale;
            let (sin, cos) = (f64::from(position * to) - f64::from(position * from)).sin_cos();
            let (sin, cos) = (sin as f32 * rescale, cos as f32 * rescale);
            (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
        }
    }
}
