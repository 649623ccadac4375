//! Norms.

use phidias_engine::backend::{Input, Ops};
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::tensor::{Buffer, Matrix};

/// RMSNorm: `x / rms(x) * weight`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[hidden]`
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    /// Loads `name`, `[hidden]`.
    /// # Errors
    /// When the tensor is missing or of another shape.
    pub fn load(
        checkpoint: &Checkpoint,
        name: &str,
        hidden: usize,
        eps: f32,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            weight: checkpoint.vector(name, hidden)?,
            eps,
        })
    }

    /// `y = norm(x)`, both `[tokens, hidden]`.
    pub fn forward(&self, ops: &Ops<'_>, x: &Buffer, y: &mut Buffer) {
        ops.rms_norm(x, &self.weight, self.eps, y);
    }

    /// `norm(x)` as the matrix `w` takes it.
    pub fn input(&self, ops: &Ops<'_>, x: &Buffer, w: &Matrix, y: &mut Input) {
        ops.norm_input(x, &self.weight, self.eps, w, y);
    }
}
