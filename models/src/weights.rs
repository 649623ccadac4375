//! The tensors of a model: names, shapes, roles; and taking them from a checkpoint that has them.

use crate::blocks::head::LmHead;
use crate::blocks::rope::Rope;
use crate::config::Config;
use crate::transformer::{Layer, Transformer};
use phidias_engine::backend::Norm;
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::tensor::{Linear, Matrix, Tensor};

/// Name of the embedding table.
pub const EMBED: &str = "model.embed_tokens.weight";
/// Name of the head.
pub const HEAD: &str = "lm_head.weight";
/// Name of the head's bias.
const HEAD_BIAS: &str = "lm_head.bias";

/// What role a tensor plays: the one table of what may be stored in fewer bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Multiplied with every token: takes the asked format.
    Matrix,
    /// Multiplied with the tokens that are routed to it: takes the asked format. The others are not read,
    /// so it need not be in memory.
    Expert,
    /// Chooses among experts, which no rounding of its scores should do: small; kept.
    Router,
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

impl Role {
    /// Whether it takes the format that is asked for.
    #[must_use]
    pub fn takes_format(self) -> bool {
        matches!(self, Self::Matrix | Self::Expert)
    }
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
    if c.lm_head_bias {
        specs.push(Spec::new(HEAD_BIAS, &shape[..1], Role::Bias));
    }
    specs
}

/// Whether the head is a tensor of its own. One that is tied to the embedding table is when it was packed; any
/// other that a file of a tied model brings is not read, as in the reference implementation.
pub(crate) fn has_own_head(c: &Config, checkpoint: &Checkpoint) -> bool {
    let packed = |tensor: &Tensor| tensor.dtype().packed().is_some();
    !c.tie_word_embeddings || checkpoint.get(HEAD).is_some_and(packed)
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

    /// Matrices that are given the same rows, which are made for one kind of storage: refuses a file that
    /// mixes them. `names` are those of the tensors, without `.weight`.
    pub(crate) fn of_one_input<const N: usize>(
        &self,
        names: [&str; N],
        load: impl Fn(&str) -> Result<Linear>,
    ) -> Result<[Linear; N]> {
        let mut kind = None;
        let mut loaded = Vec::with_capacity(N);
        for name in names {
            let linear = load(name)?;
            let dtype = linear.weight.dtype();
            let first = *kind.get_or_insert(dtype);
            if dtype.packed() != first.packed() {
                return Err(CheckpointError::DType {
                    path: self.checkpoint.path().to_owned(),
                    tensor: format!("{name}.weight"),
                    expected: first.name(),
                    found: dtype,
                });
            }
            loaded.push(linear);
        }
        Ok(loaded.try_into().expect("one for each name"))
    }

    /// `{name}.weight`
    pub(crate) fn rms_norm(&self, name: &str, eps: f32) -> Result<Norm> {
        Ok(Norm::Rms {
            weight: self.values(&format!("{name}.weight"))?,
            eps,
        })
    }

    /// The decoder of these layers and last norm: what stands around them is the same in every family.
    pub(crate) fn transformer(
        &self,
        c: &Config,
        layers: Vec<Layer>,
        norm: Norm,
    ) -> Result<Transformer> {
        Ok(Transformer {
            embed_tokens: self.matrix(EMBED)?,
            embedding_multiplier: c.embedding_multiplier,
            layers,
            norm,
            lm_head: self.lm_head(c)?,
            rope: Rope::new(c),
        })
    }

    /// The head, or the embedding table where it serves as one.
    fn lm_head(&self, c: &Config) -> Result<LmHead> {
        let name = match has_own_head(c, self.checkpoint) {
            true => HEAD,
            false => EMBED,
        };
        self.checkpoint
            .tensor(name, &[c.vocab_size, c.hidden_size])?;
        Ok(LmHead {
            linear: Linear {
                weight: self.matrix(name)?,
                bias: match c.lm_head_bias {
                    true => Some(self.values(HEAD_BIAS)?),
                    false => None,
                },
            },
            divisor: c.logits_divisor,
            unused: c.unused_ids.clone(),
        })
    }
}
