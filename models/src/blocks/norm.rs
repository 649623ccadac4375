//! Norms.

use phidias_engine::backend::Cpu;
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::tensor::Buffer;

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
    pub fn forward(&self, cpu: &Cpu, x: &Buffer, y: &mut Buffer) {
        cpu.rms_norm(x, &self.weight, self.eps, y);
    }
}
