//! The definition of attention on one block of keys.

use super::super::attention::{Block, KEY_PANEL, Partial, PartialMut, StateMut};
use super::{Element, LANES, fold};
use std::ops::Range;

pub(super) fn attend<T: Element>(
    block: Block<'_, T>,
    queries: &[f32],
    visible: &[Range<usize>],
    state: StateMut<'_>,
) {
    let d = block.head_dim;
    for (i, (q, seen)) in queries.chunks_exact(d).zip(visible).enumerate() {
        if seen.is_empty() {
            continue;
        }
        let mut max = f32::NEG_INFINITY;
        for j in seen.clone() {
            let panel = &block.keys[j / KEY_PANEL * KEY_PANEL * d..];
            let mut dot = 0.0;
            for e in 0..d {
                dot += q[e] * panel[e * KEY_PANEL + j % KEY_PANEL].widen();
            }
            state.scores[j] = dot * block.scale;
            max = max.max(state.scores[j]);
        }
        let mut sums = [0.0; LANES];
        let acc = &mut state.block[..d];
        acc.fill(0.0);
        for j in seen.clone() {
            let weight = (state.scores[j] - max).exp();
            sums[j % LANES] += weight;
            for (a, v) in acc.iter_mut().zip(&block.values[j * d..]) {
                *a += weight * v.widen();
            }
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

pub(super) fn merge(block: Partial<'_>, state: PartialMut<'_>) {
    let new = state.max.max(block.max);
    let (old, of_block) = ((*state.max - new).exp(), (block.max - new).exp());
    *state.max = new;
    *state.sum = *state.sum * old + block.sum * of_block;
    for (a, v) in state.acc.iter_mut().zip(block.acc) {
        *a = *a * old + v * of_block;
    }
}
