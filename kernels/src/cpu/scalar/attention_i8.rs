//! The definition of attention on one block of keys and values in bytes.

use super::super::attention::{
    BlockI8, IntegersMut, KEY_PANEL, MOST, Partial, PartialMut, StateMut, most_of_query, step,
};
use super::attention::merge;
use super::{LANES, fold};
use std::ops::Range;

pub(super) fn attend(
    block: BlockI8<'_>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
    integers: IntegersMut<'_>,
) {
    let d = block.head_dim;
    for (i, (q, seen)) in queries.chunks_exact(d).zip(visible).enumerate() {
        if seen.is_empty() {
            continue;
        }
        let query = &mut integers.queries[..d];
        let factor = quantize(q, most_of_query(d), query) * block.scale;
        let mut max = f32::NEG_INFINITY;
        for j in seen.clone() {
            let panel = &block.keys[j / KEY_PANEL * KEY_PANEL * (d / 2)..];
            let mut dot = 0;
            for e in 0..d {
                let key = panel[e / 2 * KEY_PANEL + j % KEY_PANEL][e % 2];
                dot += i32::from(query[e]) * i32::from(key);
            }
            state.scores[j] = dot as f32 * factor * block.key_steps[j];
            max = max.max(state.scores[j]);
        }
        let mut sums = [0.0; LANES];
        for j in seen.clone() {
            let weight = (state.scores[j] - max).exp();
            sums[j % LANES] += weight;
            state.scores[j] = weight * block.value_steps[j];
        }
        let weights = &mut integers.weights[..seen.len()];
        let step = quantize(&state.scores[seen.clone()], MOST, weights);
        let acc = &mut state.block[..d];
        for (e, a) in acc.iter_mut().enumerate() {
            let mut sum = 0;
            for (j, weight) in seen.clone().zip(&*weights) {
                sum += i32::from(*weight) * i32::from(block.values[j / 2 * d + e][j % 2]);
            }
            *a = sum as f32 * step;
        }
        let sum = fold(sums);
        let into = PartialMut {
            max: &mut state.max[i],
            sum: &mut state.sum[i],
            acc: &mut state.acc[i * d..][..d],
        };
        merge(Partial { max, sum, acc }, into);
    }
}

/// Values as integers up to `most`; the step of them.
fn quantize(values: &[f32], most: i16, out: &mut [i16]) -> f32 {
    let amax = match values.iter().all(|v| v.is_finite()) {
        true => values.iter().fold(0.0f32, |m, v| m.max(v.abs())),
        false => f32::NAN,
    };
    let step = step(amax, most);
    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
    for (o, v) in out.iter_mut().zip(values) {
        // What is not finite becomes zero.
        *o = phidias_quant::round(v * inverse) as i16;
    }
    step
}
