//! The tensors of a model: names, shapes, roles; and taking them from a checkpoint that has them.

use crate::blocks::head::LmHead;
use crate::config::Config;
use phidias_engine::backend::Norm;
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::tensor::{Linear, Matrix, Tensor};

/// Name of the embedding table.
pub const EMBED: &str = "model.embed_tokens.weight";
/// Name of the head.
pub const HEAD: &str = "lm_head.weight";

/// What role a tensor plays: the one table of what may be stored in fewer bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Multiplied with every token: takes the asked format.
    Matrix,
    /// The embedding table: a row is looked up, so its size does not cost time; kept.
    Embedding,
    /// Weights of a norm: tiny and sensitive; kept.
    Norm,
    /// Added to outputs: tiny; kept.
    Bias,
    /// The convolution that turns a picture's patches into tokens: four dimensions and hardly any of the
    /// encoder's work; kept.
    Patch,
}

/// A tensor of the model: name, shape, role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its role.
    pub role: Role,
}

impl Spec {
    /// A tensor.
    pub(crate) fn new(name: impl Into<String>, shape: &[usize], role: Role) -> Self {
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            role,
        }
    }
}

/// The tensors outside the layers: the embedding table, and the head where it is one of its own.
pub(crate) fn ends(c: &Config) -> Vec<Spec> {
    let shape = [c.vocab_size, c.hidden_size];
    let mut specs = vec![Spec::new(EMBED, &shape, Role::Embedding)];
    if !c.tie_word_embeddings {
        specs.push(Spec::new(HEAD, &shape, Role::Matrix));
    }
    specs
}

/// A checkpoint in which every tensor of a model was found, in its shape.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
}

type Result<T> = std::result::Result<T, CheckpointError>;

impl<'a> Weights<'a> {
    /// Looks for every tensor.
    /// # Errors
    /// One that is missing or has another shape than it should.
    pub fn check(specs: &[Spec], checkpoint: &'a Checkpoint) -> Result<Self> {
        (specs.iter())
            .try_for_each(|spec| checkpoint.tensor(&spec.name, &spec.shape).map(|_| ()))?;
        Ok(Self { checkpoint })
    }

    fn tensor(&self, name: &str) -> Result<&'a Tensor> {
        (self.checkpoint.get(name)).ok_or_else(|| CheckpointError::MissingTensor {
            path: self.checkpoint.path().to_owned(),
            tensor: name.to_owned(),
        })
    }

    /// The tensor of that name, of two dimensions.
    pub(crate) fn matrix(&self, name: &str) -> Result<Matrix> {
        Ok(Matrix::new(self.tensor(name)?).expect("a matrix among the specs"))
    }

    /// The tensor of that name as a matrix of its first dimension by all others.
    pub(crate) fn flattened(&self, name: &str) -> Result<Matrix> {
        Ok(Matrix::flattened(self.tensor(name)?).expect("floats among the specs"))
    }

    /// All elements of the tensor of that name as f32.
    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        let mut values = vec![0.0; tensor.shape().iter().product()];
        if tensor.widen(0, &mut values) {
            return Ok(values);
        }
        Err(CheckpointError::DType {
            path: self.checkpoint.path().to_owned(),
            tensor: name.to_owned(),
            expected: "F32, F16 or BF16",
            found: tensor.dtype(),
        })
    }

    /// `{name}.weight` and `{name}.bias`
    pub(crate) fn biased(&self, name: &str) -> Result<Linear> {
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"))?,
            bias: Some(self.values(&format!("{name}.bias"))?),
        })
    }

    /// `{name}.weight` and `{name}.bias`
    pub(crate) fn layer_norm(&self, name: &str, eps: f32) -> Result<Norm> {
        Ok(Norm::Layer {
            weight: self.values(&format!("{name}.weight"))?,
            bias: self.values(&format!("{name}.bias"))?,
            eps,
        })
    }

    /// `{name}.weight`
    pub(crate) fn linear(&self, name: &str) -> Result<Linear> {
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"))?,
            bias: None,
        })
    }

    /// `{name}.weight`
    pub(crate) fn rms_norm(&self, name: &str, eps: f32) -> Result<Norm> {
        Ok(Norm::Rms {
            weight: self.values(&format!("{name}.weight"))?,
            eps,
        })
    }

    /// The head, or the embedding table where it serves as one. (A tied head that was quantized stands
    /// on its own in the prepacked file.)
    pub(crate) fn lm_head(&self, c: &Config) -> Result<LmHead> {
        let tied = c.tie_word_embeddings && self.checkpoint.get(HEAD).is_none();
        let name = if tied { EMBED } else { HEAD };
        self.checkpoint
            .tensor(name, &[c.vocab_size, c.hidden_size])?;
        Ok(LmHead {
            linear: Linear {
                weight: self.matrix(name)?,
                bias: None,
            },
            divisor: c.logits_divisor,
            unused: c.unused_ids.clone(),
        })
    }
}
