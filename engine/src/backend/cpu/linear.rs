//! Matrices times activations, alone, side by side, and gated.

use super::{CpuOps, GateUp, Input, InputKind, add, assert_columns};
use crate::pool::{Cut, PIECES};
use crate::tensor::{Buffer, Linear, Matrix, MatrixView};
use phidias_kernels::cpu::Kernels;
use phidias_kernels::view::ColsMut;
use phidias_quant::BLOCK;
use phidias_quant::activations::TILE;
use phidias_quant::packed::PANEL_ROWS;
use std::ops::Range;

/// Panels that many tokens meet together at least: not all that the kernel wishes for, so that the threads
/// end together.
fn part(kernels: &Kernels) -> usize {
    kernels.panels_a_call().div_ceil(4)
}

impl GateUp {
    /// Outputs that are computed before the gate is applied.
    pub(super) fn rows_at_once(kernels: &Kernels, tokens: usize) -> usize {
        // A few tokens wait for memory, and each change to the other projection begins a run anew.
        if tokens <= TILE {
            8 * PANEL_ROWS
        } else {
            2 * part(kernels) * PANEL_ROWS
        }
    }

    /// Outputs `out` for all rows of `x`, [`GateUp::rows_at_once`] at a time, so that the projections stay in the
    /// cache; `y` is `[tokens, out.len()]`.
    pub(super) fn compute(
        &self,
        kernels: &Kernels,
        out: Range<usize>,
        x: &Input,
        mut y: ColsMut<'_>,
    ) {
        let n = x.rows();
        let rows = Self::rows_at_once(kernels, n);
        let mut scratch = vec![0.0; 2 * n * rows.min(out.len())];
        for first in out.clone().step_by(rows) {
            let width = rows.min(out.end - first);
            let scratch = &mut scratch[..2 * n * width];
            let column = first - out.start;
            let (gate, up) = match self {
                Self::Interleaved { both, limit } => {
                    let rows = 2 * first..2 * (first + width);
                    multiply(kernels, both, rows, x, ColsMut::new(scratch, n, 2 * width));
                    for (t, row) in scratch.chunks_exact(2 * width).enumerate() {
                        kernels.gegelu(row, *limit, &mut y.row(t)[column..][..width]);
                    }
                    continue;
                }
                Self::Pair { gate, up } => ((gate, first), (up, first)),
                Self::Stacked(both) => ((both, first), (both, self.inner() + first)),
            };
            let (left, right) = scratch.split_at_mut(n * width);
            let of = |first: usize| first..first + width;
            multiply(kernels, gate.0, of(gate.1), x, ColsMut::new(left, n, width));
            multiply(kernels, up.0, of(up.1), x, ColsMut::new(right, n, width));
            let rows = left.chunks_exact(width).zip(right.chunks_exact(width));
            for (t, (gate, up)) in rows.enumerate() {
                kernels.silu_mul(gate, up, &mut y.row(t)[column..][..width]);
            }
        }
    }

    /// Outputs `out` of a row of both projections, `[2 * inner]`.
    fn activate(&self, kernels: &Kernels, row: &[f32], out: Range<usize>, y: &mut [f32]) {
        if let Self::Interleaved { limit, .. } = self {
            kernels.gegelu(&row[2 * out.start..2 * out.end], *limit, y);
        } else {
            let (gate, up) = row.split_at(self.inner());
            kernels.silu_mul(&gate[out.clone()], &up[out], y);
        }
    }

    /// Whether any panels of its outputs can be computed alone: the rows of both begin with one.
    fn divides(&self) -> bool {
        match self {
            Self::Stacked(_) => self.inner().is_multiple_of(PANEL_ROWS),
            Self::Pair { .. } | Self::Interleaved { .. } => true,
        }
    }
}

/// Rows of `inner` columns that [`CpuOps::gated_input`] works with, in a session that computes up to `tokens`
/// tokens together.
#[must_use]
pub fn gated_rows(tokens: usize, inner: usize) -> usize {
    let both = if inner.is_multiple_of(PANEL_ROWS) {
        tokens.min(TILE)
    } else {
        tokens
    };
    tokens.max(both.saturating_mul(2))
}

impl CpuOps<'_> {
    /// `y = x w^T + bias`: `[tokens, cols]` to `[tokens, rows]`.
    /// # Panics
    /// When `x` was not made for a matrix like `w`.
    pub fn linear(&self, w: &Linear, x: &Input, y: &mut Buffer) {
        self.linears([w], x, y);
    }

    /// Several matrices of one input; their outputs lie side by side.
    /// # Panics
    /// When `x` was not made for matrices like those of `ws`.
    pub fn linears<'w>(&self, ws: impl IntoIterator<Item = &'w Linear>, x: &Input, y: &mut Buffer) {
        let ws: Vec<_> = ws.into_iter().collect();
        let widths: Vec<_> = ws.iter().map(|w| w.weight.rows()).collect();
        ws.iter().for_each(|w| assert_columns(x.cols, &w.weight));
        y.reshape(x.rows(), widths.iter().sum());
        let kernels = self.kernels;
        let unit = self.unit(x.rows(), widths.iter().sum());
        let cut = self.cut(x.rows(), &widths, unit);
        self.team.columns(y.columns_mut(), cut, |i, rows, y| {
            multiply(kernels, ws[i], rows, x, y);
        });
    }

    /// The gated projections of an MLP as `next` takes them: `[tokens, cols]` to `[tokens, inner]`; `gated` is
    /// to work with.
    /// # Panics
    /// When `x` was not made for a matrix like those of `w`, or one matrix has an odd number of rows.
    pub fn gated_input(
        &self,
        w: &GateUp,
        x: &Input,
        next: &Matrix,
        gated: &mut Buffer,
        out: &mut Input,
    ) {
        let kernels = self.kernels;
        assert_columns(x.cols, w.matrix());
        let (n, inner) = (x.rows(), w.inner());
        assert_columns(inner, next);
        if n > TILE && w.divides() {
            gated.reshape(n, inner);
            let widths = [inner];
            let cut = self.cut(n, &widths, GateUp::rows_at_once(kernels, n));
            (self.team).columns(gated.columns_mut(), cut, |_, rows, y| {
                w.compute(kernels, rows, x, y);
            });
            self.input(gated, next, out);
            return;
        }
        // A few tokens wait for memory, which is fastest where it is read as one run: all of the gate, then all
        // of the other projection.
        self.linears(w.linears(), x, gated);
        out.reshape(next, n);
        match &mut out.kind {
            InputKind::Floats(y) => {
                let widths = [inner];
                let cut = self.cut(n, &widths, BLOCK);
                self.team.columns(y.columns_mut(), cut, |_, cols, mut y| {
                    for t in 0..n {
                        w.activate(kernels, gated.row(t), cols.clone(), y.row(t));
                    }
                });
            }
            InputKind::Quantized(quantized) => {
                let mut parts = Vec::new();
                for (i, tile) in quantized.tiles_mut().enumerate() {
                    let blocks = self.share_of_blocks(inner);
                    let pieces = tile.pieces(blocks).enumerate();
                    parts.extend(pieces.map(|(p, tile)| (i * TILE, p * blocks * BLOCK, tile)));
                }
                self.team.each_part(parts, |(first, column, mut tile)| {
                    let width = (inner - column).min(tile.blocks() * BLOCK);
                    let mut row = vec![0.0; width];
                    for t in 0..tile.rows {
                        let cols = column..column + width;
                        w.activate(kernels, gated.row(first + t), cols, &mut row);
                        kernels.quantize(&row, &mut tile, t);
                    }
                });
            }
        }
    }

    /// How to divide the outputs of matrices of these widths.
    pub(super) fn cut<'w>(&self, tokens: usize, widths: &'w [usize], unit: usize) -> Cut<'w> {
        // Many tokens meet a part of the weights several times, which had better stay in the cache.
        let most = if tokens <= TILE {
            usize::MAX
        } else {
            let units: usize = widths.iter().map(|w| w.div_ceil(unit)).sum();
            let least = self.kernels.panels_a_call() * PANEL_ROWS / unit;
            units
                .div_ceil(PIECES * self.team.threads())
                .max(least.max(1))
        };
        Cut { widths, unit, most }
    }

    /// Weight rows, of `rows`, that a thread had better take together: whole panels, and some for every thread.
    pub(super) fn unit(&self, tokens: usize, rows: usize) -> usize {
        const EACH: usize = 4;
        if tokens <= TILE {
            return PANEL_ROWS;
        }
        let share = rows / PANEL_ROWS / (EACH * self.team.threads());
        // Where a call had better have several, two have more in common than one.
        let share = if share > 0 { share.max(2) } else { 1 };
        part(self.kernels).min(share) * PANEL_ROWS
    }

    /// Blocks of a row that one thread quantizes: not so few that handing them out takes longer.
    fn share_of_blocks(&self, cols: usize) -> usize {
        const FEWEST: usize = 16;
        (cols.div_ceil(BLOCK))
            .div_ceil(self.team.threads())
            .max(FEWEST)
    }
}

/// Divides the weight rows that make the columns of `y` in so many pieces of whole `unit`s.
pub(super) fn split(
    y: ColsMut<'_>,
    unit: usize,
    pieces: usize,
) -> Vec<(Range<usize>, ColsMut<'_>)> {
    let rows = y.cols();
    let units = rows.div_ceil(unit);
    let mut rest = y;
    let mut parts = Vec::with_capacity(pieces);
    for i in 0..pieces {
        let at = |i: usize| (units * i / pieces * unit).min(rows);
        let range = at(i)..at(i + 1);
        let (part, right) = rest.split_at(range.len());
        rest = right;
        parts.push((range, part));
    }
    parts
}

/// `y = x w^T + bias` for some rows of `w`, which begin with a panel if it is packed.
pub(super) fn multiply(
    kernels: &Kernels,
    w: &Linear,
    rows: Range<usize>,
    x: &Input,
    mut y: ColsMut<'_>,
) {
    match (w.weight.view(), &x.kind) {
        (MatrixView::Packed(packed), InputKind::Quantized(x)) => {
            let panels = rows.start / PANEL_ROWS..rows.end.div_ceil(PANEL_ROWS);
            kernels.gemm_packed(packed, panels, x, y.reborrow());
        }
        (MatrixView::Dense(dense), InputKind::Floats(x)) => {
            kernels.gemm_dense(dense, rows.clone(), x.data(), y.reborrow());
        }
        _ => panic!("activations made for a matrix of another kind"),
    }
    if let Some(bias) = &w.bias {
        for t in 0..y.rows() {
            add(y.row(t), &bias[rows.clone()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{buffer, matrix, packed};
    use super::*;
    use crate::backend::Cpu;
    use crate::pool::Pool;
    use std::sync::Arc;

    /// A few tokens, both projections as one run, give what they give among many, bit for bit: where the
    /// rows of `up` begin with a panel and where not, for every kind of gate and of matrix.
    #[test]
    fn few_tokens_are_gated_like_many() {
        let (hidden, many) = (40, 2 * TILE + 3);
        for (make, inner) in [
            (matrix as fn(usize, usize, usize) -> Linear, 24),
            (packed, 48),
            (packed, 40),
        ] {
            let gates = [
                GateUp::Stacked(make(2 * inner, hidden, 1)),
                GateUp::Pair {
                    gate: make(inner, hidden, 2),
                    up: make(inner, hidden, 3),
                },
                GateUp::Interleaved {
                    both: make(2 * inner, hidden, 4),
                    limit: 20.0,
                },
            ];
            for (w, next) in gates
                .iter()
                .flat_map(|w| [matrix(5, inner, 7), packed(16, inner, 7)].map(|next| (w, next)))
            {
                let run = |first: usize, n: usize, threads: usize| {
                    let pool = Arc::new(Pool::new(Some(threads)).unwrap());
                    let all = buffer(many, hidden, 9);
                    let mut x = Buffer::default();
                    x.reshape(n, hidden);
                    let rows = first * hidden..(first + n) * hidden;
                    x.data_mut().copy_from_slice(&all.data()[rows]);
                    let mut y = Buffer::default();
                    Cpu::new(Kernels::best(), pool).enter(|ops| {
                        let (mut input, mut gated, mut out) = Default::default();
                        ops.input(&x, w.matrix(), &mut input);
                        ops.gated_input(w, &input, &next.weight, &mut gated, &mut out);
                        ops.linear(&next, &out, &mut y);
                    });
                    y.data().to_vec()
                };
                let whole = run(0, many, 1);
                assert!(whole.iter().all(|v| v.is_finite()) && whole.iter().any(|v| *v != 0.0));
                let cols = next.weight.rows();
                assert_eq!(run(0, many, 3), whole);
                for (first, n) in [(0, 1), (5, 1), (2, 3), (9, TILE), (many - 1, 1)] {
                    let want = &whole[first * cols..(first + n) * cols];
                    for threads in [1, 3] {
                        assert_eq!(run(first, n, threads), want, "{n} from {first}, {threads}");
                    }
                }
            }
        }
    }
}
