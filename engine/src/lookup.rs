//! Prompt lookup: the sequence itself proposes what comes next.
//!
//! Text repeats itself: a name, a refrain, a line of the program that is being changed. Where the last
//! tokens have stood before, what followed them there is a good guess at what follows now, and a guess
//! is cheap to check: a forward pass reads all weights once, for one token or for eight. The
//! generation loop feeds the guesses behind the last token, looks at the logits after each, and goes
//! on as long as the sampler picks what was guessed. (A. Saxena, *Prompt Lookup Decoding*, 2023; N.
//! Yang et al., *Inference with Reference*, arXiv:2304.04487.)

use std::collections::HashMap;
use std::convert::Infallible;

/// The most tokens that can be proposed for one pass. More never pays: by then a pass is bound by
/// arithmetic, and guesses that far ahead are rarely right.
pub const MAX_LOOKUP: usize = 31;

/// The lengths of the runs of tokens that are looked for, in this order. One token is no evidence;
/// more than four hardly ever name another place.
const LENGTHS: [usize; 3] = [4, 3, 2];

/// Where every run of 2, 3 and 4 tokens stood last, kept up to date as the sequence grows: a token
/// costs the same at the end of a long context as at its beginning.
#[derive(Clone, Debug, Default)]
pub struct NgramIndex {
    /// For each length: run, filled up with zeros -> the position after its latest occurrence that
    /// is followed by a token.
    after: [HashMap<[u32; LENGTHS[0]], usize>; LENGTHS.len()],
    /// The tokens that were indexed.
    len: usize,
}

fn key(run: &[u32]) -> [u32; LENGTHS[0]] {
    let mut key = [0; LENGTHS[0]];
    key[..run.len()].copy_from_slice(run);
    key
}

impl NgramIndex {
    /// Takes in what was appended to `ids` since the last call; what was there before is the same.
    pub fn update(&mut self, ids: &[u32]) {
        debug_assert!(self.len <= ids.len());
        for at in self.len..ids.len() {
            for (n, after) in LENGTHS.into_iter().zip(&mut self.after) {
                if let Some(start) = at.checked_sub(n) {
                    after.insert(key(&ids[start..at]), at);
                }
            }
        }
        self.len = ids.len();
    }

    /// Appends to `out` the `max` tokens that would follow `ids`, which must be what was indexed, if
    /// they went on as after the latest earlier occurrence of their longest end that has one (4 tokens,
    /// else 3, else 2). A source that reaches the end of `ids` goes on with the proposal itself, so a
    /// loop shorter than `max` is followed round. Nothing is appended if nothing matches.
    pub fn propose(&self, ids: &[u32], max: usize, out: &mut Vec<u32>) {
        debug_assert_eq!(self.len, ids.len());
        let source = LENGTHS
            .into_iter()
            .zip(&self.after)
            .find_map(|(n, after)| after.get(&key(&ids[ids.len().checked_sub(n)?..])));
        if let Some(&source) = source {
            let start = out.len();
            for at in source..source + max {
                let beyond = at.checked_sub(ids.len());
                out.push(beyond.map_or_else(|| ids[at], |i| out[start + i]));
            }
        }
    }
}

/// What lookup did for an answer. Its tokens after the first, which the prompt's own pass gives, are
/// `passes + accepted`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupStats {
    /// Forward passes after the prompt's.
    pub passes: usize,
    /// Tokens computed in them on a guess.
    pub proposed: usize,
    /// Those of them that the sampler picked.
    pub accepted: usize,
}

impl LookupStats {
    /// Tokens that a pass gave on average, 1 without lookup; `None` if there was no pass.
    #[must_use]
    pub fn tokens_per_pass(&self) -> Option<f64> {
        (self.passes > 0).then(|| (self.passes + self.accepted) as f64 / self.passes as f64)
    }

    /// What an answer of exactly `ids[start..]` after `ids[..start]` reports: how much a text gives,
    /// whatever model says it. `lookup` is as in
    /// [`GenerateOptions`](crate::generate::GenerateOptions::lookup).
    #[must_use]
    pub fn of_text(ids: &[u32], start: usize, lookup: usize) -> Self {
        let Ok(stats) = Self::of_passes(ids, start, lookup, |_, _| Ok::<(), Infallible>(()));
        stats
    }

    /// [`LookupStats::of_text`] that shows every pass: `pass(at, tokens)` is to compute `tokens`, one
    /// that is certain and the guesses behind it, after `ids[..at]`.
    ///
    /// # Errors
    /// What `pass` returns.
    pub fn of_passes<E>(
        ids: &[u32],
        start: usize,
        lookup: usize,
        mut pass: impl FnMut(usize, &[u32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut stats = Self::default();
        let mut index = NgramIndex::default();
        let mut tokens = Vec::new();
        let mut at = start; // this token is known: the first one from the prompt's own pass
        while at + 1 < ids.len() {
            let known = &ids[..=at];
            tokens.clear();
            tokens.push(ids[at]);
            index.update(known);
            index.propose(known, lookup.min(ids.len() - at - 2), &mut tokens);
            pass(at, &tokens)?;
            let right = tokens.iter().zip(&ids[at..]).take_while(|(a, b)| a == b);
            let computed = right.count();
            stats.passes += 1;
            stats.proposed += tokens.len() - 1;
            stats.accepted += computed - 1;
            at += computed;
        }
        Ok(stats)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: looks at every earlier place, the latest first, the longest run first.
    fn naive(ids: &[u32], max: usize) -> Vec<u32> {
        for n in [4, 3, 2] {
            let Some(end) = ids.len().checked_sub(n) else {
                continue;
            };
            for start in (0..end).rev() {
                if ids[start..start + n] == ids[end..] {
                    let mut all = ids.to_vec();
                    for at in start + n..start + n + max {
                        all.push(all[at]);
                    }
                    return all.split_off(ids.len());
                }
            }
        }
        Vec::new()
    }

    fn propose(ids: &[u32], max: usize) -> Vec<u32> {
        let mut index = NgramIndex::default();
        index.update(ids);
        let mut out = Vec::new();
        index.propose(ids, max, &mut out);
        out
    }

    #[test]
    fn the_longest_match_goes_before_the_latest() {
        // 2 3 stood last before 8; 1 2 3 only before 7.
        assert_eq!(propose(&[1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 2), [7, 9]);
        // Of two equally long ones the latest.
        assert_eq!(propose(&[2, 3, 7, 0, 2, 3, 8, 0, 2, 3], 1), [8]);
        // One token is no evidence, and the end does not match itself.
        assert_eq!(propose(&[5, 1, 5], 4), [] as [u32; 0]);
        assert_eq!(propose(&[5, 6], 4), [] as [u32; 0]);
        assert_eq!(propose(&[], 4), [] as [u32; 0]);
        // The zeros that fill up a short run are no token 0.
        assert_eq!(propose(&[1, 2, 0, 0, 7, 1, 2], 1), [0]);
        assert_eq!(propose(&[0, 0, 7, 0], 3), [] as [u32; 0]);
    }

    #[test]
    fn a_loop_is_followed_round() {
        assert_eq!(propose(&[4, 4, 4], 3), [4, 4, 4]);
        assert_eq!(propose(&[1, 2, 3, 1, 2, 3, 1, 2], 5), [3, 1, 2, 3, 1]);
    }

    proptest! {
        #[test]
        fn the_index_is_a_naive_search(
            ids in proptest::collection::vec(0u32..4, 0..80),
            steps in proptest::collection::vec(1usize..6, 80),
            max in 0usize..12,
        ) {
            let mut index = NgramIndex::default();
            let mut len = 0;
            for step in steps {
                index.update(&ids[..len]);
                let mut out = vec![77];
                index.propose(&ids[..len], max, &mut out);
                prop_assert_eq!(&out[1..], &naive(&ids[..len], max));
                len += step;
                if len > ids.len() {
                    break;
                }
            }
        }

        #[test]
        fn a_text_gives_all_its_tokens(
            ids in proptest::collection::vec(0u32..3, 1..80),
            lookup in 0usize..6,
        ) {
            let stats = LookupStats::of_text(&ids, 0, lookup);
            prop_assert_eq!(stats.passes + stats.accepted, ids.len() - 1);
            prop_assert!(stats.accepted <= stats.proposed);
            prop_assert!(lookup > 0 || stats.passes == ids.len() - 1);
        }
    }
}
