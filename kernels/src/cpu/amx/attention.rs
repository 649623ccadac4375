//! Attention of many queries over a cache of bytes, in tiles; maths and layout in `attention.rs`.
//!
//! ```text
//! Maths   a 16-bit integer, of a query or a weight, is 256 h + l with bytes h, signed, and l, not; so a sum of
//!         its products with bytes is 256 times that of h and that of l, and each of these is `tdpbssd` and `tdpbusd`
//! Layout  of tiles, 16 lines of 64 bytes:
//!         16 queries or their weights, 64 elements or keys   line q | h, or l, of query q |
//!         64 elements of 16 keys       line i | elements 4i .. 4i + 3 of key 0, of key 1 ... |
//!         64 keys, 16 elements         line i | keys 4i .. 4i + 3 in element 0, in element 1 ... |
//! 1. Keys and values of a block are put into tiles once for all queries, a line by one permutation of pairs.
//! 2. Sixteen queries at a time go all the way: what they have, scores and weights too, stays in the first-level cache, and
//!    only the tiles of keys and values come from the second.
//! 3. Four products are on their way: h and l times two columns. What they give is looked at while the next ones are
//!    made.
//! Work    16 x 16 x 64 multiply-adds an instruction, 16 cycles, of which each takes two
//! Limit   what is computed in floats: measured, 64 queries and heads of 96, the softmax takes 0.23 of the time,
//!         rounding the weights 0.17, merging 0.08, queries 0.05, and products with what is taken of them 0.3
//! Exact   integers, so all results are those of AVX-512, bit for bit
//! ```

use super::tile::{Bytes, Integers, Line, ROWS, Tiles};
use crate::cpu::attention::{BlockI8, IntegersMut, StateMut};
use crate::cpu::avx512::lanes::Zmm;
use crate::cpu::vector::attention::{hull, merge_rows, softmax};
use crate::cpu::vector::attention_i8::{quantize, weigh};
use crate::cpu::vector::{LANES, Lanes};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

const _: () = assert!(LANES == ROWS);

/// Fewer queries go the way of AVX-512.
const FEWEST: usize = 14;
/// Columns of the right factor that meet the left one at once.
const PAIR: usize = 2;
/// Bytes in a line of a tile.
const BYTES: usize = 64;
/// Floats between the rows of scores, so that not all of them are in a few sets of the cache.
const GAP: usize = LANES;

/// Bytes that a thread keeps after heads of 128 elements and blocks of 256 keys, the largest of the models.
pub(super) const SCRATCH_BYTES: usize = scratch_bytes(128, 256);

/// The same for others, whole sixteens and sixty-fours.
const fn scratch_bytes(head_dim: usize, keys: usize) -> usize {
    let (steps, key_steps) = (head_dim.div_ceil(BYTES), keys / BYTES);
    let tiles = keys / LANES * steps + head_dim / LANES * key_steps;
    let left = if steps > key_steps { steps } else { key_steps };
    let floats = ROWS * (keys + GAP + head_dim);
    (tiles + 2 * left) * size_of::<Bytes>()
        + left * BYTES * size_of::<i16>()
        + floats * size_of::<f32>()
}

const NO_BYTES: Bytes = [Line([0; BYTES]); ROWS];
const NO_INTEGERS: Integers = [Line([0; ROWS]); ROWS];

/// What a thread converts to, and what comes of it. `steps` are sixty-fours of what is summed, elements or keys.
#[derive(Default)]
struct Scratch {
    /// `[panels][steps]`
    keys: Vec<Bytes>,
    /// `[columns][steps]`
    values: Vec<Bytes>,
    /// Queries, then weights: `[steps]`, of each h and l
    left: Vec<[Bytes; 2]>,
    /// One query, or its weights
    integers: Vec<i16>,
    /// `[16][keys, whole steps, and a gap]`
    scores: Vec<f32>,
    /// `[16][head_dim, whole sixteens]`
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Makes `v` at least so long.
fn at_least<T: Clone>(v: &mut Vec<T>, len: usize, fill: T) {
    if v.len() < len {
        v.resize(len, fill);
    }
}

/// An expression of intrinsics of AVX-512 F, BW and VL.
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: the contract of `crate::cpu::vector`: the features are there; what is read and written lies inside of
        // the arrays that the references are of.
        unsafe { $e }
    };
}

/// The bytes of 64 integers, which are line `q` of both tiles.
#[inline(always)]
fn split(integers: &[i16; BYTES], q: usize, [high, low]: &mut [Bytes; 2]) {
    let (halves, _) = integers.as_chunks::<{ BYTES / 2 }>();
    for (i, half) in halves.iter().enumerate() {
        avx512!({
            let x = _mm512_loadu_si512(half.as_ptr().cast());
            let high = high[q].0.as_mut_ptr().add(i * BYTES / 2);
            let low = low[q].0.as_mut_ptr().add(i * BYTES / 2);
            _mm256_store_si256(high.cast(), _mm512_cvtepi16_epi8(_mm512_srai_epi16::<8>(x)));
            _mm256_store_si256(low.cast(), _mm512_cvtepi16_epi8(x));
        });
    }
}

/// Two rows of pairs as rows of four.
#[inline(always)]
fn fours([first, second]: [&[[i8; 2]; LANES]; 2], to: &mut Line<[u8; BYTES]>) {
    avx512!({
        let first = _mm256_loadu_si256(first.as_ptr().cast());
        let second = _mm256_loadu_si256(second.as_ptr().cast());
        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
        // Word 2 i is pair i of the first row, word 2 i + 1 of the second, 16 words further on.
        let low = _mm512_cvtepu16_epi32(_mm256_setr_epi16(
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
        ));
        let high = _mm512_slli_epi32::<16>(_mm512_add_epi32(low, _mm512_set1_epi32(16)));
        let fours = _mm512_permutexvar_epi16(_mm512_or_si512(low, high), both);
        _mm512_store_si512(to.0.as_mut_ptr().cast(), fours);
    });
}

/// A panel of keys in tiles.
#[inline(always)]
fn keys(panel: &[[[i8; 2]; LANES]], to: &mut [Bytes]) {
    let none = [[0; 2]; LANES];
    for (rows, to) in panel.chunks(BYTES / 2).zip(to) {
        if let Some(rows) = rows.first_chunk::<{ BYTES / 2 }>() {
            for (line, to) in to.iter_mut().enumerate() {
                fours([&rows[2 * line], &rows[2 * line + 1]], to);
            }
            continue;
        }
        for (line, to) in to.iter_mut().enumerate() {
            let row = |i: usize| rows.get(i).unwrap_or(&none);
            fours([row(2 * line), row(2 * line + 1)], to);
        }
    }
}

/// Sixteen elements, from `column` on, of 64 values, `[32][head_dim][2]`, in a tile; there may be fewer of both.
#[inline(always)]
fn values(rows: &[[i8; 2]], head_dim: usize, column: usize, to: &mut Bytes) {
    let d = head_dim;
    let all = BYTES / 2 * d;
    if rows.len() >= all && column + LANES <= d {
        let rows = &rows[..all];
        let row = |i: usize| {
            let row = &rows[i * d + column..][..LANES];
            row.first_chunk().expect("sixteen")
        };
        for (line, to) in to.iter_mut().enumerate() {
            fours([row(2 * line), row(2 * line + 1)], to);
        }
        return;
    }
    for (line, to) in to.iter_mut().enumerate() {
        let row = |i: usize| {
            let mut row = [[0; 2]; LANES];
            if let Some(from) = rows.get(i * d + column..(i + 1) * d) {
                let from = &from[..from.len().min(LANES)];
                row[..from.len()].copy_from_slice(from);
            }
            row
        };
        fours([&row(2 * line), &row(2 * line + 1)], to);
    }
}

/// The products of h and of l, of `left`, with the columns `some` of `right`, each of as many steps from
/// `first` on; `take` gets them column by column.
#[inline(always)]
fn multiply(
    left: &[[Bytes; 2]],
    right: &[Bytes],
    (some, of_column, first): (Range<usize>, usize, usize),
    tiles: &Tiles,
    mut take: impl FnMut(usize, [&Integers; 2]),
) {
    // h times both columns, then l.
    let mut stages = [NO_INTEGERS; 2 * PAIR];
    let mut before = None;
    let mut column = some.start;
    loop {
        let there = column < some.end;
        if there {
            let steps = |column: usize| &right[column * of_column + first..][..left.len()];
            let other = steps((column + 1).min(some.end - 1));
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            tiles.zero::<3>();
            for (([h, l], a), b) in left.iter().zip(steps(column)).zip(other) {
                tiles.load::<4>(h);
                tiles.load::<5>(l);
                tiles.load::<6>(a);
                tiles.load::<7>(b);
                tiles.add_signed::<0, 4, 6>();
                tiles.add_signed::<1, 4, 7>();
                tiles.add_unsigned::<2, 5, 6>();
                tiles.add_unsigned::<3, 5, 7>();
            }
        }
        // What was stored before is looked at while these are on their way.
        if let Some(column) = before {
            let [a, b, c, d] = &stages;
            for (i, sums) in [[a, c], [b, d]].into_iter().enumerate() {
                if column + i < some.end {
                    take(column + i, sums);
                }
            }
        }
        if !there {
            return;
        }
        let [a, b, c, d] = &mut stages;
        tiles.store::<0>(a);
        tiles.store::<1>(b);
        tiles.store::<2>(c);
        tiles.store::<3>(d);
        before = Some(column);
        column += PAIR;
    }
}

/// The sums of query `q`, rounded.
#[inline(always)]
fn of_query([high, low]: [&Integers; 2], q: usize) -> Zmm {
    Zmm(avx512!({
        let high = _mm512_load_si512(high[q].0.as_ptr().cast());
        let low = _mm512_load_si512(low[q].0.as_ptr().cast());
        _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), low))
    }))
}

/// Sixteen queries or fewer, the first of which is number `first` of the state.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn sixteen(
    block: BlockI8<'_>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: &mut StateMut<'_>,
    first: usize,
    (scratch, tiles): (&mut Scratch, &Tiles),
) {
    let d = block.head_dim;
    let Some(seen) = hull(visible) else {
        return;
    };
    let [steps, key_steps] = [d, block.key_steps.len()].map(|n| n.div_ceil(BYTES));
    let width = d.next_multiple_of(LANES);
    let stride = key_steps * BYTES + GAP;
    let Scratch {
        left,
        integers,
        scores,
        sums,
        ..
    } = scratch;

    // Lines of queries that are not there keep what they had; nobody looks at their products.
    let mut factors = [0.0; ROWS];
    let query = &mut integers[..steps * BYTES];
    query[width..].fill(0);
    for (q, floats) in queries.chunks_exact(d).enumerate() {
        factors[q] = quantize::<Zmm>(floats, &mut query[..width]) * block.scale;
        for (integers, tiles) in query.as_chunks().0.iter().zip(left.iter_mut()) {
            split(integers, q, tiles);
        }
    }
    let panels = seen.start / LANES..seen.end.div_ceil(LANES);
    let of_panel = (panels.clone(), steps, 0);
    let (of_keys, _) = block.key_steps.as_chunks();
    multiply(
        &left[..steps],
        &scratch.keys,
        of_panel,
        tiles,
        |panel, sums| {
            let of_keys = Zmm::load(&of_keys[panel]);
            for (q, row) in scores
                .chunks_exact_mut(stride)
                .take(visible.len())
                .enumerate()
            {
                let s = of_query(sums, q).mul(Zmm::splat(factors[q])).mul(of_keys);
                s.store(&mut row.as_chunks_mut().0[panel]);
            }
        },
    );

    let mut stats = [(f32::NEG_INFINITY, 0.0); ROWS];
    let used = seen.start / BYTES..seen.end.div_ceil(BYTES);
    let weights = &mut integers[..key_steps * BYTES];
    for (q, seen) in visible.iter().enumerate() {
        let row = &mut scores[q * stride..][..stride];
        let panels = used.start * (BYTES / LANES)..used.end * (BYTES / LANES);
        if seen.is_empty() {
            weights.fill(0);
        } else {
            stats[q] = softmax::<Zmm>(row, seen);
            factors[q] = weigh::<Zmm>(row, seen, block.value_steps, panels, weights);
        }
        for (integers, tiles) in weights.as_chunks().0[used.clone()]
            .iter()
            .zip(left.iter_mut())
        {
            split(integers, q, tiles);
        }
    }
    let of_column = (0..width / LANES, key_steps, used.start);
    let left = &left[..used.len()];
    multiply(
        left,
        &scratch.values,
        of_column,
        tiles,
        |column, of_column| {
            for (q, row) in sums.chunks_exact_mut(width).take(visible.len()).enumerate() {
                let weighted = of_query(of_column, q).mul(Zmm::splat(factors[q]));
                weighted.store(&mut row.as_chunks_mut().0[column]);
            }
        },
    );
    let rows = sums.chunks_exact(width);
    merge_rows::<Zmm>(
        visible, &stats, rows, first, state.max, state.sum, state.acc,
    );
}

/// Puts what the queries see into tiles, and makes room for the rest.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn prepare(block: BlockI8<'_>, seen: Range<usize>, scratch: &mut Scratch) {
    let d = block.head_dim;
    let [steps, key_steps] = [d, block.key_steps.len()].map(|n| n.div_ceil(BYTES));
    let width = d.next_multiple_of(LANES);
    at_least(&mut scratch.left, steps.max(key_steps), [NO_BYTES; 2]);
    at_least(&mut scratch.integers, steps.max(key_steps) * BYTES, 0);
    at_least(&mut scratch.scores, ROWS * (key_steps * BYTES + GAP), 0.0);
    at_least(&mut scratch.sums, ROWS * width, 0.0);

    let panels = block.key_steps.len() / LANES;
    at_least(&mut scratch.keys, panels * steps, NO_BYTES);
    let rows = block.keys.as_chunks().0.chunks_exact(d / 2);
    let tiles = scratch.keys.chunks_exact_mut(steps);
    let of_seen = seen.start / LANES..seen.end.div_ceil(LANES);
    for (panel, tiles) in rows.zip(tiles).skip(of_seen.start).take(of_seen.len()) {
        keys(panel, tiles);
    }
    let columns = width / LANES;
    at_least(&mut scratch.values, columns * key_steps, NO_BYTES);
    for step in seen.start / BYTES..seen.end.div_ceil(BYTES) {
        let rows = &block.values[step * BYTES / 2 * d..];
        for column in 0..columns {
            let tile = &mut scratch.values[column * key_steps + step];
            values(rows, d, column * LANES, tile);
        }
    }
}

/// One block of keys for all queries.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn attend(
    block: BlockI8<'_>,
    queries: &[f32],
    visible: &[Range<usize>],
    mut state: StateMut<'_>,
    integers: IntegersMut<'_>,
) {
    let d = block.head_dim;
    if visible.len() < FEWEST {
        let few = crate::cpu::avx512::KERNELS.attend_i8;
        // SAFETY: the contract is the same, and this table's features include those.
        return unsafe { few(block, queries, visible, state, integers) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: the table exists only where tiles are available.
        let tiles = unsafe { Tiles::take() };
        let Some(seen) = hull(visible) else {
            return;
        };
        prepare(block, seen, scratch);
        let groups = queries.chunks(ROWS * d).zip(visible.chunks(ROWS));
        for (i, (queries, visible)) in groups.enumerate() {
            let with = (&mut *scratch, &tiles);
            sixteen(block, queries, visible, &mut state, i * ROWS, with);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{AttentionState, AttentionTask, Cached, Isa, Kernels, THEN};

    #[test]
    fn scratch_is_as_large_as_the_table_says() {
        let Some(kernels) = Kernels::for_isa(Isa::Amx) else {
            return; // the suite says so
        };
        for (d, keys) in [(96, 256), (128, 256), (64, 64)] {
            let (quants, steps) = (vec![1; keys * d], vec![1.0; keys]);
            let cached = Cached::I8 {
                quants: &quants,
                steps: &steps,
            };
            let mut state = AttentionState::default();
            state.reset(ROWS, d);
            let task = AttentionTask {
                first: 0,
                queries: &vec![1.0; ROWS * d],
                visible: &vec![0..keys; ROWS],
                keys: cached,
                values: cached,
                scale: 1.0,
                then: [Cached::default(); THEN],
            };
            SCRATCH.with_borrow_mut(|scratch| *scratch = Scratch::default());
            kernels.attend(task, &mut state);
            SCRATCH.with_borrow(|scratch| {
                let bytes = size_of_val(&scratch.keys[..])
                    + size_of_val(&scratch.values[..])
                    + size_of_val(&scratch.left[..])
                    + size_of_val(&scratch.integers[..])
                    + size_of_val(&scratch.scores[..])
                    + size_of_val(&scratch.sums[..]);
                assert_eq!(bytes, scratch_bytes(d, keys), "{keys} keys of {d}");
                assert!(bytes <= SCRATCH_BYTES, "{bytes}");
            });
        }
    }
}
