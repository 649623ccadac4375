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

/// The likeliest tokens of one row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidates {
    /// The lowest token whose logit is NaN or +inf: nothing can be chosen then.
    pub refused: Option<u32>,
    /// Tokens and their logits, the greatest first, of equal ones the lowest id first; those at -inf
    /// are left out. -0 is given as 0.
    pub list: Vec<(u32, f32)>,
    /// `sum over all tokens of exp(logit - greatest)`, within [`Candidates::mass_error`] of it.
    pub mass: f32,
    /// By how much of it the sum may be off.
    pub mass_error: f64,
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
