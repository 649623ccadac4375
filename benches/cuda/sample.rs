//! The likeliest tokens of a row of logits: the greatest alone, those of top-k, as many as there may be.

use crate::timing::{Bench, Case, Cost, Random, Work};
use phidias::engine::kernels::cuda::sample::{candidate_values, candidates, read_candidates};
use phidias::engine::kernels::cuda::{Device, DeviceError, Memory};
use std::sync::Arc;

/// Candidates asked for.
const COUNTS: [usize; 3] = [1, 40, 256];
/// Rows of logits: a token's, and those of a few guesses.
const ROWS: [usize; 2] = [1, 4];

pub fn bench(bench: &mut Bench) {
    let (vocab, device) = (bench.shapes.vocab, Arc::clone(&bench.device));
    for count in COUNTS {
        let cases = ROWS.map(|rows| Case {
            count: rows,
            cost: Cost::Bytes(rows * (vocab + candidate_values(count)) * size_of::<u32>()),
        });
        bench.run(&format!("candidates, {count} of {vocab}"), &cases, |case| {
            Choice::new(&device, vocab, count, case.count)
        });
    }
}

/// Rows of logits, and what is chosen of them.
struct Choice {
    vocab: usize,
    count: usize,
    logits: Vec<f32>,
    on_device: Memory,
    into: Memory,
}

impl Choice {
    fn new(
        device: &Arc<dyn Device>,
        vocab: usize,
        count: usize,
        rows: usize,
    ) -> Result<Self, DeviceError> {
        // Some are equal: the lower token is before the other. None is -0, which is given as 0.
        let mut logits = Random(9).values(rows * vocab);
        logits
            .iter_mut()
            .for_each(|v| *v = (*v * 8192.0).round() + 0.0);
        Ok(Self {
            vocab,
            count,
            on_device: Memory::from_slice(device, &logits)?,
            logits,
            into: Memory::zeroed(device, rows * candidate_values(count) * size_of::<u32>())?,
        })
    }
}

impl Work for Choice {
    fn launch(&self, device: &dyn Device, _turn: usize) -> Result<(), DeviceError> {
        let (logits, into) = (self.on_device.span(), self.into.span());
        candidates(device, logits, self.vocab, self.count, into)
    }

    /// Exactly: the order of the sampler.
    fn check(&self) -> Result<(), DeviceError> {
        let got = read_candidates(self.into.span(), self.vocab, self.count)?;
        for (got, row) in got.iter().zip(self.logits.chunks_exact(self.vocab)) {
            let mut want: Vec<(u32, f32)> = (0u32..).zip(row.iter().copied()).collect();
            want.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            want.truncate(self.count);
            assert_eq!(got.list, want, "{} of {}", self.count, self.vocab);
        }
        Ok(())
    }
}
