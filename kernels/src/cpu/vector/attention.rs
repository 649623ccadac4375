//! Attention on one block of keys; maths and layout in `attention.rs`.
//!
//! ```text
//! Sixteen keys are the lanes of a register: a score is one chain of multiply-adds over the elements
//! of the head, the query's element broadcast, and needs no sum across lanes.
//! 1. Scores: tiles of queries x panels of 16 keys. One query takes four panels at a time, so that
//!    its chains are independent; eight take two, so that each load serves eight.
//!    One query has lanes of its own kind: AVX-512 gives it 256-bit registers, since widening sixteen
//!    halves at once takes twice as long as eight and eight (58 instead of 100 GB/s from L1 on Zen 4).
//! 2. Softmax: a query's scores lie in one row (1 KiB); lanes that it does not see count as nothing.
//! 3. Values: sixteen elements of the head are the lanes, weights are broadcast, keys follow each
//!    other. The keys that all queries of a tile see are taken together; what only some see, the
//!    triangle at the diagonal, one query at a time. So nothing is multiplied by a weight of zero,
//!    and a value that a query does not see cannot reach it, not even as a NaN.
//! 4. A few queries wait for memory, so each line that is read asks for one that will be: while keys
//!    are read, for the values of the block; while values are, for what is read after the block.
//! Limit  one query: memory bandwidth; many: the multipliers
//! Exact  each sum in the order of the definition, whatever is beside it; multiply-adds round once
//! ```

use super::{LANES, Lanes, Load, exp_of_negative, padded};
use crate::cpu::ahead::{Asks, LINE};
use crate::cpu::attention::{Block, GROUP, Partial, PartialMut, StateMut};
use std::ops::Range;

/// Scores of `Q` queries with `P` panels of keys from panel `first` on.
///
/// Here and below, what loads stands in loops: in a closure that the compiler leaves a function of its
/// own, an instruction would become a call.
#[inline(always)]
fn score_tile<L: Lanes, T: Load, const Q: usize, const P: usize>(
    block: &Block<'_, T>,
    queries: [&[f32]; Q],
    first: usize,
    scores: &mut [f32],
    stride: usize,
    ahead: &mut impl Asks,
) {
    let d = block.head_dim;
    let keys: [&[[T; LANES]]; P] =
        std::array::from_fn(|p| &block.keys.as_chunks().0[(first + p) * d..][..d]);
    let mut acc = [[L::splat(0.0); P]; Q];
    // One element of the panels is some lines, or a part of one.
    let bytes = const { P * size_of::<[T; LANES]>() };
    for i in 0..d {
        if (i * bytes).is_multiple_of(LINE) {
            ahead.lines(const { (P * size_of::<[T; LANES]>()).div_ceil(LINE) });
        }
        let mut k = [L::splat(0.0); P];
        for p in 0..P {
            k[p] = T::load(&keys[p][i]);
        }
        for q in 0..Q {
            let x = L::splat(queries[q][i]);
            for p in 0..P {
                acc[q][p] = x.mul_add(k[p], acc[q][p]);
            }
        }
    }
    let scale = L::splat(block.scale);
    for q in 0..Q {
        let (row, _) = scores[q * stride..][..stride].as_chunks_mut::<LANES>();
        for p in 0..P {
            acc[q][p].mul(scale).store(&mut row[first + p]);
        }
    }
}

/// Scores of `Q` queries with all panels, `P` at a time.
#[inline(always)]
fn score_rows<L: Lanes, T: Load, const Q: usize, const P: usize>(
    block: &Block<'_, T>,
    queries: &[f32],
    panels: Range<usize>,
    scores: &mut [f32],
    stride: usize,
    ahead: &mut impl Asks,
) {
    let d = block.head_dim;
    let queries: [&[f32]; Q] = std::array::from_fn(|q| &queries[q * d..][..d]);
    let mut p = panels.start;
    while p + P <= panels.end {
        score_tile::<L, T, Q, P>(block, queries, p, scores, stride, ahead);
        p += P;
    }
    for p in p..panels.end {
        score_tile::<L, T, Q, 1>(block, queries, p, scores, stride, ahead);
    }
}

/// Turns the scores of one query into weights: the largest score, and the sum of the exponentials.
#[inline(always)]
pub(in crate::cpu) fn softmax<L: Lanes>(row: &mut [f32], seen: &Range<usize>) -> (f32, f32) {
    let (row, _) = row.as_chunks_mut::<LANES>();
    let panels = seen.start / LANES..seen.end.div_ceil(LANES);
    // The lanes of a panel that the query sees.
    let lanes = |p: usize| {
        let base = p * LANES;
        (seen.start.max(base) - base, (seen.end - base).min(LANES))
    };
    let mut max = L::splat(f32::NEG_INFINITY);
    for p in panels.clone() {
        let (from, to) = lanes(p);
        max = max.max(L::load(&row[p]).keep(from, to, L::splat(f32::NEG_INFINITY)));
    }
    let max = max.largest();
    let mut sum = L::splat(0.0);
    for p in panels {
        let (from, to) = lanes(p);
        let weight =
            exp_of_negative(L::load(&row[p]).sub(L::splat(max))).keep(from, to, L::splat(0.0));
        sum = sum.add(weight);
        weight.store(&mut row[p]);
    }
    (max, sum.sum())
}

/// Adds the values of the keys `seen`, weighted, to `C` times 16 elements of `Q` queries.
#[inline(always)]
fn value_tile<L: Lanes, T: Load, const Q: usize, const C: usize>(
    block: &Block<'_, T>,
    weights: [&[f32]; Q],
    seen: Range<usize>,
    column: usize,
    sums: &mut [f32],
    width: usize,
    ahead: &mut impl Asks,
) {
    let d = block.head_dim;
    let at = |q: usize| q * width + column;
    let mut acc = [[L::splat(0.0); C]; Q];
    for q in 0..Q {
        let (chunks, _) = sums[at(q)..].as_chunks::<LANES>();
        for c in 0..C {
            acc[q][c] = L::load(&chunks[c]);
        }
    }
    let weights = weights.map(|w| &w[seen.clone()]);
    let values = &block.values[seen.start * d..seen.end * d];
    for (j, row) in values.chunks_exact(d).enumerate() {
        let row: &[[T; LANES]; C] = row[column..].as_chunks().0.first_chunk().expect("columns");
        ahead.read(C * size_of::<[T; LANES]>());
        let mut v = [L::splat(0.0); C];
        for c in 0..C {
            v[c] = T::load(&row[c]);
        }
        for q in 0..Q {
            let w = L::splat(weights[q][j]);
            for c in 0..C {
                acc[q][c] = w.mul_add(v[c], acc[q][c]);
            }
        }
    }
    for q in 0..Q {
        let (chunks, _) = sums[at(q)..].as_chunks_mut::<LANES>();
        for c in 0..C {
            acc[q][c].store(&mut chunks[c]);
        }
    }
}

/// The same for the last elements of a head, fewer than 16.
#[inline(always)]
fn value_rest<L: Lanes, T: Load>(
    block: &Block<'_, T>,
    weights: &[f32],
    seen: Range<usize>,
    column: usize,
    sums: &mut [f32],
) {
    let d = block.head_dim;
    let (sums, _) = sums[column..].as_chunks_mut::<LANES>();
    let mut acc = L::load(&sums[0]);
    for j in seen {
        let v: L = T::load(&padded(&block.values[j * d + column..(j + 1) * d]));
        acc = L::splat(weights[j]).mul_add(v, acc);
    }
    acc.store(&mut sums[0]);
}

/// Adds the values of the keys `seen` to the sums of `Q` queries, `C` or `D` columns of 16 at a time.
#[inline(always)]
fn values<L: Lanes, T: Load, const Q: usize, const C: usize, const D: usize>(
    block: &Block<'_, T>,
    scores: &[f32],
    stride: usize,
    seen: Range<usize>,
    sums: &mut [f32],
    width: usize,
    ahead: &mut impl Asks,
) {
    if seen.is_empty() {
        return;
    }
    let weights: [&[f32]; Q] = std::array::from_fn(|q| &scores[q * stride..][..stride]);
    let columns = block.head_dim / LANES;
    let mut c = 0;
    while c < columns {
        let rest = columns - c;
        let seen = seen.clone();
        if rest == C || rest >= C + D {
            value_tile::<L, T, Q, C>(block, weights, seen, c * LANES, sums, width, ahead);
            c += C;
        } else if rest >= D {
            value_tile::<L, T, Q, D>(block, weights, seen, c * LANES, sums, width, ahead);
            c += D;
        } else {
            value_tile::<L, T, Q, 1>(block, weights, seen, c * LANES, sums, width, ahead);
            c += 1;
        }
    }
    if !block.head_dim.is_multiple_of(LANES) {
        for q in 0..Q {
            let sums = &mut sums[q * width..][..width];
            value_rest::<L, T>(block, weights[q], seen.clone(), c * LANES, sums);
        }
    }
}

/// Adds the values that `Q` queries see; what only some of them see, one by one.
#[inline(always)]
fn value_rows<
    L: Lanes,
    One: Lanes,
    T: Load,
    const Q: usize,
    const C: usize,
    const D: usize,
    const C1: usize,
    const D1: usize,
>(
    block: &Block<'_, T>,
    scores: &[f32],
    stride: usize,
    visible: &[Range<usize>],
    sums: &mut [f32],
    width: usize,
    ahead: &mut impl Asks,
) {
    let start = visible.iter().map(|r| r.start).max().unwrap_or(0);
    let end = visible.iter().map(|r| r.end).min().unwrap_or(0);
    let common = start..end.max(start);
    if Q == 1 || common.is_empty() {
        let seen = visible.iter().cloned();
        one_by_one::<One, T, C1, D1>(block, scores, stride, seen, sums, width, ahead);
        return;
    }
    let before = visible.iter().map(|seen| seen.start..common.start);
    let after = visible.iter().map(|seen| common.end..seen.end);
    one_by_one::<One, T, C1, D1>(block, scores, stride, before, sums, width, ahead);
    values::<L, T, Q, C, D>(block, scores, stride, common.clone(), sums, width, ahead);
    one_by_one::<One, T, C1, D1>(block, scores, stride, after, sums, width, ahead);
}

/// Adds to the sums of each query the values of its own keys.
#[inline(always)]
fn one_by_one<L: Lanes, T: Load, const C: usize, const D: usize>(
    block: &Block<'_, T>,
    scores: &[f32],
    stride: usize,
    seen: impl Iterator<Item = Range<usize>>,
    sums: &mut [f32],
    width: usize,
    ahead: &mut impl Asks,
) {
    for (q, seen) in seen.enumerate() {
        let scores = &scores[q * stride..][..stride];
        let sums = &mut sums[q * width..][..width];
        values::<L, T, 1, C, D>(block, scores, stride, seen, sums, width, ahead);
    }
}

/// Scores of a group of queries with all panels: at most `SQ` queries and `P` panels in a tile, `P1` for
/// one query.
#[inline(always)]
fn scores<L: Lanes, One: Lanes, T: Load, const SQ: usize, const P: usize, const P1: usize>(
    block: &Block<'_, T>,
    queries: &[f32],
    panels: Range<usize>,
    mut scores: &mut [f32],
    stride: usize,
    ahead: &mut impl Asks,
) {
    let mut queries = queries;
    while !queries.is_empty() {
        let panels = panels.clone();
        let done = match (queries.len() / block.head_dim).min(SQ) {
            8.. => {
                score_rows::<L, T, 8, P>(block, queries, panels, scores, stride, ahead);
                8
            }
            4.. => {
                score_rows::<L, T, 4, P>(block, queries, panels, scores, stride, ahead);
                4
            }
            2.. => {
                score_rows::<L, T, 2, P>(block, queries, panels, scores, stride, ahead);
                2
            }
            _ => {
                score_rows::<One, T, 1, P1>(block, queries, panels, scores, stride, ahead);
                1
            }
        };
        queries = &queries[done * block.head_dim..];
        scores = &mut scores[done * stride..];
    }
}

/// The weighted values of a group of queries, `VQ` queries at a time.
#[inline(always)]
fn weighted<
    L: Lanes,
    One: Lanes,
    T: Load,
    const VQ: usize,
    const C: usize,
    const D: usize,
    const C1: usize,
    const D1: usize,
>(
    block: &Block<'_, T>,
    scores: &[f32],
    stride: usize,
    visible: &[Range<usize>],
    sums: &mut [f32],
    width: usize,
    ahead: &mut impl Asks,
) {
    let n = visible.len();
    sums[..n * width].fill(0.0);
    let mut i = 0;
    while i < n {
        let (scores, sums) = (&scores[i * stride..], &mut sums[i * width..]);
        if i + VQ <= n {
            let visible = &visible[i..i + VQ];
            value_rows::<L, One, T, VQ, C, D, C1, D1>(
                block, scores, stride, visible, sums, width, ahead,
            );
            i += VQ;
        } else {
            let visible = visible[i..=i].iter().cloned();
            one_by_one::<One, T, C1, D1>(block, scores, stride, visible, sums, width, ahead);
            i += 1;
        }
    }
}

/// One block of keys for all queries, a group at a time: scores, weights, values, and the merge into
/// their state. `One` are the lanes for one query. The constants are tile sizes: see [`scores`] for `SQ` and
/// `P`, [`weighted`] for `VQ`, [`values`] for `C` and `D`; `P1`, `C1` and `D1` are those of one query.
/// `ahead` is told what is read; it can be for one group only.
#[inline(always)]
pub(in crate::cpu) fn attend<
    L: Lanes,
    One: Lanes,
    T: Load,
    const SQ: usize,
    const P: usize,
    const VQ: usize,
    const C: usize,
    const D: usize,
    const P1: usize,
    const C1: usize,
    const D1: usize,
>(
    block: Block<'_, T>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
    ahead: &mut impl Asks,
) {
    let d = block.head_dim;
    let stride = state.scores.len() / GROUP;
    let width = state.block.len() / GROUP;
    for (g, visible) in visible.chunks(GROUP).enumerate() {
        let Some(Range { start, end }) = hull(visible) else {
            continue;
        };
        let queries = &queries[g * GROUP * d..][..visible.len() * d];
        let panels = start / LANES..end.div_ceil(LANES);
        scores::<L, One, T, SQ, P, P1>(&block, queries, panels, state.scores, stride, ahead);
        let mut stats = [(f32::NEG_INFINITY, 0.0); GROUP];
        for (q, seen) in visible.iter().enumerate().filter(|(_, r)| !r.is_empty()) {
            let row = &mut state.scores[q * stride..][..stride];
            stats[q] = softmax::<L>(row, seen);
        }
        weighted::<L, One, T, VQ, C, D, C1, D1>(
            &block,
            state.scores,
            stride,
            visible,
            state.block,
            width,
            ahead,
        );
        let rows = state.block.chunks_exact(width);
        let first = g * GROUP;
        merge_rows::<L>(
            visible, &stats, rows, first, state.max, state.sum, state.acc,
        );
    }
}

/// From the first key that one of the queries sees to the last.
#[inline(always)]
pub(in crate::cpu) fn hull(visible: &[Range<usize>]) -> Option<Range<usize>> {
    let seen = || visible.iter().filter(|r| !r.is_empty());
    let (start, end) = (seen().map(|r| r.start).min(), seen().map(|r| r.end).max());
    Some(start?..end?)
}

/// Merges what a block gave some queries, as far as they saw some of it: the largest score and the sum of exponentials of
/// each, and the weighted values, the first `head_dim` of a row. Their states are those from `first` on.
#[inline(always)]
pub(in crate::cpu) fn merge_rows<'b, L: Lanes>(
    visible: &[Range<usize>],
    stats: &[(f32, f32)],
    rows: impl Iterator<Item = &'b [f32]>,
    first: usize,
    max: &mut [f32],
    sum: &mut [f32],
    acc: &mut [f32],
) {
    let d = acc.len() / max.len();
    let states = (max.iter_mut().zip(sum)).zip(acc.chunks_exact_mut(d));
    let blocks = visible.iter().zip(stats).zip(rows);
    for (((seen, stats), row), ((max, sum), acc)) in blocks.zip(states.skip(first)) {
        if !seen.is_empty() {
            let of_block = Partial {
                max: stats.0,
                sum: stats.1,
                acc: &row[..d],
            };
            merge::<L>(of_block, PartialMut { max, sum, acc });
        }
    }
}

/// Merges what one block gave into the state of a query.
#[inline(always)]
pub(in crate::cpu) fn merge<L: Lanes>(block: Partial<'_>, state: PartialMut<'_>) {
    let new = state.max.max(block.max);
    // Both factors in one exponential.
    let mut factors = [0.0; LANES];
    (factors[0], factors[1]) = (*state.max - new, block.max - new);
    exp_of_negative(L::load(&factors)).store(&mut factors);
    let (old, of_block) = (factors[0], factors[1]);
    *state.max = new;
    *state.sum = *state.sum * old + block.sum * of_block;
    let (acc, acc_rest) = state.acc.as_chunks_mut::<LANES>();
    let (values, values_rest) = block.acc.as_chunks::<LANES>();
    for (a, v) in acc.iter_mut().zip(values) {
        let kept = L::load(a).mul(L::splat(old));
        kept.add(L::load(v).mul(L::splat(of_block))).store(a);
    }
    for (a, v) in acc_rest.iter_mut().zip(values_rest) {
        *a = *a * old + v * of_block;
    }
}
