//! Whole operations on whole buffers: the seam between models and devices.
//!
//! A model calls these one after the other and never sees a thread or an instruction set. Every
//! result depends on its own row only, never on how the work was divided.

mod attention;
mod encoder;
mod experts;
mod linear;

pub use crate::mask::Mask;
pub use attention::Rotations;
pub use encoder::Activation;
pub use experts::{Expert, ExpertScratch, PICKS, Pick, Routes};
pub use linear::GateUp;
pub use phidias_kernels::heads::{HeadOrder, Heads};

use crate::pool::{Pool, Team};
use crate::tensor::{Buffer, Matrix, MatrixView};
use phidias_kernels::cpu::Kernels;
use phidias_quant::Format;
use phidias_quant::activations::{Activations, TILE};
use std::sync::Arc;

/// The CPU: a table of kernels and the threads to run them on.
#[derive(Debug)]
pub struct Cpu {
    kernels: &'static Kernels,
    pool: Arc<Pool>,
}

/// The operations, on a pool that was entered.
pub struct Ops<'t> {
    kernels: &'static Kernels,
    team: &'t Team<'t>,
}

/// Rows of activations as matrices of some format take them.
#[derive(Debug, Default)]
pub struct Input {
    cols: usize,
    kind: InputKind,
}

#[derive(Debug)]
enum InputKind {
    /// For matrices stored as floats.
    Floats(Buffer),
    /// For packed ones.
    Quantized(Activations),
}

impl Default for InputKind {
    fn default() -> Self {
        Self::Floats(Buffer::default())
    }
}

impl Input {
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        match &self.kind {
            InputKind::Floats(buffer) => buffer.rows(),
            InputKind::Quantized(quantized) => quantized.rows(),
        }
    }

    /// Bytes of a row of `cols` columns, for matrices in a packed format or stored as floats.
    #[must_use]
    pub fn bytes_per_row(format: Option<Format>, cols: usize) -> usize {
        match format {
            Some(_) => Activations::bytes_per_row(cols),
            None => cols * size_of::<f32>(),
        }
    }

    /// Makes room for `rows` rows as `w` takes them.
    fn reshape(&mut self, w: &Matrix, rows: usize) {
        self.cols = w.cols();
        match (w.view(), &mut self.kind) {
            (MatrixView::Dense(_), InputKind::Floats(buffer)) => buffer.reshape(rows, w.cols()),
            (MatrixView::Packed(packed), InputKind::Quantized(quantized)) => {
                quantized.reshape(rows, w.cols(), packed.layout().format().zero());
            }
            (MatrixView::Dense(_), kind) => {
                *kind = InputKind::Floats(Buffer::default());
                self.reshape(w, rows);
            }
            (MatrixView::Packed(_), kind) => {
                *kind = InputKind::Quantized(Activations::default());
                self.reshape(w, rows);
            }
        }
    }
}

/// How rows are normalised.
#[derive(Clone, Debug, PartialEq)]
pub enum Norm {
    /// `x / sqrt(mean of x^2 + eps) * weight`
    Rms {
        /// `[hidden]`
        weight: Vec<f32>,
        /// Epsilon.
        eps: f32,
    },
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`
    Layer {
        /// `[hidden]`
        weight: Vec<f32>,
        /// `[hidden]`
        bias: Vec<f32>,
        /// Epsilon.
        eps: f32,
    },
}

impl Norm {
    fn apply(&self, kernels: &Kernels, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Rms { weight, eps } => kernels.rms_norm(x, weight, *eps, y),
            Self::Layer { weight, bias, eps } => kernels.layer_norm(x, weight, bias, *eps, y),
        }
    }
}

impl Cpu {
    /// A device of these kernels and threads.
    #[must_use]
    pub fn new(kernels: &'static Kernels, pool: Arc<Pool>) -> Self {
        Self { kernels, pool }
    }

    /// Its threads.
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Its kernels.
    #[must_use]
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// Enters the pool for some operations.
    pub fn enter<R: Send>(&self, work: impl FnOnce(&Ops<'_>) -> R + Send) -> R {
        self.pool.enter(|team| {
            work(&Ops {
                kernels: self.kernels,
                team,
            })
        })
    }
}

impl Ops<'_> {
    /// `x[t] = multiplier * table[ids[t]]`
    /// # Panics
    /// When an id is not a row of the table: models check ids at their border.
    pub fn embed(&self, table: &Matrix, ids: &[u32], multiplier: f32, x: &mut Buffer) {
        x.reshape(ids.len(), table.cols());
        let parts = ids.iter().zip(x.data_mut().chunks_exact_mut(table.cols()));
        self.team.each_part(parts.collect(), |(&id, x)| {
            table.row(id as usize, x);
            if multiplier != 1.0 {
                x.iter_mut().for_each(|x| *x *= multiplier);
            }
        });
    }

    /// `x += branch`, and `y` the norm of each row of the sum: the sum is read while it is in the cache.
    /// # Panics
    /// When the shapes differ.
    pub fn add_norm(&self, x: &mut Buffer, branch: &Buffer, norm: &Norm, y: &mut Buffer) {
        let kernels = self.kernels;
        let cols = x.cols();
        assert_same_shape(x, branch);
        y.reshape(x.rows(), cols);
        let parts = (x.data_mut().chunks_exact_mut(cols))
            .zip(branch.data().chunks_exact(cols))
            .zip(y.data_mut().chunks_exact_mut(cols));
        self.team.each_part(parts.collect(), |((x, branch), y)| {
            add(x, branch);
            norm.apply(kernels, x, y);
        });
    }

    /// The same, with the norm as `w` takes it: a normalised row never leaves the first cache.
    /// # Panics
    /// When the shapes differ.
    pub fn add_norm_input(
        &self,
        x: &mut Buffer,
        branch: &Buffer,
        norm: &Norm,
        w: &Matrix,
        out: &mut Input,
    ) {
        let kernels = self.kernels;
        assert_columns(x.cols(), w);
        out.reshape(w, x.rows());
        match &mut out.kind {
            InputKind::Floats(y) => self.add_norm(x, branch, norm, y),
            InputKind::Quantized(quantized) => {
                let cols = x.cols();
                assert_same_shape(x, branch);
                let parts = (quantized.tiles_mut())
                    .zip(x.data_mut().chunks_mut(TILE * cols))
                    .zip(branch.data().chunks(TILE * cols));
                self.team
                    .each_part(parts.collect(), |((mut tile, x), branch)| {
                        let mut row = vec![0.0; cols];
                        let rows = x.chunks_exact_mut(cols).zip(branch.chunks_exact(cols));
                        for (r, (x, branch)) in rows.enumerate() {
                            add(x, branch);
                            norm.apply(kernels, x, &mut row);
                            kernels.quantize(&row, &mut tile, r);
                        }
                    });
            }
        }
    }

    /// Rows as `w` takes them.
    /// # Panics
    /// When `x` has not as many columns as `w`.
    pub fn input(&self, x: &Buffer, w: &Matrix, out: &mut Input) {
        let kernels = self.kernels;
        assert_columns(x.cols(), w);
        out.reshape(w, x.rows());
        match &mut out.kind {
            InputKind::Floats(buffer) => buffer.data_mut().copy_from_slice(x.data()),
            InputKind::Quantized(quantized) => {
                let parts = quantized.tiles_mut().zip(x.data().chunks(TILE * x.cols()));
                self.team.each_part(parts.collect(), |(mut tile, x_rows)| {
                    for (r, x) in x_rows.chunks_exact(x.cols()).enumerate() {
                        kernels.quantize(x, &mut tile, r);
                    }
                });
            }
        }
    }
}

/// `x += y`
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn assert_same_shape(x: &Buffer, y: &Buffer) {
    assert_eq!(
        (x.rows(), x.cols()),
        (y.rows(), y.cols()),
        "shapes of a sum"
    );
}

fn assert_columns(cols: usize, w: &Matrix) {
    assert_eq!(
        cols,
        w.cols(),
        "columns of the activations and of the weights"
    );
}
