//! What the operations multiply and normalise with.

use crate::tensor::{Linear, Matrix};

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

/// An activation of single values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`
    QuickGelu,
    /// `x * Phi(x)`, Phi the distribution of the Gaussian: the exact form, by the error function.
    Gelu,
}

/// The gate and the up projection of an MLP, and how they are combined.
#[derive(Clone, Debug)]
pub enum GateUp {
    /// `up * silu(gate)`: the rows of one matrix, first the gate's, then as many of `up`.
    Stacked(Linear),
    /// `up * silu(gate)` of two matrices alike.
    Pair {
        /// `[inner, cols]`
        gate: Linear,
        /// `[inner, cols]`
        up: Linear,
    },
    /// GEGELU: even rows of one matrix are the gate, odd rows are linear.
    Interleaved {
        /// `[2 * inner, cols]`
        both: Linear,
        /// Largest magnitude that either may have.
        limit: f32,
    },
}

impl GateUp {
    /// A matrix that its input is made for.
    #[must_use]
    pub fn matrix(&self) -> &Matrix {
        match self {
            Self::Stacked(both) | Self::Interleaved { both, .. } => &both.weight,
            Self::Pair { gate, .. } => &gate.weight,
        }
    }

    /// All its matrices, with their biases.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (first, second) = match self {
            Self::Stacked(both) | Self::Interleaved { both, .. } => (both, None),
            Self::Pair { gate, up } => (gate, Some(up)),
        };
        std::iter::once(first).chain(second)
    }

    /// All its matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.linears().map(|linear| &linear.weight)
    }

    /// Outputs.
    #[must_use]
    pub fn inner(&self) -> usize {
        match self {
            Self::Stacked(both) | Self::Interleaved { both, .. } => both.weight.rows() / 2,
            Self::Pair { gate, .. } => gate.weight.rows(),
        }
    }
}

/// Experts that a token is given to.
pub const PICKS: usize = 2;

/// One expert: an MLP with a gate.
#[derive(Clone, Debug)]
pub struct Expert {
    /// `[hidden]` to `[inner]`; rows that a panel begins with, as two matrices always have.
    pub gate_up: GateUp,
    /// `[hidden, inner]`
    pub down_proj: Linear,
}

impl Expert {
    /// Its matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.gate_up.matrices().chain([&self.down_proj.weight])
    }

    /// Bytes that one pass over it reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.matrices().map(Matrix::bytes).sum()
    }
}

/// An expert that a token goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pick {
    /// Which one.
    pub expert: usize,
    /// Factor on its output.
    pub weight: f32,
}
