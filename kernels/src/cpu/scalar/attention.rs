//! The definition of attention on one block of keys.

use super::super::attention::StateMut;
use super::{Element, dot};
use std::ops::Range;

#[inline(always)]
pub(in crate::cpu) fn attend<T: Element>(
    queries: &[f32],
    visible: &[Range<usize>],
    keys: &[T],
    values: &[T],
    scale: f32,
    state: StateMut<'_>,
) {
    let d = state.block.len();
    for (i, (q, range)) in queries.chunks_exact(d).zip(visible).enumerate() {
        if range.is_empty() {
            continue;
        }
        let scores = &mut state.scores[range.clone()];
        let mut max = f32::NEG_INFINITY;
        for (s, k) in scores
            .iter_mut()
            .zip(keys[range.start * d..].chunks_exact(d))
        {
            *s = scale * dot(k, q);
            max = max.max(*s);
        }
        let mut sum = 0.0;
        state.block.fill(0.0);
        for (s, v) in scores.iter().zip(values[range.start * d..].chunks_exact(d)) {
            let p = (s - max).exp();
            sum += p;
            for (o, v) in state.block.iter_mut().zip(v) {
                *o += p * v.widen();
            }
        }
        let new = state.max[i].max(max);
        let (old_factor, block_factor) = ((state.max[i] - new).exp(), (max - new).exp());
        state.max[i] = new;
        state.sum[i] = state.sum[i] * old_factor + sum * block_factor;
        for (a, b) in state.acc[i * d..][..d].iter_mut().zip(&*state.block) {
            *a = *a * old_factor + b * block_factor;
        }
    }
}
