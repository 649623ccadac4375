//! Attention with an online softmax, one block of keys at a time.
//!
//! ```text
//! Maths   o = sum over j of softmax_j(scale * <q, k_j>) v_j over the keys j that q may see
//!
//!         A block of keys gives        m_b = max of its scores
//!                                      l_b = sum over j of exp(s_j - m_b)
//!                                      a_b = sum over j of exp(s_j - m_b) v_j
//!         and is merged into the state M  = max(m, m_b)
//!                                      l <- l * exp(m - M) + l_b * exp(m_b - M)
//!                                      a <- a * exp(m - M) + a_b * exp(m_b - M)
//!         after the last block         o  = a / l          (Milakov & Gimelshein 2018; Dao 2022)
//! Order   blocks are fixed ranges of absolute positions, merged from the first to the last. Inside
//!         one a score adds up the elements of the head from the first to the last, the values are
//!         added from the first key to the last, and l_b in 16 partial sums, key j in sum j mod 16.
//!         So a result depends on the query and its keys only: not on what is computed beside it.
//! Layout  keys in panels of 16, element by element: [panels][head_dim][16], so that 16 keys are the
//!         lanes of a register; values [keys][head_dim]
//! Work    4 operations a query, visible key and element
//! Exact   f32 throughout; keys and values are widened from what the cache stores
//! ```
//!
//! A cache of bytes is multiplied as it is, by 16-bit integers:
//!
//! ```text
//! Maths   key j is step_j * K_j, value j is step'_j * V_j, bytes in -127..=127 and one f32 step each
//!         Q_i = round(q_i / step_q),      step_q = max |q_i| / most
//!         s_j = <Q, K_j> * (step_q * scale) * step_j
//!         u_j = exp(s_j - m_b) * step'_j
//!         U_j = round(u_j / step_u),      step_u = max u_j / 32767 over the keys that q sees
//!         a_b = (sum over j of U_j V_j) * step_u;      m_b, l_b and the merge as above
//!         A step below the smallest normal number is zero, and so is what has it. Where something is not
//!         finite the step is NaN, and with it all that it is multiplied into.
//! Order   <Q, K_j> and the sum of U_j V_j are sums of integers, so none; the f32 products from the left
//! Layout  two elements, and two keys, lie side by side, since the instructions multiply and add pairs:
//!         keys [panels][head_dim / 2][16][2], values [keys / 2][head_dim][2]; an odd last key has a
//!         neighbour that nobody sees
//! Limits  sums fit 32 bits: most = 32767 up to 512 elements, less for longer heads (`most_of_query`), and a
//!         block has 512 keys at most
//! Exact   integers exactly. Rounding Q moves a score by 2^-16 of max |q| * sum |k_j| at most, rounding U a
//!         result by 2^-16 of max u_j * sum |V_j|; a byte of the cache is off by 2^-8 of its row's largest
//! ```

use super::Kernels;
use super::ahead::Span;
use crate::view::Elements;
use std::ops::Range;

/// Keys in a panel.
pub const KEY_PANEL: usize = 16;

/// Queries that are computed together at most.
pub(super) const GROUP: usize = 8;

/// Keys or values as the cache stores them.
#[derive(Clone, Copy, Debug)]
pub enum Cached<'a> {
    /// Floats.
    Floats(Elements<'a>),
    /// Signed bytes, an even number of keys.
    I8 {
        /// The bytes, never -128.
        quants: &'a [i8],
        /// One step a key, whole panels.
        steps: &'a [f32],
    },
}

impl Default for Cached<'_> {
    /// Nothing.
    fn default() -> Self {
        Self::Floats(Elements::F32(&[]))
    }
}

impl Cached<'_> {
    /// Where it is.
    fn spans(&self) -> [Span; 2] {
        match *self {
            Self::Floats(Elements::F32(s)) => [Span::of(s), NOWHERE],
            Self::Floats(Elements::F16(s)) => [Span::of(s), NOWHERE],
            Self::Floats(Elements::Bf16(s)) => [Span::of(s), NOWHERE],
            Self::I8 { quants, steps } => [Span::of(steps), Span::of(quants)],
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Floats(elements) => elements.len(),
            Self::I8 { quants, .. } => quants.len(),
        }
    }
}

/// One block of keys and values of one KV head, and the queries that look at it.
#[derive(Clone, Copy, Debug)]
pub struct AttentionTask<'a> {
    /// Which query of the state is the first of these.
    pub first: usize,
    /// `[queries, head_dim]`, rotated.
    pub queries: &'a [f32],
    /// The keys of the block that each query may see, as a range within the block; `[queries]`.
    pub visible: &'a [Range<usize>],
    /// `[panels, head_dim, 16]`, rotated; bytes `[panels, head_dim / 2, 16, 2]`.
    pub keys: Cached<'a>,
    /// `[keys, head_dim]`; bytes `[keys / 2, head_dim, 2]`.
    pub values: Cached<'a>,
    /// Factor on every score.
    pub scale: f32,
    /// What is read after this block, in that order: where the queries are few, it is asked for while this
    /// block is read. No result depends on it.
    pub then: [Cached<'a>; THEN],
}

/// Keys and values that can be told of in advance. A block of keys is asked for while values of as many
/// bytes are read; the last block of a cache can be short, and then there is time for what follows it.
pub const THEN: usize = 3;

/// The running softmax of some queries.
#[derive(Clone, Debug, Default)]
pub struct AttentionState {
    head_dim: usize,
    /// `[queries]`, the largest score so far
    pub(super) max: Vec<f32>,
    /// `[queries]`, the sum of exponentials relative to `max`
    pub(super) sum: Vec<f32>,
    /// `[queries, head_dim]`, the values weighted alike
    pub(super) acc: Vec<f32>,
    /// scores of a group on one block; then its own weighted values
    scratch: Vec<f32>,
    /// where the cache holds bytes: the queries of a group, then its weights on one block
    integers: Vec<i16>,
}

/// The state of the queries, borrowed for one block.
#[derive(Debug)]
pub(super) struct StateMut<'a> {
    /// `[queries]`
    pub max: &'a mut [f32],
    /// `[queries]`
    pub sum: &'a mut [f32],
    /// `[queries, head_dim]`
    pub acc: &'a mut [f32],
    /// `[GROUP][keys, whole panels]`
    pub scores: &'a mut [f32],
    /// `[GROUP][head_dim, whole sixteens]`
    pub block: &'a mut [f32],
}

/// The keys and values of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a, T> {
    pub head_dim: usize,
    /// `[panels][head_dim][16]`
    pub keys: &'a [T],
    /// `[keys][head_dim]`
    pub values: &'a [T],
    /// Factor on every score.
    pub scale: f32,
    /// What is read after this block.
    pub then: [[Span; 2]; THEN],
}

/// The keys and values of a block as bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockI8<'a> {
    pub head_dim: usize,
    /// `[panels][head_dim / 2][16][2]`
    pub keys: &'a [[i8; 2]],
    /// `[keys / 2][head_dim][2]`
    pub values: &'a [[i8; 2]],
    /// `[panels * 16]`
    pub key_steps: &'a [f32],
    /// `[panels * 16]`
    pub value_steps: &'a [f32],
    /// Factor on every score.
    pub scale: f32,
    /// What is read after this block.
    pub then: [[Span; 2]; THEN],
}

/// Queries and weights as integers.
#[derive(Debug)]
pub(super) struct IntegersMut<'a> {
    /// `[GROUP][head_dim, whole sixteens]`
    pub queries: &'a mut [i16],
    /// `[GROUP][keys, whole panels]`
    pub weights: &'a mut [i16],
}

/// Keys that a block of bytes has at most: so many products of a weight and a byte fit 32 bits.
const MOST_KEYS: usize = 1 << 9;
/// The largest weight.
pub(super) const MOST: i16 = i16::MAX;

/// The largest magnitude of an element of a query: `head_dim` products with bytes fit 32 bits.
pub(super) fn most_of_query(head_dim: usize) -> i16 {
    let fits = i32::MAX as usize / (128 * head_dim);
    fits.min(usize::from(MOST.unsigned_abs())) as i16
}

/// The step of 16-bit integers up to `most` for values whose largest magnitude is `amax`, which is NaN
/// where one of them is not finite.
pub(super) fn step(amax: f32, most: i16) -> f32 {
    let most = f32::from(most);
    // A subnormal step would divide to infinity.
    if amax <= most * f32::MIN_POSITIVE {
        0.0
    } else {
        amax / most
    }
}

/// No memory.
const NOWHERE: Span = Span::EMPTY;
/// What is asked for in the course of a block.
pub(super) type Spans = [Span; 2 + 2 * THEN];

impl<T> Block<'_, T> {
    /// What is read after the keys: the values of the keys `seen`, and what comes after the block.
    #[inline(always)]
    pub(super) fn spans(&self, seen: Range<usize>) -> Spans {
        let d = self.head_dim;
        let values = Span::of(&self.values[seen.start * d..seen.end * d]);
        spans([NOWHERE, values], &self.then)
    }
}

impl BlockI8<'_> {
    /// The same: steps and pairs of the values.
    #[inline(always)]
    pub(super) fn spans(&self, seen: Range<usize>) -> Spans {
        let d = self.head_dim;
        let values = &self.values[seen.start / 2 * d..seen.end.div_ceil(2) * d];
        let steps = &self.value_steps[seen];
        spans([Span::of(steps), Span::of(values)], &self.then)
    }
}

/// What is read after the keys of a block: `own` of it, then what comes after it.
#[inline(always)]
fn spans(own: [Span; 2], then: &[[Span; 2]; THEN]) -> Spans {
    let mut spans = [NOWHERE; 2 + 2 * THEN];
    spans[..2].copy_from_slice(&own);
    spans[2..].copy_from_slice(then.as_flattened());
    spans
}

/// Merges one block into the state of each query.
/// # Safety
/// The CPU has the features of the table; the slices of `block` are of one number of keys, as its
/// fields say; `queries` is `[visible.len(), head_dim]`; every visible range is inside the keys; the
/// state is of those queries and that block.
pub(super) type Attend<T> =
    unsafe fn(block: Block<'_, T>, queries: &[f32], visible: &[Range<usize>], state: StateMut<'_>);

/// The same with a block of bytes.
/// # Safety
/// The same, and `head_dim` is even; every element of `integers` may be overwritten.
pub(super) type AttendI8 = unsafe fn(
    block: BlockI8<'_>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
    integers: IntegersMut<'_>,
);

/// What one block, or several, gave one query: the largest score, the sum of the exponentials, and the
/// values weighted by them.
#[derive(Debug)]
pub(super) struct Partial<'a> {
    pub max: f32,
    pub sum: f32,
    /// `[head_dim]`
    pub acc: &'a [f32],
}

/// The same, to be merged into.
#[derive(Debug)]
pub(super) struct PartialMut<'a> {
    pub max: &'a mut f32,
    pub sum: &'a mut f32,
    /// `[head_dim]`
    pub acc: &'a mut [f32],
}

/// Merges what one block gave into the state of a query.
/// # Safety
/// The CPU has the features of the table; both are of one head_dim.
pub(super) type Merge = unsafe fn(block: Partial<'_>, state: PartialMut<'_>);

impl AttentionState {
    /// Starts anew for `queries` queries.
    pub fn reset(&mut self, queries: usize, head_dim: usize) {
        self.head_dim = head_dim;
        for (v, len, start) in [
            (&mut self.max, queries, f32::NEG_INFINITY),
            (&mut self.sum, queries, 0.0),
            (&mut self.acc, queries * head_dim, 0.0),
        ] {
            v.clear();
            v.resize(len, start);
        }
    }

    /// Queries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.max.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.max.is_empty()
    }

    /// Merges the state of the same queries on a later block, as if they had been attended to here; it is
    /// that of the queries from `first` on in `later`, which can hold several blocks one after the other.
    ///
    /// These must have seen one block only: then this is what [`Kernels::attend`] does with it, bit
    /// for bit, and blocks can be computed by different threads.
    /// # Panics
    /// When the states are of different queries.
    pub fn merge(&mut self, kernels: &Kernels, later: &Self, first: usize) {
        assert_eq!(self.head_dim, later.head_dim, "head_dim of the states");
        assert!(
            first + self.len() <= later.len(),
            "queries {first} to {} of {}",
            first + self.len(),
            later.len()
        );
        let d = self.head_dim;
        for i in 0..self.max.len() {
            let acc = &later.acc[(first + i) * d..][..d];
            let (max, sum) = (later.max[first + i], later.sum[first + i]);
            if max == f32::NEG_INFINITY && sum == 0.0 {
                continue; // that query saw no key of the block
            }
            let state = PartialMut {
                max: &mut self.max[i],
                sum: &mut self.sum[i],
                acc: &mut self.acc[i * d..][..d],
            };
            // SAFETY: the table exists only where the CPU has its features; both are `d` long.
            unsafe { (kernels.merge)(Partial { max, sum, acc }, state) }
        }
    }

    /// The attention of query `i`, `[head_dim]`; zeros when it saw no key.
    pub fn finish(&self, i: usize, out: &mut [f32]) {
        let inverse = if self.sum[i] > 0.0 || self.sum[i].is_nan() {
            1.0 / self.sum[i]
        } else {
            0.0
        };
        for (o, a) in out
            .iter_mut()
            .zip(&self.acc[i * self.head_dim..][..self.head_dim])
        {
            *o = a * inverse;
        }
    }
}

impl Kernels {
    /// Merges one block of keys and values into the state of its queries.
    /// # Panics
    /// When the shapes do not fit.
    pub fn attend(&self, task: AttentionTask<'_>, state: &mut AttentionState) {
        let d = state.head_dim;
        let n = task.visible.len();
        assert!(
            d > 0 && task.values.len().is_multiple_of(d),
            "{} value elements in heads of {d}",
            task.values.len()
        );
        let keys = task.values.len() / d;
        let padded = keys.next_multiple_of(KEY_PANEL);
        assert_eq!(
            task.keys.len(),
            padded * d,
            "keys in whole panels, and values"
        );
        assert_eq!(task.queries.len(), n * d, "{n} queries of {d}");
        let rows = task.first..task.first + n;
        assert!(
            rows.end <= state.len(),
            "queries {rows:?} of {}",
            state.len()
        );
        for r in task.visible {
            assert!(
                r.start <= r.end && r.end <= keys,
                "visible {r:?} of {keys} keys"
            );
        }
        let width = d.next_multiple_of(KEY_PANEL);
        state.scratch.resize(GROUP * (padded + width), 0.0);
        let (scores, block) = state.scratch.split_at_mut(GROUP * padded);
        let s = StateMut {
            max: &mut state.max[rows.clone()],
            sum: &mut state.sum[rows.clone()],
            acc: &mut state.acc[rows.start * d..rows.end * d],
            scores,
            block,
        };
        let (queries, visible) = (task.queries, task.visible);
        let scale = task.scale;
        let then = task.then.map(|cached| cached.spans());
        macro_rules! attend {
            ($kernel:expr, $keys:expr, $values:expr) => {{
                let block = Block {
                    head_dim: d,
                    keys: $keys,
                    values: $values,
                    scale,
                    then,
                };
                // SAFETY: the table exists only where the CPU has its features; shapes are checked above.
                unsafe { $kernel(block, queries, visible, s) }
            }};
        }
        use Elements::{Bf16, F16, F32};
        match (task.keys, task.values) {
            (Cached::Floats(F32(k)), Cached::Floats(F32(v))) => attend!((self.attend_f32), k, v),
            (Cached::Floats(F16(k)), Cached::Floats(F16(v))) => attend!((self.attend_f16), k, v),
            (Cached::Floats(Bf16(k)), Cached::Floats(Bf16(v))) => attend!((self.attend_bf16), k, v),
            (
                Cached::I8 {
                    quants: k,
                    steps: key_steps,
                },
                Cached::I8 {
                    quants: v,
                    steps: value_steps,
                },
            ) => {
                assert!(
                    d.is_multiple_of(2) && keys.is_multiple_of(2) && keys <= MOST_KEYS,
                    "{keys} keys of {d} bytes in pairs, at most {MOST_KEYS}"
                );
                assert_eq!(key_steps.len(), padded, "steps of the keys");
                assert_eq!(value_steps.len(), padded, "steps of the values");
                let block = BlockI8 {
                    head_dim: d,
                    keys: k.as_chunks().0,
                    values: v.as_chunks().0,
                    key_steps,
                    value_steps,
                    scale,
                    then,
                };
                state.integers.resize(GROUP * (width + padded), 0);
                let (q, weights) = state.integers.split_at_mut(GROUP * width);
                let integers = IntegersMut {
                    queries: q,
                    weights,
                };
                // SAFETY: as above; heads are even, and the steps are as many as the keys in panels.
                unsafe { (self.attend_i8)(block, queries, visible, s, integers) }
            }
            (k, v) => panic!("keys {k:?} and values {v:?} are stored differently"),
        }
    }
}
