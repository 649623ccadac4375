//! Choosing tokens.
//!
//! The maths and the work are at the head of `sample.cu`.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Source, Span};

/// The kernels of `sample.cu`.
pub(super) const KERNELS: &[&str] = &["argmax", "candidates"];

/// Candidates that can be asked for at most.
pub const CANDIDATES: usize = 256;
/// Threads of a block: one block a row.
const THREADS: usize = 1024;
/// Values in front of the candidates of a row.
const HEADER: usize = 4;
/// No token, no index.
const NONE: u32 = u32::MAX;

/// Values that the candidates of one row take.
#[must_use]
pub fn candidate_values(count: usize) -> usize {
    HEADER + 2 * count
}

/// The likeliest tokens of one row of logits: enough for the sampler to end as it would with all logits,
/// where one of these holds.
///
/// * Top-k with `k` up to the number of candidates: the first `k` are what it keeps, and whatever follows
///   looks at those only.
/// * Top-p, where [`Candidates::nucleus`] knows how many it keeps.
/// * Min-p, where the last candidate is too improbable.
///
/// Everything else takes the logits: a temperature with none of these, and bias, penalties and
/// log-probabilities, which change or need every token.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidates {
    /// The lowest token whose logit is NaN or +inf: nothing can be chosen then.
    pub refused: Option<u32>,
    /// Tokens and their logits, the greatest first, of equal ones the lowest id first; those at -inf
    /// are left out. -0 is given as 0.
    pub list: Vec<(u32, f32)>,
    /// `sum over all tokens of exp(logit - greatest)`, within [`Candidates::mass_error`] of it; of no
    /// meaning where the list is empty or the row refused.
    pub mass: f32,
    /// By how much of it the sum may be off.
    pub mass_error: f64,
}

impl Candidates {
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

/// The token with the greatest logit of each row, of equal ones the lowest; -0 and 0 are equal.
///
/// `logits` is `[rows, vocab]`; `chosen` and `refused` are `[rows]`. Where all logits are -inf, `chosen`
/// is `u32::MAX`. `refused` is the lowest token whose logit is NaN or +inf, `u32::MAX` if there is none:
/// such rows choose nothing that means anything.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the shapes do not fit.
pub fn argmax(
    device: &dyn Device,
    logits: Span<'_, f32>,
    vocab: usize,
    chosen: Span<'_, u32>,
    refused: Span<'_, u32>,
) -> Result<(), DeviceError> {
    let rows = rows(logits, vocab);
    assert_eq!(chosen.len(), rows, "tokens of {rows} rows");
    assert_eq!(refused.len(), rows, "refusals of {rows} rows");
    let args = [
        logits.on(device),
        Arg::U32(vocab as u32),
        chosen.on(device),
        refused.on(device),
    ];
    launch(device, "argmax", rows, &args)
}

/// The `count` greatest logits of each row and their tokens, written to `into`, whose rows are of
/// [`candidate_values`]`(count)`: for [`read_candidates`].
/// # Errors
/// When the launch fails.
/// # Panics
/// When the shapes do not fit, or `count` is not in `1..=`[`CANDIDATES`] or more than there are.
pub fn candidates(
    device: &dyn Device,
    logits: Span<'_, f32>,
    vocab: usize,
    count: usize,
    into: Span<'_, u32>,
) -> Result<(), DeviceError> {
    let rows = rows(logits, vocab);
    assert!(
        (1..=CANDIDATES.min(vocab)).contains(&count),
        "{count} candidates of {vocab}, {CANDIDATES} at most"
    );
    assert_eq!(
        into.len(),
        rows * candidate_values(count),
        "candidates of {rows} rows"
    );
    let args = [
        logits.on(device),
        Arg::U32(vocab as u32),
        Arg::U32(count as u32),
        into.on(device),
    ];
    launch(device, "candidates", rows, &args)
}

/// What [`candidates`] wrote for logits of `vocab` tokens, row by row: one copy from the device.
/// # Errors
/// When the device is lost.
/// # Panics
/// When it is not whole rows of `count` candidates.
pub fn read_candidates(
    from: Span<'_, u32>,
    vocab: usize,
    count: usize,
) -> Result<Vec<Candidates>, DeviceError> {
    let width = candidate_values(count);
    assert!(
        from.len().is_multiple_of(width),
        "{} values in rows of {width}",
        from.len()
    );
    let values = from.to_vec()?;
    let rows = values.chunks_exact(width).map(|row| {
        let (ids, logits) = row[HEADER..].split_at(count);
        let logits = logits.iter().map(|bits| f32::from_bits(*bits));
        Candidates {
            refused: Some(row[0]).filter(|id| *id != NONE),
            list: (ids.iter().copied().zip(logits))
                .filter(|(_, logit)| *logit > f32::NEG_INFINITY)
                .collect(),
            mass: f32::from_bits(row[1]),
            mass_error: mass_error(vocab),
        }
    });
    Ok(rows.collect())
}

/// A bound on the relative error of the sum of exponentials, with `u = 2^-24`: `4 u` for `expf` (two
/// units in the last place); `u ln(vocab)` for the rounded differences, since `|x| u` averaged with weights
/// `exp(x)` is at most that (the average of `-x` is their entropy less the logarithm of their sum, and the
/// greatest is 1); one `u` for each addition on the way of a term, `vocab / 1024` in a thread and 10
/// between them. Twice that, for the squares of all this and for what lies so low that the CPU leaves it out.
fn mass_error(vocab: usize) -> f64 {
    let vocab = vocab as f64;
    (4.0 + vocab.ln() + (vocab / THREADS as f64).ceil() + 10.0) / f64::from(1 << 23)
}

fn launch(
    device: &dyn Device,
    name: &'static str,
    rows: usize,
    args: &[Arg],
) -> Result<(), DeviceError> {
    if rows == 0 {
        return Ok(());
    }
    let kernel = Kernel {
        source: Source::Sample,
        name,
    };
    let launch = Launch {
        grid: [rows as u32, 1, 1],
        block: [THREADS as u32, 1, 1],
        shared: 0,
    };
    // SAFETY: a thread block reads one of `rows` rows of `vocab` logits and writes that row's results,
    // whose lengths the callers have checked.
    unsafe { device.launch(kernel, launch, args) }
}

fn rows(logits: Span<'_, f32>, vocab: usize) -> usize {
    assert!(
        (1..1 << 31).contains(&vocab) && logits.len().is_multiple_of(vocab),
        "{} logits of {vocab} tokens",
        logits.len()
    );
    let rows = logits.len() / vocab;
    assert!(rows < 1 << 31, "{rows} rows");
    rows
}

#[cfg(test)]
mod tests {
    use super::super::Memory;
    use super::super::check::{Random, each_device};
    use super::*;
    use std::sync::Arc;

    const LOWEST: f32 = f32::NEG_INFINITY;

    fn choose(
        device: &Arc<dyn Device>,
        logits: &[f32],
        vocab: usize,
    ) -> Result<[Vec<u32>; 2], DeviceError> {
        let rows = logits.len() / vocab;
        let logits = Memory::from_slice(device, logits)?;
        let out = [
            Memory::zeroed(device, rows * 4)?,
            Memory::zeroed(device, rows * 4)?,
        ];
        let [chosen, refused] = [out[0].span::<u32>(), out[1].span()];
        argmax(&**device, logits.span(), vocab, chosen, refused)?;
        Ok([chosen.to_vec()?, refused.to_vec()?])
    }

    fn list(
        device: &Arc<dyn Device>,
        logits: &[f32],
        vocab: usize,
        count: usize,
    ) -> Result<Vec<Candidates>, DeviceError> {
        let rows = logits.len() / vocab;
        let logits = Memory::from_slice(device, logits)?;
        let into = Memory::zeroed(device, rows * candidate_values(count) * 4)?;
        candidates(&**device, logits.span(), vocab, count, into.span())?;
        read_candidates(into.span(), vocab, count)
    }

    /// Logits in the order of the sampler: the greatest first, then the lowest token.
    fn ranked(logits: &[f32]) -> Vec<(u32, f32)> {
        let mut all: Vec<_> = (0u32..).zip(logits.iter().map(|x| x + 0.0)).collect();
        all.retain(|(_, x)| *x > LOWEST);
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all
    }

    /// Rows of several kinds, `vocab` logits each.
    fn rows_of(vocab: usize) -> Vec<Vec<f32>> {
        let mut random = Random(vocab as u64);
        let plain = random.values(vocab, 20.0);
        let ties = plain.iter().map(|x| (x / 8.0).round()).collect();
        let masked = plain.iter().map(|x| if *x < 15.0 { LOWEST } else { *x });
        // The greatest all in a few threads' shares: the first bound lets too many through.
        let heaped = (0..vocab).map(|i| -((i % THREADS) as f32)).collect();
        let zeros = (0..vocab)
            .map(|i| if i % 3 == 0 { -0.0 } else { 0.0 })
            .collect();
        vec![
            ties,
            masked.collect(),
            heaped,
            zeros,
            vec![-3.0; vocab],
            plain,
        ]
    }

    #[test]
    fn the_greatest_logit_and_of_equals_the_lowest_token() {
        each_device(|device| {
            for vocab in [1, 31, 1024, 3001] {
                let rows = rows_of(vocab);
                let [chosen, refused] = choose(device, &rows.concat(), vocab)?;
                let want: Vec<_> = rows
                    .iter()
                    .map(|row| ranked(row).first().map_or(NONE, |(id, _)| *id))
                    .collect();
                assert_eq!(chosen, want, "{vocab}");
                assert_eq!(refused, vec![NONE; rows.len()]);
            }
            let masked = choose(device, &[LOWEST; 5], 5)?;
            assert_eq!(masked, [[NONE], [NONE]]);
            Ok(())
        });
    }

    #[test]
    fn what_is_no_number_is_refused_by_its_lowest_token() {
        each_device(|device| {
            let mut logits = vec![1.0; 2 * 1500];
            logits[1400] = f32::NAN;
            logits[1300] = f32::INFINITY;
            logits[1500 + 7] = -f32::NAN;
            logits[1500 + 1031] = f32::NAN;
            let [_, refused] = choose(device, &logits, 1500)?;
            assert_eq!(refused, [1300, 7]);
            for (row, want) in list(device, &logits, 1500, 9)?.iter().zip(refused) {
                assert_eq!(row.refused, Some(want));
            }
            Ok(())
        });
    }

    #[test]
    fn candidates_are_in_the_order_of_the_sampler_and_the_mass_within_its_bound() {
        each_device(|device| {
            for (vocab, counts) in [(1, vec![1]), (300, vec![1, 256]), (5000, vec![40, 256])] {
                let rows = rows_of(vocab);
                for count in counts {
                    let got = list(device, &rows.concat(), vocab, count)?;
                    for (i, (got, row)) in got.iter().zip(&rows).enumerate() {
                        let mut want = ranked(row);
                        let greatest = want.first().map_or(0.0, |(_, x)| f64::from(*x));
                        let mass: f64 = want
                            .iter()
                            .map(|(_, x)| (f64::from(*x) - greatest).exp())
                            .sum();
                        want.truncate(count);
                        let bits = |list: &[(u32, f32)]| -> Vec<(u32, u32)> {
                            list.iter().map(|(id, x)| (*id, x.to_bits())).collect()
                        };
                        assert_eq!(bits(&got.list), bits(&want), "row {i} of {vocab}, {count}");
                        assert_eq!(got.refused, None);
                        if !want.is_empty() {
                            let off = (f64::from(got.mass) / mass - 1.0).abs();
                            assert!(off <= got.mass_error, "row {i} of {vocab}: off by {off:e}");
                        }
                    }
                }
            }
            Ok(())
        });
    }

    #[test]
    fn the_nucleus_is_that_of_all_logits_or_unknown() {
        each_device(|device| {
            let (vocab, mut known, mut unknown) = (2000, 0, 0);
            let rows = rows_of(vocab);
            for (row, got) in rows.iter().zip(list(device, &rows.concat(), vocab, 256)?) {
                let all = ranked(row);
                let weights = all
                    .iter()
                    .map(|(_, x)| (f64::from(*x) - f64::from(all[0].1)).exp());
                let weights: Vec<f64> = weights.collect();
                let total: f64 = weights.iter().sum();
                for top_p in [0.05, 0.5, 0.95, 1.0 - 1e-7] {
                    let target = f64::from(top_p) * total;
                    let mut mass = 0.0;
                    let reached = weights.iter().position(|w| {
                        mass += w;
                        mass >= target
                    });
                    match got.nucleus(top_p) {
                        Some(n) => {
                            assert_eq!(Some(n - 1), reached, "{top_p}");
                            known += 1;
                        }
                        None => unknown += 1,
                    }
                }
            }
            assert!(known >= 8 && unknown >= 4, "{known} known, {unknown} not");
            Ok(())
        });
    }

    /// One likely token more or less is far outside the bound of the sum.
    #[test]
    fn the_bound_of_the_mass_is_small() {
        for vocab in [32_064, 100_352] {
            let error = mass_error(vocab);
            assert!((1e-6..2e-5).contains(&error), "{vocab}: {error:e}");
        }
    }
}
