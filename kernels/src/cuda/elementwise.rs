//! What is done to each value, or each row, alone.

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Source, Span};
use super::rows::rows_of;

/// The kernels of `elementwise.cu`.
pub(super) const KERNELS: &[&str] = &["finish_logits"];

fn kernel(name: &'static str) -> Kernel {
    Kernel {
        source: Source::Elementwise,
        name,
    }
}

/// Divides logits by `divisor`, and makes those of `unused` ids the lowest float.
///
/// `logits` is `[rows, vocab]`; `unused` holds the first id and the end of each range of them.
/// # Errors
/// When the launch fails.
/// # Panics
/// When the logits are not whole rows, or `unused` is not pairs.
pub fn finish_logits(
    device: &dyn Device,
    logits: Span<'_, f32>,
    vocab: usize,
    divisor: f32,
    unused: Span<'_, u32>,
) -> Result<(), DeviceError> {
    let (rows, vocab) = rows_of(logits, vocab, "logits");
    assert!(unused.len().is_multiple_of(2), "{} ends", unused.len());
    if rows == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [rows, vocab.div_ceil(256), 1],
        block: [256, 1, 1],
        shared: 0,
    };
    let args = [
        logits.on(device),
        unused.on(device),
        Arg::U32(rows),
        Arg::U32(vocab),
        Arg::F32(divisor),
        Arg::U32((unused.len() / 2) as u32),
    ];
    // SAFETY: a thread changes one logit, inside `rows * vocab` of them, and reads all pairs of `unused`.
    unsafe { device.launch(kernel("finish_logits"), launch, &args) }
}

#[cfg(test)]
mod tests {
    use super::super::Memory;
    use super::super::check::{Random, each_device};
    use super::*;

    #[test]
    fn logits_are_divided_and_unused_ids_lowest() {
        each_device(|device| {
            let mut random = Random(1);
            let (rows, vocab) = (3, 300);
            let before = random.values(rows * vocab, 10.0);
            let logits = Memory::from_slice(device, &before)?;
            let unused = Memory::from_slice(device, &[0u32, 1, 250, 260])?;
            finish_logits(&**device, logits.span(), vocab, 8.0, unused.span())?;
            for (i, (got, before)) in
                (logits.span::<f32>().to_vec()?.iter().zip(&before)).enumerate()
            {
                let id = i % vocab;
                let want = match id {
                    0 | 250..260 => f32::MIN,
                    _ => before / 8.0,
                };
                assert_eq!(*got, want, "{id}");
            }
            Ok(())
        });
    }
}
