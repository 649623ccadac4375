//! The likeliest tokens of a row of logits: what sampling needs most of the time, and small beside all of it.

/// Candidates that can be asked for at most.
pub const MOST: usize = 256;

/// The likeliest tokens of one row of logits: enough to choose as from all of them, where one of these holds.
///
/// * Nothing but the greatest is asked for.
/// * Top-k with `k` up to the number of candidates: the first `k` are what it keeps, and whatever follows
///   looks at those only.
/// * Top-p, where [`Candidates::nucleus`] knows how many it keeps.
/// * Min-p, where the last candidate is too improbable.
///
/// Everything else takes the logits: a temperature with none of these, and bias, penalties and
/// log-probabilities, which change or need every token.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidates {
    /// The lowest token whose logit is NaN or +inf: nothing can be chosen then, and nothing else here means
    /// anything.
    pub refused: Option<u32>,
    /// Tokens and their logits, the greatest first, of equal ones the lowest id first; those at -inf
    /// are left out. -0 is given as 0.
    pub list: Vec<(u32, f32)>,
    /// Whether the list has all tokens but those at -inf.
    pub complete: bool,
    /// `sum over all tokens of exp(logit - greatest)`, within [`Candidates::mass_error`] of it; infinite
    /// where it was not summed, of no meaning where the list is empty.
    pub mass: f32,
    /// By how much of it the sum may be off.
    pub mass_error: f64,
}

impl Candidates {
    /// Those of some logits, `count` at most: the definition, by a sort of all.
    #[must_use]
    pub fn of(logits: &[f32], count: usize) -> Self {
        let refused = |x: &f32| x.is_nan() || *x == f32::INFINITY;
        let mut list: Vec<_> = (0u32..).zip(logits.iter().map(|x| x + 0.0)).collect();
        list.retain(|(_, x)| *x > f32::NEG_INFINITY);
        list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let greatest = list.first().map_or(0.0, |(_, x)| f64::from(*x));
        let weights = list.iter().map(|(_, x)| (f64::from(*x) - greatest).exp());
        let mass = weights.sum::<f64>() as f32;
        let complete = list.len() <= count;
        list.truncate(count);
        Self {
            refused: logits.iter().position(refused).map(|id| id as u32),
            list,
            complete,
            mass,
            // Rounded once; what the sum in f64 is off by is less than that again.
            mass_error: f64::from(f32::EPSILON),
        }
    }

    /// How many of the list top-p keeps: the shortest run whose probabilities sum to `top_p`. `None` where
    /// the list ends before, or a sum is so close that the error of [`Candidates::mass`] decides: then it
    /// takes all logits to tell.
    #[must_use]
    pub fn nucleus(&self, top_p: f32) -> Option<usize> {
        let greatest = f64::from(self.list.first()?.1);
        let target = f64::from(top_p) * f64::from(self.mass);
        let mut mass = 0.0;
        for (i, (_, logit)) in self.list.iter().enumerate() {
            mass += (f64::from(*logit) - greatest).exp();
            if mass >= target * (1.0 - self.mass_error) {
                return (mass >= target * (1.0 + self.mass_error)).then_some(i + 1);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOWEST: f32 = f32::NEG_INFINITY;

    #[test]
    fn the_greatest_first_of_equals_the_lowest_token_and_none_that_is_masked() {
        let logits = [1.0, -0.0, 3.0, LOWEST, 0.0, 3.0];
        let got = Candidates::of(&logits, 4);
        assert_eq!(got.list, [(2, 3.0), (5, 3.0), (0, 1.0), (1, 0.0)]);
        assert!(got.list[3].1.is_sign_positive() && !got.complete && got.refused.is_none());
        assert_eq!(got.mass, (2.0 + (-2f64).exp() + 2.0 * (-3f64).exp()) as f32);
        assert!(Candidates::of(&logits, 5).complete);
        let masked = Candidates::of(&[LOWEST; 2], 1);
        assert!(masked.list.is_empty() && masked.complete && masked.nucleus(0.5).is_none());
        let refused = |logits: &[f32]| Candidates::of(logits, 1).refused;
        assert_eq!(refused(&[0.0, f32::INFINITY, f32::NAN]), Some(1));
        assert_eq!(refused(&[-f32::NAN, 0.0]), Some(0));
    }

    #[test]
    fn a_nucleus_is_known_where_the_error_of_the_mass_decides_nothing() {
        let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
        let of = |count| Candidates::of(&logits, count);
        for (top_p, want) in [(0.3, 1), (0.6, 2), (0.8, 3), (0.9, 4)] {
            assert_eq!(of(4).nucleus(top_p), Some(want));
            assert_eq!(of(2).nucleus(top_p), (want <= 2).then_some(want));
        }
        // 0.75 is the sum of the first two, and whether it is reached a matter of rounding.
        assert_eq!(of(4).nucleus(0.75), None);
        let unsure = Candidates {
            mass_error: 0.1,
            ..of(4)
        };
        assert_eq!([0.3, 0.48].map(|p| unsure.nucleus(p)), [Some(1), None]);
        let not_summed = Candidates {
            mass: f32::INFINITY,
            ..of(4)
        };
        assert_eq!(not_summed.nucleus(1e-30), None);
    }
}
