//! Choosing tokens.
//!
//! The maths and the work are at the head of `sample.cu`.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Source, Span};
pub use crate::candidates::{Candidates, MOST};

/// The kernels of `sample.cu`.
pub(super) const KERNELS: &[&str] = &["argmax", "candidates"];

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

/// The `count` greatest logits of each row and their tokens, written to `into`, whose rows are of
/// [`candidate_values`]`(count)`: for [`read_candidates`]. The greatest alone takes no sorting, and its
/// row's sum is not taken: it is infinite.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the shapes do not fit, or `count` is not in `1..=`[`MOST`] or more than there are.
pub fn candidates(
    device: &dyn Device,
    logits: Span<'_, f32>,
    vocab: usize,
    count: usize,
    into: Span<'_, u32>,
) -> Result<(), DeviceError> {
    let rows = rows(logits, vocab);
    assert!(
        (1..=MOST.min(vocab)).contains(&count),
        "{count} candidates of {vocab}, {MOST} at most"
    );
    assert_eq!(
        into.len(),
        rows * candidate_values(count),
        "candidates of {rows} rows"
    );
    let [logits, into] = [logits.on(device), into.on(device)];
    let [vocab, number] = [vocab, count].map(|n| Arg::U32(n as u32));
    match count {
        1 => launch(device, "argmax", rows, &[logits, vocab, into]),
        _ => launch(device, "candidates", rows, &[logits, vocab, number, into]),
    }
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
        let list: Vec<_> = (ids.iter().copied().zip(logits))
            .filter(|(_, logit)| *logit > f32::NEG_INFINITY)
            .collect();
        Candidates {
            refused: Some(row[0]).filter(|id| *id != NONE),
            complete: list.len() < count || count == vocab,
            list,
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
    fn what_is_no_number_is_refused_by_its_lowest_token() {
        each_device(|device| {
            let mut logits = vec![1.0; 2 * 1500];
            logits[1400] = f32::NAN;
            logits[1300] = f32::INFINITY;
            logits[1500 + 7] = -f32::NAN;
            logits[1500 + 1031] = f32::NAN;
            for count in [1, 9] {
                let got = list(device, &logits, 1500, count)?;
                let refused: Vec<_> = got.iter().map(|row| row.refused).collect();
                assert_eq!(refused, [Some(1300), Some(7)], "{count}");
            }
            Ok(())
        });
    }

    #[test]
    fn candidates_are_those_of_the_definition_and_the_mass_within_its_bound() {
        let bits = |list: &[(u32, f32)]| -> Vec<(u32, u32)> {
            list.iter().map(|(id, x)| (*id, x.to_bits())).collect()
        };
        each_device(|device| {
            let cases = [
                (1, vec![1]),
                (31, vec![1, 31]),
                (300, vec![1, 2, 256]),
                (1024, vec![1]),
                (5000, vec![1, 40, 256]),
            ];
            for (vocab, counts) in cases {
                let mut rows = rows_of(vocab);
                rows.push(vec![LOWEST; vocab]);
                for count in counts {
                    let got = list(device, &rows.concat(), vocab, count)?;
                    for (i, (got, row)) in got.iter().zip(&rows).enumerate() {
                        let what = format!("row {i} of {vocab}, {count}");
                        let want = Candidates::of(row, count);
                        assert_eq!(bits(&got.list), bits(&want.list), "{what}");
                        assert_eq!(got.refused, None, "{what}");
                        // Where as many as were asked for are there it need not know that there are no more.
                        let short = want.list.len() < count || count == vocab;
                        assert_eq!(got.complete, short, "{what}");
                        assert!(want.complete || !got.complete, "{what}");
                        if count == 1 {
                            assert_eq!(got.mass, f32::INFINITY, "{what}");
                        } else if !want.list.is_empty() {
                            let off = (f64::from(got.mass) / f64::from(want.mass) - 1.0).abs();
                            let bound = got.mass_error + want.mass_error;
                            assert!(off <= bound, "{what}: off by {off:e}");
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
                let all = Candidates::of(row, vocab).list;
                let weights =
                    (all.iter()).map(|(_, x)| (f64::from(*x) - f64::from(all[0].1)).exp());
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
