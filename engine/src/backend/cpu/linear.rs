//! Matrices times activations, alone, side by side, and gated.

use super::{CpuOps, GateUp, Input, InputKind, add, assert_columns};
use crate::tensor::{Buffer, Linear, MatrixView};
use phidias_kernels::cpu::Kernels;
use phidias_kernels::view::ColsMut;
use phidias_quant::activations::TILE;
use phidias_quant::packed::PANEL_ROWS;
use std::ops::Range;

impl GateUp {
    /// Outputs that are computed before the gate is applied.
    pub(super) fn rows_at_once(tokens: usize) -> usize {
        // A few tokens wait for memory, and each change to the other projection begins a run anew.
        if tokens <= TILE {
            8 * PANEL_ROWS
        } else {
            2 * PANEL_ROWS
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
        let rows = Self::rows_at_once(n);
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

    /// Whether any panels of its outputs can be computed alone: the rows of both begin with one.
    fn divides(&self) -> bool {
        match self {
            Self::Stacked(_) => self.inner().is_multiple_of(PANEL_ROWS),
            Self::Pair { .. } | Self::Interleaved { .. } => true,
        }
    }
}

impl CpuOps<'_> {
    /// `y = x w^T + bias`: `[tokens, cols]` to `[tokens, rows]`.
    /// # Panics
    /// When `x` was not made for a matrix like `w`.
    pub fn linear(&self, w: &Linear, x: &Input, y: &mut Buffer) {
        self.linears(std::slice::from_ref(w), x, y);
    }

    /// Several matrices of one input; their outputs lie side by side.
    /// # Panics
    /// When `x` was not made for matrices like those of `ws`.
    pub fn linears(&self, ws: &[Linear], x: &Input, y: &mut Buffer) {
        let kernels = self.kernels;
        let rows = |w: &Linear| w.weight.rows();
        y.reshape(x.rows(), ws.iter().map(rows).sum());
        let mut rest = y.columns_mut();
        let mut parts = Vec::new();
        for w in ws {
            assert_columns(x.cols, &w.weight);
            let (own, right) = rest.split_at(rows(w));
            rest = right;
            let pieces = self.split(own, PANEL_ROWS);
            parts.extend(pieces.into_iter().map(|(rows, y)| (w, rows, y)));
        }
        self.team
            .each_part(parts, |(w, rows, y)| multiply(kernels, w, rows, x, y));
    }

    /// The gated projections of an MLP: `[tokens, cols]` to `[tokens, inner]`.
    /// # Panics
    /// When `x` was not made for matrices like those of `w`, or one matrix has an odd number of rows.
    pub fn gated_linear(&self, w: &GateUp, x: &Input, y: &mut Buffer) {
        let kernels = self.kernels;
        assert_columns(x.cols, w.matrix());
        let (n, inner) = (x.rows(), w.inner());
        y.reshape(n, inner);
        if let GateUp::Stacked(both) = w
            && !w.divides()
        {
            // The rows of `up` do not begin with a panel: both at once, then the gate.
            let mut projected = Buffer::default();
            self.linear(both, x, &mut projected);
            let parts = (y.data_mut().chunks_exact_mut(inner))
                .zip(projected.data().chunks_exact(2 * inner));
            self.team.each_part(parts.collect(), |(y, row)| {
                let (gate, up) = row.split_at(inner);
                kernels.silu_mul(gate, up, y);
            });
            return;
        }
        let parts = self.split(y.columns_mut(), GateUp::rows_at_once(n));
        self.team
            .each_part(parts, |(rows, y)| w.compute(kernels, rows, x, y));
    }

    /// Divides the weight rows that make the columns of `y` in pieces of whole `unit`s.
    pub(super) fn split<'y>(
        &self,
        y: ColsMut<'y>,
        unit: usize,
    ) -> Vec<(Range<usize>, ColsMut<'y>)> {
        let pieces = self.team.pieces(y.cols().div_ceil(unit));
        split(y, unit, pieces)
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
