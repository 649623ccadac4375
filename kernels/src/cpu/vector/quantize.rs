//! Quantization of activations; the definition is [`phidias_quant::activations::quantize`], and the
//! bytes are the same. (No `map` over arrays of lanes here or beside: the library's is not always inlined,
//! and what is not inlined is compiled without the features.)

use super::{LANES, Lanes, padded};
use phidias_quant::BLOCK;
use phidias_quant::activations::{MAGIC, TileMut, step};

#[inline(always)]
fn block<L: Lanes>(values: &[f32; BLOCK], zero: i32, quants: &mut [i8; BLOCK]) -> (i32, f32) {
    let (halves, _) = values.as_chunks::<LANES>();
    let x = [L::load(&halves[0]), L::load(&halves[1])];
    let magnitude = [x[0].abs(), x[1].abs()];
    // A sum with a NaN is one, and magnitudes do not cancel; a maximum may pass over it.
    let sum = magnitude[0].add(magnitude[1]).sum();
    let scale = if sum.is_nan() {
        f32::NAN
    } else {
        step(magnitude[0].max(magnitude[1]).largest())
    };
    let magic = MAGIC * scale;
    if scale.is_nan() {
        quants.fill(0);
        return (magic.to_bits() as i32, magic);
    }
    let inverse = L::splat(1.0 / scale);
    let round = L::splat(MAGIC);
    let q = [
        x[0].mul(inverse).add(round).sub(round),
        x[1].mul(inverse).add(round).sub(round),
    ];
    let (halves, _) = quants.as_chunks_mut::<LANES>();
    q[0].store_i8(&mut halves[0]);
    q[1].store_i8(&mut halves[1]);
    // Sums of at most 32 * 127 are exact in f32.
    let sum = q[0].add(q[1]).sum() as i32;
    (magic.to_bits() as i32 - zero * sum, magic)
}

#[inline(always)]
pub(in crate::cpu) fn quantize<L: Lanes>(x: &[f32], tile: &mut TileMut<'_>, row: usize) {
    let (quants, _) = tile.quants.as_chunks_mut::<BLOCK>();
    let (blocks, rest) = x.as_chunks::<BLOCK>();
    let mut at = row;
    for values in blocks {
        (tile.starts[at], tile.magics[at]) = block::<L>(values, tile.zero, &mut quants[at]);
        at += tile.rows;
    }
    if !rest.is_empty() {
        let mut values = [0.0; BLOCK];
        let (first, second) = rest.split_at(rest.len().min(LANES));
        values[..LANES].copy_from_slice(&padded(first));
        values[LANES..].copy_from_slice(&padded(second));
        (tile.starts[at], tile.magics[at]) = block::<L>(&values, tile.zero, &mut quants[at]);
    }
}
