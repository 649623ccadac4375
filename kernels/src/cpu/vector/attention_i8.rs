//! Attention on one block of keys and values in bytes; maths and layout in `attention.rs`.
//!
//! ```text
//! A pair of bytes is widened to 16 bits and multiplied with a pair that is broadcast: both products and
//! their sum are one instruction (vpmaddwd, vpdpwssd), sixteen sums a register of AVX-512. As floats each
//! byte needs a conversion of its own, 8 a cycle, which bound one query (29 GB/s from L1 on Zen 4).
//! 1. Scores: sixteen keys are the lanes, two elements of the query are broadcast. Tiles of queries x
//!    panels as for floats.
//! 2. Softmax on floats; then the weights of a query, with the steps of the values, become integers, zero
//!    where it sees nothing.
//! 3. Values: sixteen elements of the head are the lanes, the weights of two keys are broadcast. Queries of
//!    a tile take all keys that one of them sees: a weight of zero hides a byte for certain.
//! 4. A few queries ask for lines as floats do. One query also asks for the same place of the panels that
//!    come next, into the first level: ahead of its data, its loads miss there and take the places of what was
//!    asked for. On a Zen 4 core that reads 33 GB/s: 21.4 without that, 23.4 with it, 22.8 as floats; in
//!    registers of 512 bits, without it, 20. The hardware alone gave 20.9 with one panel at a time and 13.8
//!    with four. Asking alike for values was a loss.
//! Limit  one query: memory bandwidth; many: the multipliers, 32 products an instruction of 512 bits
//! Exact  sums exactly, floats in the order of the definition, but for the exponential
//! ```

use super::attention::{hull, merge_rows, softmax};
use super::{LANES, Lanes, Sums, padded};
use crate::cpu::ahead::{Asks, LINE, soon};
use crate::cpu::attention::{BlockI8, GROUP, IntegersMut, MOST, StateMut, most_of_query, step};
use std::ops::Range;

/// Sixteen pairs of bytes: two elements of sixteen keys, or sixteen elements of two values.
type Pairs = [[i8; 2]; LANES];

/// What the step of some values depends on.
struct Extent<L> {
    /// Magnitudes; a NaN may be passed over.
    largest: L,
    /// Zero in each lane, or NaN where something was not finite.
    finite: L,
}

impl<L: Lanes> Extent<L> {
    #[inline(always)]
    fn none() -> Self {
        Self {
            largest: L::splat(0.0),
            finite: L::splat(0.0),
        }
    }
    #[inline(always)]
    fn with(self, x: L) -> Self {
        Self {
            largest: self.largest.max(x.abs()),
            finite: x.mul_add(L::splat(0.0), self.finite),
        }
    }
    #[inline(always)]
    fn step(self, most: i16) -> f32 {
        step(self.largest.largest() + self.finite.sum(), most)
    }
}

/// Values in steps as integers.
#[inline(always)]
fn narrow<L: Lanes>(values: &[[f32; LANES]], step: f32, out: &mut [i16]) {
    let (out, _) = out.as_chunks_mut::<LANES>();
    // A NaN is not larger either.
    if step > 0.0 {
        let inverse = L::splat(1.0 / step);
        for (x, out) in values.iter().zip(out) {
            L::load(x).mul(inverse).store_i16(out);
        }
    } else {
        out[..values.len()].as_flattened_mut().fill(0);
    }
}

/// A query as integers, padded to whole sixteens; the step of them.
#[inline(always)]
pub(in crate::cpu) fn quantize<L: Lanes>(query: &[f32], out: &mut [i16]) -> f32 {
    let (chunks, rest) = query.as_chunks::<LANES>();
    let (out, out_rest) = out.split_at_mut(chunks.len() * LANES);
    let rest = [padded(rest)];
    let mut extent = Extent::<L>::none();
    for x in chunks {
        extent = extent.with(L::load(x));
    }
    let step = (extent.with(L::load(&rest[0]))).step(most_of_query(query.len()));
    narrow::<L>(chunks, step, out);
    if !out_rest.is_empty() {
        narrow::<L>(&rest, step, out_rest);
    }
    step
}

/// Scores of `Q` queries with `P` panels of keys from panel `first` on; a query's are `factors` times the
/// sum and the key's step.
#[inline(always)]
fn score_tile<S: Sums, const Q: usize, const P: usize>(
    block: &BlockI8<'_>,
    queries: [&[[i16; 2]]; Q],
    factors: [f32; Q],
    first: usize,
    scores: &mut [f32],
    stride: usize,
    ahead: &mut impl Asks,
) {
    let pairs = block.head_dim / 2;
    let keys: [&[Pairs]; P] =
        std::array::from_fn(|p| &block.keys.as_chunks().0[(first + p) * pairs..][..pairs]);
    let queries = queries.map(|q| &q[..pairs]);
    let mut acc = [[S::zero(); P]; Q];
    for i in 0..pairs {
        ahead.read(const { P * size_of::<Pairs>() });
        if Q == 1 && i.is_multiple_of(const { LINE / size_of::<Pairs>() }) {
            for p in 0..P {
                soon(&keys[p][i], const { P * size_of::<Pairs>() } * pairs);
            }
        }
        let mut k = [S::load(&[[0; 2]; LANES]); P];
        for p in 0..P {
            k[p] = S::load(&keys[p][i]);
        }
        for q in 0..Q {
            let x = S::splat(&queries[q][i]);
            for p in 0..P {
                acc[q][p] = acc[q][p].add_products(k[p], x);
            }
        }
    }
    let (steps, _) = block.key_steps.as_chunks::<LANES>();
    for q in 0..Q {
        let (row, _) = scores[q * stride..][..stride].as_chunks_mut::<LANES>();
        let factor = S::Floats::splat(factors[q]);
        for p in 0..P {
            let s = acc[q][p].floats().mul(factor);
            s.mul(S::Floats::load(&steps[first + p]))
                .store(&mut row[first + p]);
        }
    }
}

/// Scores of `Q` queries with all panels, `P` at a time.
#[inline(always)]
fn score_rows<S: Sums, const Q: usize, const P: usize>(
    block: &BlockI8<'_>,
    queries: &Queries<'_>,
    from: usize,
    panels: Range<usize>,
    scores: &mut [f32],
    stride: usize,
    ahead: &mut impl Asks,
) {
    let integers = std::array::from_fn(|q| queries.row(from + q));
    let factors = std::array::from_fn(|q| queries.factors[from + q]);
    let scores = &mut scores[from * stride..];
    let mut p = panels.start;
    while p + P <= panels.end {
        score_tile::<S, Q, P>(block, integers, factors, p, scores, stride, ahead);
        p += P;
    }
    for p in p..panels.end {
        score_tile::<S, Q, 1>(block, integers, factors, p, scores, stride, ahead);
    }
}

/// A group of queries as integers.
struct Queries<'a> {
    /// `[GROUP][stride]`
    integers: &'a [[i16; 2]],
    stride: usize,
    /// Their steps, times the scale.
    factors: [f32; GROUP],
}

impl Queries<'_> {
    #[inline(always)]
    fn row(&self, q: usize) -> &[[i16; 2]] {
        &self.integers[q * self.stride..][..self.stride]
    }
}

/// Scores of the first `n` of a group of queries with all panels: at most `SQ` queries and `P` panels in a
/// tile, `P1` for one query.
#[inline(always)]
fn scores<S: Sums, One: Sums, const SQ: usize, const P: usize, const P1: usize>(
    block: &BlockI8<'_>,
    queries: &Queries<'_>,
    n: usize,
    panels: Range<usize>,
    scores: &mut [f32],
    stride: usize,
    ahead: &mut impl Asks,
) {
    let mut from = 0;
    while from < n {
        let panels = panels.clone();
        from += match (n - from).min(SQ) {
            8.. => {
                score_rows::<S, 8, P>(block, queries, from, panels, scores, stride, ahead);
                8
            }
            4.. => {
                score_rows::<S, 4, P>(block, queries, from, panels, scores, stride, ahead);
                4
            }
            2.. => {
                score_rows::<S, 2, P>(block, queries, from, panels, scores, stride, ahead);
                2
            }
            _ => {
                score_rows::<One, 1, P1>(block, queries, from, panels, scores, stride, ahead);
                1
            }
        };
    }
}

/// Turns the weights of one query on `panels` into integers, after the steps of the values have been
/// multiplied into them; the step of them.
#[inline(always)]
pub(in crate::cpu) fn weigh<L: Lanes>(
    row: &mut [f32],
    seen: &Range<usize>,
    steps: &[f32],
    panels: Range<usize>,
    weights: &mut [i16],
) -> f32 {
    let own = seen.start / LANES..seen.end.div_ceil(LANES);
    let (row, _) = row.as_chunks_mut::<LANES>();
    let (steps, _) = steps.as_chunks::<LANES>();
    let mut extent = Extent::<L>::none();
    for p in own.clone() {
        let base = p * LANES;
        let (from, to) = (seen.start.max(base) - base, (seen.end - base).min(LANES));
        // What is not seen is zero already, but its step may be anything.
        let weight = L::load(&row[p]).mul(L::load(&steps[p]));
        let weight = weight.keep(from, to, L::splat(0.0));
        extent = extent.with(weight);
        weight.store(&mut row[p]);
    }
    let step = extent.step(MOST);
    weights[panels.start * LANES..own.start * LANES].fill(0);
    narrow::<L>(&row[own.clone()], step, &mut weights[own.start * LANES..]);
    weights[own.end * LANES..panels.end * LANES].fill(0);
    step
}

/// The weights of a group of queries as integers.
struct Weights<'a> {
    /// `[GROUP][stride]`: pairs of keys
    integers: &'a [[i16; 2]],
    stride: usize,
    steps: [f32; GROUP],
}

/// `C` times 16 elements of what `Q` queries from `from` on get: the values of the pairs `keys`, weighted.
#[inline(always)]
fn value_tile<S: Sums, const Q: usize, const C: usize>(
    block: &BlockI8<'_>,
    weights: &Weights<'_>,
    from: usize,
    keys: Range<usize>,
    column: usize,
    sums: &mut [f32],
    ahead: &mut impl Asks,
) {
    let d = block.head_dim;
    let integers: [_; Q] =
        std::array::from_fn(|q| &weights.integers[(from + q) * weights.stride..][keys.clone()]);
    let values = &block.values[keys.start * d..keys.end * d];
    let width = sums.len() / GROUP;
    let mut acc = [[S::zero(); C]; Q];
    for (j, row) in values.chunks_exact(d).enumerate() {
        let row: &[Pairs; C] = row[column..].as_chunks().0.first_chunk().expect("columns");
        ahead.read(const { C * size_of::<Pairs>() });
        let mut v = [S::load(&[[0; 2]; LANES]); C];
        for c in 0..C {
            v[c] = S::load(&row[c]);
        }
        for q in 0..Q {
            let w = S::splat(&integers[q][j]);
            for c in 0..C {
                acc[q][c] = acc[q][c].add_products(v[c], w);
            }
        }
    }
    for q in 0..Q {
        let step = S::Floats::splat(weights.steps[from + q]);
        let (chunks, _) = sums[(from + q) * width + column..].as_chunks_mut::<LANES>();
        for c in 0..C {
            acc[q][c].floats().mul(step).store(&mut chunks[c]);
        }
    }
}

/// The same for the last elements of a head, fewer than 16, of one query.
#[inline(always)]
fn value_rest<S: Sums>(
    block: &BlockI8<'_>,
    weights: &Weights<'_>,
    query: usize,
    keys: Range<usize>,
    column: usize,
    sums: &mut [f32],
) {
    let d = block.head_dim;
    let integers = &weights.integers[query * weights.stride..][..weights.stride];
    let width = sums.len() / GROUP;
    let mut acc = S::zero();
    for j in keys {
        let v = S::load(&padded(&block.values[j * d + column..(j + 1) * d]));
        acc = acc.add_products(v, S::splat(&integers[j]));
    }
    let (sums, _) = sums[query * width + column..].as_chunks_mut::<LANES>();
    let step = S::Floats::splat(weights.steps[query]);
    acc.floats().mul(step).store(&mut sums[0]);
}

/// What `Q` queries from `from` on get, `C` or `D` columns of 16 at a time.
#[inline(always)]
fn values<S: Sums, const Q: usize, const C: usize, const D: usize>(
    block: &BlockI8<'_>,
    weights: &Weights<'_>,
    from: usize,
    visible: &[Range<usize>],
    sums: &mut [f32],
    ahead: &mut impl Asks,
) {
    let Some(seen) = hull(&visible[from..from + Q]) else {
        return;
    };
    let keys = seen.start / 2..seen.end.div_ceil(2);
    let columns = block.head_dim / LANES;
    let mut c = 0;
    while c < columns {
        let rest = columns - c;
        let (keys, column) = (keys.clone(), c * LANES);
        c += if rest == C || rest >= C + D {
            value_tile::<S, Q, C>(block, weights, from, keys, column, sums, ahead);
            C
        } else if rest >= D {
            value_tile::<S, Q, D>(block, weights, from, keys, column, sums, ahead);
            D
        } else {
            value_tile::<S, Q, 1>(block, weights, from, keys, column, sums, ahead);
            1
        };
    }
    if !block.head_dim.is_multiple_of(LANES) {
        for q in from..from + Q {
            value_rest::<S>(block, weights, q, keys.clone(), c * LANES, sums);
        }
    }
}

/// One block of keys for all queries, a group at a time: scores, weights, values, and the merge into
/// their state. `One` is for one query. The constants are tile sizes: see [`scores`] for `SQ` and `P`,
/// [`values`] for `C` and `D`, `VQ` queries at a time; `P1`, `C1` and `D1` are those of one query. `ahead` is told
/// what is read; it can be for one group only.
#[inline(always)]
pub(in crate::cpu) fn attend<
    S: Sums,
    One: Sums,
    const SQ: usize,
    const P: usize,
    const VQ: usize,
    const C: usize,
    const D: usize,
    const P1: usize,
    const C1: usize,
    const D1: usize,
>(
    block: BlockI8<'_>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
    integers: IntegersMut<'_>,
    ahead: &mut impl Asks,
) {
    let d = block.head_dim;
    let stride = state.scores.len() / GROUP;
    let width = state.block.len() / GROUP;
    for (g, visible) in visible.chunks(GROUP).enumerate() {
        let Some(seen) = hull(visible) else {
            continue;
        };
        let n = visible.len();
        let mut factors = [0.0; GROUP];
        for (q, query) in queries[g * GROUP * d..][..n * d]
            .chunks_exact(d)
            .enumerate()
        {
            let out = &mut integers.queries[q * width..][..width];
            factors[q] = quantize::<S::Floats>(query, out) * block.scale;
        }
        let group = Queries {
            integers: integers.queries.as_chunks().0,
            stride: width / 2,
            factors,
        };
        let panels = seen.start / LANES..seen.end.div_ceil(LANES);
        let all = panels.clone();
        scores::<S, One, SQ, P, P1>(&block, &group, n, all, state.scores, stride, ahead);

        let mut stats = [(f32::NEG_INFINITY, 0.0); GROUP];
        let mut steps = [0.0; GROUP];
        for (q, seen) in visible.iter().enumerate() {
            let weights = &mut integers.weights[q * stride..][..stride];
            if seen.is_empty() {
                weights.fill(0);
                continue;
            }
            let row = &mut state.scores[q * stride..][..stride];
            stats[q] = softmax::<S::Floats>(row, seen);
            let panels = panels.clone();
            steps[q] = weigh::<S::Floats>(row, seen, block.value_steps, panels, weights);
        }
        ahead.lines(2 * panels.len()); // the steps were read

        let weights = Weights {
            integers: integers.weights.as_chunks().0,
            stride: stride / 2,
            steps,
        };
        let mut q = 0;
        while q < n {
            q += if q + VQ <= n {
                values::<S, VQ, C, D>(&block, &weights, q, visible, state.block, ahead);
                VQ
            } else {
                values::<One, 1, C1, D1>(&block, &weights, q, visible, state.block, ahead);
                1
            };
        }
        let rows = state.block.chunks_exact(width);
        let first = g * GROUP;
        merge_rows::<S::Floats>(
            visible, &stats, rows, first, state.max, state.sum, state.acc,
        );
    }
}
