//! Activations as signed bytes: what an int4 or int8 matrix is multiplied with.
//!
//! Each block of 32 values of a row gets its own f32 scale, `amax / 127`, so a row's result never
//! depends on the rows beside it. The sum of a block's bytes is kept with it: the kernels multiply
//! unsigned weights and take the weights' zero point out as `zero * sum`.

use crate::{BLOCK, round};

/// Rows of quantized activations. Columns are padded with zeros to whole blocks.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    rows: usize,
    blocks: usize,
    /// `[rows, blocks * 32]`
    quants: Vec<i8>,
    /// `[rows, blocks]`
    scales: Vec<f32>,
    /// `[rows, blocks]`, the sum of each block's `quants`
    sums: Vec<i32>,
}

/// One row of [`Activations`].
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// `[blocks * 32]`
    pub quants: &'a [i8],
    /// `[blocks]`
    pub scales: &'a [f32],
    /// `[blocks]`
    pub sums: &'a [i32],
}

/// One row of [`Activations`], to be filled.
#[derive(Debug)]
pub struct RowMut<'a> {
    /// `[blocks * 32]`
    pub quants: &'a mut [i8],
    /// `[blocks]`
    pub scales: &'a mut [f32],
    /// `[blocks]`
    pub sums: &'a mut [i32],
}

impl Activations {
    /// Makes room for `rows` rows of `cols` values; what was there is overwritten by the next use.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        self.rows = rows;
        self.blocks = cols.div_ceil(BLOCK);
        let blocks = rows * self.blocks;
        self.quants.resize(blocks * BLOCK, 0);
        self.scales.resize(blocks, 0.0);
        self.sums.resize(blocks, 0);
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Blocks in a row.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Row `i`.
    #[must_use]
    pub fn row(&self, i: usize) -> Row<'_> {
        let b = i * self.blocks..(i + 1) * self.blocks;
        Row {
            quants: &self.quants[b.start * BLOCK..b.end * BLOCK],
            scales: &self.scales[b.clone()],
            sums: &self.sums[b],
        }
    }

    /// The rows one after the other, each to be filled by [`quantize`] or a faster twin of it.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = RowMut<'_>> {
        let blocks = self.blocks.max(1);
        (self.quants.chunks_exact_mut(blocks * BLOCK))
            .zip(self.scales.chunks_exact_mut(blocks))
            .zip(self.sums.chunks_exact_mut(blocks))
            .map(|((quants, scales), sums)| RowMut {
                quants,
                scales,
                sums,
            })
    }
}

/// The definition: `scale = amax / 127`, `q = round(x / scale)`, ties to even.
///
/// A value that is not finite makes its block's scale NaN, so that it cannot pass unseen.
/// # Panics
/// When `x` does not fill `out`'s blocks (short only in the last one).
#[inline]
pub fn quantize(x: &[f32], out: RowMut<'_>) {
    assert_eq!(
        x.len().div_ceil(BLOCK),
        out.scales.len(),
        "blocks of the row"
    );
    for (b, values) in x.chunks(BLOCK).enumerate() {
        let mut block = [0.0; BLOCK];
        block[..values.len()].copy_from_slice(values);
        let amax = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let finite = block.iter().all(|v| v.is_finite());
        let inverse = if amax > 0.0 && finite {
            127.0 / amax
        } else {
            0.0
        };
        let quants = &mut out.quants[b * BLOCK..(b + 1) * BLOCK];
        let mut sum = 0;
        for (q, v) in quants.iter_mut().zip(block) {
            // Subnormal amax makes the inverse infinite or the product larger than 127.
            let r = round((v * inverse).clamp(-127.0, 127.0)) as i32;
            *q = r as i8;
            sum += r;
        }
        out.scales[b] = if finite { amax / 127.0 } else { f32::NAN };
        out.sums[b] = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip_is_within_half_a_step(x in prop::collection::vec(-100.0f32..100.0, 1..100)) {
            let mut act = Activations::default();
            act.reshape(1, x.len());
            quantize(&x, act.rows_mut().next().unwrap());
            let row = act.row(0);
            for (i, v) in x.iter().enumerate() {
                let scale = row.scales[i / BLOCK];
                prop_assert!((v - f32::from(row.quants[i]) * scale).abs() <= scale * 0.5001);
            }
            for (b, sum) in row.sums.iter().enumerate() {
                let direct: i32 = row.quants[b * BLOCK..][..BLOCK].iter().map(|q| i32::from(*q)).sum();
                prop_assert_eq!(*sum, direct);
            }
            prop_assert!(row.quants[x.len()..].iter().all(|q| *q == 0));
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        let mut act = Activations::default();
        act.reshape(1, 40);
        let mut x = [1.0; 40];
        for bad in [f32::NAN, f32::INFINITY] {
            x[3] = bad;
            quantize(&x, act.rows_mut().next().unwrap());
            assert!(act.row(0).scales[0].is_nan() && act.row(0).scales[1] > 0.0);
        }
    }

    #[test]
    fn subnormal_rows_stay_in_range() {
        let mut act = Activations::default();
        act.reshape(1, 32);
        quantize(&[f32::from_bits(1); 32], act.rows_mut().next().unwrap());
        assert!(act.row(0).quants.iter().all(|q| (-127..=127).contains(q)));
    }
}
