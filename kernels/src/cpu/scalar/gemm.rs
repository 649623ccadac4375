//! The definition of the GEMMs.

use super::{Element, dot};
use crate::view::ColsMut;
use phidias_quant::activations::Activations;
use phidias_quant::packed::{LINE, PANEL_ROWS};
use phidias_quant::{Format, Packed};
use std::ops::Range;

/// The inner products of 16 weight rows with four columns of one row of activations, added to `sums`.
#[inline(always)]
fn line(sums: &mut [i32; PANEL_ROWS], line: [u8; LINE], a: [i8; 4]) {
    for r in 0..PANEL_ROWS {
        for j in 0..4 {
            sums[r] += i32::from(line[4 * r + j]) * i32::from(a[j]);
        }
    }
}

/// One block of a panel: 16 integer inner products of 32 columns.
type Sums<const LINES: usize> = fn(lines: &[[u8; LINE]; LINES], a: &[[i8; 4]]) -> [i32; PANEL_ROWS];

fn block_q4(lines: &[[u8; LINE]; 4], a: &[[i8; 4]]) -> [i32; PANEL_ROWS] {
    let mut sums = [0; PANEL_ROWS];
    for (g, &bytes) in lines.iter().enumerate() {
        line(&mut sums, bytes.map(|b| b & 15), a[g]);
        line(&mut sums, bytes.map(|b| b >> 4), a[g + 4]);
    }
    sums
}

fn block_q8(lines: &[[u8; LINE]; 8], a: &[[i8; 4]]) -> [i32; PANEL_ROWS] {
    let mut sums = [0; PANEL_ROWS];
    for (&bytes, &a) in lines.iter().zip(a) {
        line(&mut sums, bytes, a);
    }
    sums
}

#[inline(always)]
fn gemm<const LINES: usize>(
    sums: Sums<LINES>,
    format: Format,
    w: Packed<'_>,
    panels: Range<usize>,
    x: &Activations,
    mut y: ColsMut<'_>,
) {
    for (p, panel) in panels.map(|p| w.panel(p)).enumerate() {
        for t in 0..x.rows() {
            let mut acc = [0.0f32; PANEL_ROWS];
            for b in 0..x.blocks() {
                let a = x.block(t, b);
                let block = panel.block(b);
                let sums = sums(block.quants, a.quants.as_chunks().0);
                let zero = format.zero() * a.sum;
                for r in 0..PANEL_ROWS {
                    let weights = block.scales[r].widen();
                    acc[r] += (sums[r] - zero) as f32 * a.scale * weights;
                }
            }
            let y = y.row(t);
            let cols = (y.len() - p * PANEL_ROWS).min(PANEL_ROWS);
            y[p * PANEL_ROWS..][..cols].copy_from_slice(&acc[..cols]);
        }
    }
}

pub(super) fn gemm_q4(w: Packed<'_>, panels: Range<usize>, x: &Activations, y: ColsMut<'_>) {
    gemm(block_q4, Format::Q4, w, panels, x, y);
}

pub(super) fn gemm_q8(w: Packed<'_>, panels: Range<usize>, x: &Activations, y: ColsMut<'_>) {
    gemm(block_q8, Format::Q8, w, panels, x, y);
}

pub(super) fn gemm_dense<T: Element>(w: &[T], cols: usize, x: &[f32], mut y: ColsMut<'_>) {
    for r in 0..y.cols() {
        let w = &w[r * cols..][..cols];
        for t in 0..y.rows() {
            y.row(t)[r] = dot(w, &x[t * cols..][..cols]);
        }
    }
}
