//! The operations of a forward pass at the shapes of Phi-3.5-mini, ready to be timed alone; and what
//! the other models have in their place, at the shapes of Phi-3-small and of the image encoder.
//!
//! This is the one file of the benchmark that calls the engine's operations; [`super::kernels`] times
//! whatever is listed here.
//!
//! ```text
//! Bytes   what an operation must read and write once: weights, cache, inputs and results
//! Ops     a multiply-add is two; elsewhere as the maths is written, an exponential counts one
//! ```

use super::{BenchError, split_mix};
use phidias_engine::backend::{Cpu, CpuOps, HeadOrder, Heads, Input, Mask, Rotations};
use phidias_engine::checkpoint::Checkpoint;
use phidias_engine::checkpoint::prepack::{Item, Prepack, Treatment, Values};
use phidias_engine::kernels::cpu::peak::Number;
use phidias_engine::kv_cache::{KvCache, KvShape, KvType};
use phidias_engine::mask::BlockSparse;
use phidias_engine::pool::Pool;
use phidias_engine::tensor::{Buffer, DType, Linear, Matrix};
use phidias_engine::{Bytes, Cancel, Format, Kernels, OwnedBytes};
use phidias_models::WeightFormat;
use std::path::Path;
use std::time::{Duration, Instant};

const HIDDEN: usize = 3072;
const INNER: usize = 8192;
const VOCAB: usize = 32_064;
const HEADS: Heads = Heads {
    heads: 32,
    kv_heads: 32,
    head_dim: 96,
    order: HeadOrder::Parts,
};
/// Phi-3-small's outputs of the gated projection; the image encoder's.
const SMALL_INNER: usize = 14_336;
const CLIP_INNER: usize = 4096;
/// Columns of the fused projection.
const QKV: usize = 3 * HIDDEN;
/// Tokens in the cache when a decoding step attends.
const DEPTH: usize = 4096;
/// Tokens before a chunk of a prompt, and before a decoding step, of 8k.
const DEPTHS_8K: [usize; 2] = [8192 - CHUNK, 8192];
/// Layers of the cache that are visited in turn: more bytes than a last cache holds.
const CACHE_LAYERS: usize = 4;
/// Tokens of a prompt, as a session computes them together.
const CHUNK: usize = 512;

/// A layer of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its name in the table; none for those of Phi-3.5-mini.
    name: &'static str,
    heads: Heads,
    mask: Mask,
}

impl Layer {
    /// Phi-3.5-mini's.
    pub const MINI: Self = Self {
        name: "",
        heads: HEADS,
        mask: Mask::CAUSAL,
    };
    /// Every second one of Phi-3-small.
    pub const SMALL_DENSE: Self = Self {
        name: "Phi-3-small, dense, ",
        heads: Heads {
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            order: HeadOrder::Groups,
        },
        mask: Mask::CAUSAL,
    };
    /// The others.
    pub const SMALL_SPARSE: Self = Self {
        name: "Phi-3-small, block-sparse, ",
        mask: Mask::BlockSparse(BlockSparse {
            block: 64,
            local_blocks: 16,
            vert_stride: 8,
            head_step: 1,
        }),
        ..Self::SMALL_DENSE
    };

    /// Keys that `n` queries from position `first` on see, those of all heads added up.
    fn seen(&self, first: usize, n: usize) -> usize {
        self.mask.count_seen(self.heads.heads, first..first + n)
    }

    /// Keys of all heads that are read for them.
    fn read(&self, first: usize, n: usize) -> usize {
        let Heads {
            heads, kv_heads, ..
        } = self.heads;
        self.mask.count_read(heads, kv_heads, first..first + n)
    }

    /// Of what a dense layer computes and reads, where this one is not dense.
    fn shares(&self, first: usize, n: usize) -> String {
        let dense = Self {
            mask: Mask::CAUSAL,
            ..*self
        };
        let share = |of: usize, all: usize| 100.0 * of as f64 / all as f64;
        match self.mask {
            Mask::Causal { .. } => String::new(),
            Mask::BlockSparse(_) => format!(
                ": {:.0} % seen, {:.0} % read",
                share(self.seen(first, n), dense.seen(first, n)),
                share(self.read(first, n), dense.read(first, n)),
            ),
        }
    }

    fn cache_shape(&self) -> KvShape {
        KvShape {
            layers: vec![self.mask; CACHE_LAYERS],
            heads: self.heads.heads,
            kv_heads: self.heads.kv_heads,
            head_dim: self.heads.head_dim,
        }
    }
}

/// An operation to be timed, at some numbers of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A matrix: one token is the GEMV, more are the GEMM. Its activations are quantized before.
    Linear {
        /// What the matrix is stored in.
        format: WeightFormat,
        /// Its name in a checkpoint.
        name: &'static str,
        /// Outputs.
        rows: usize,
        /// Inputs.
        cols: usize,
        /// Numbers of tokens.
        tokens: &'static [usize],
    },
    /// Quantization of activations.
    Quantize,
    /// RMSNorm.
    RmsNorm,
    /// Rotation of queries and keys.
    Rope,
    /// The gate of the MLP.
    SiluMul,
    /// LayerNorm.
    LayerNorm,
    /// The gate of Phi-3-small.
    Gegelu,
    /// The activation of the image encoder, on a copy of its input.
    QuickGelu,
    /// The activation of the image projection, on a copy of its input.
    Gelu,
    /// Attention of tokens that follow `first` others.
    Attention {
        /// Of this layer.
        layer: Layer,
        /// What the cache stores.
        kv: KvType,
        /// Tokens before them.
        first: usize,
        /// How many.
        tokens: usize,
    },
}

/// What is timed, in the order of the table: a forward pass of Phi-3.5-mini.
#[must_use]
pub fn all() -> Vec<Operation> {
    const EACH: &[usize] = &[1, 128, 512];
    let linear = |format, name, rows, cols, tokens| Operation::Linear {
        format,
        name,
        rows,
        cols,
        tokens,
    };
    let mut list = vec![
        linear(WeightFormat::Q4, "qkv_proj", QKV, HIDDEN, EACH),
        linear(WeightFormat::Q4, "o_proj", HIDDEN, HIDDEN, EACH),
        linear(WeightFormat::Q4, "gate_up_proj", 2 * INNER, HIDDEN, EACH),
        linear(WeightFormat::Q4, "down_proj", HIDDEN, INNER, EACH),
        linear(WeightFormat::Q4, "lm_head", VOCAB, HIDDEN, &[1]),
    ];
    for format in [WeightFormat::Q8, WeightFormat::Bf16, WeightFormat::F32] {
        list.push(linear(format, "gate_up_proj", 2 * INNER, HIDDEN, EACH));
    }
    list.extend([
        Operation::Quantize,
        Operation::RmsNorm,
        Operation::Rope,
        Operation::SiluMul,
    ]);
    for kv in KvType::ALL {
        list.push(Operation::Attention {
            layer: Layer::MINI,
            kv,
            first: DEPTH,
            tokens: 1,
        });
    }
    list.push(Operation::Attention {
        layer: Layer::MINI,
        kv: KvType::F16,
        first: 0,
        tokens: CHUNK,
    });
    for (first, tokens) in DEPTHS_8K.into_iter().zip([CHUNK, 1]) {
        for layer in [Layer::SMALL_DENSE, Layer::SMALL_SPARSE] {
            list.push(Operation::Attention {
                layer,
                kv: KvType::F16,
                first,
                tokens,
            });
        }
    }
    list
}

/// What one call costs at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Bytes read and written.
    pub bytes: usize,
    /// Operations.
    pub ops: usize,
    /// What is multiplied.
    pub number: Number,
}

impl Operation {
    /// What its weights are packed in, if it has any.
    #[must_use]
    pub fn packed(&self) -> Option<Format> {
        match self {
            Self::Linear { format, .. } => format.packed(),
            _ => None,
        }
    }

    /// Family of kernels, and format where there are several.
    #[must_use]
    pub fn kernel(&self) -> String {
        match self {
            Self::Linear { format, .. } => format!("gemm_{format}"),
            Self::Quantize => "quantize".into(),
            Self::RmsNorm => "rms_norm".into(),
            Self::Rope => "rope".into(),
            Self::SiluMul => "silu_mul".into(),
            Self::LayerNorm => "layer_norm".into(),
            Self::Gegelu => "gegelu".into(),
            Self::QuickGelu => "quick_gelu".into(),
            Self::Gelu => "gelu".into(),
            Self::Attention { kv, .. } => format!("attend_{}", kv.name()),
        }
    }

    /// The shape in words.
    #[must_use]
    pub fn shape(&self) -> String {
        match *self {
            Self::Linear {
                name, rows, cols, ..
            } => format!("{name} {rows} x {cols}"),
            Self::Quantize | Self::RmsNorm | Self::LayerNorm | Self::Gelu => HIDDEN.to_string(),
            Self::Rope => format!("{} heads of {}", 2 * HEADS.heads, HEADS.head_dim),
            Self::SiluMul => INNER.to_string(),
            Self::Gegelu => SMALL_INNER.to_string(),
            Self::QuickGelu => CLIP_INNER.to_string(),
            Self::Attention { first: 0, .. } => "a prompt from its beginning".into(),
            Self::Attention {
                layer,
                first,
                tokens,
                ..
            } => {
                let shares = layer.shares(first, tokens);
                format!("{}at depth {first}{shares}", layer.name)
            }
        }
    }

    /// Numbers of tokens that it is timed at.
    #[must_use]
    pub fn tokens(&self) -> Vec<usize> {
        match self {
            Self::Linear { tokens, .. } => tokens.to_vec(),
            Self::Attention { tokens, .. } => vec![*tokens],
            _ => vec![CHUNK],
        }
    }

    /// The cost of a call with `n` tokens; `stored` are the bytes of a matrix.
    #[must_use]
    pub fn cost(&self, n: usize, stored: usize) -> Cost {
        const F32: usize = size_of::<f32>();
        let float = |bytes, ops| Cost {
            bytes,
            ops,
            number: Number::F32,
        };
        match *self {
            Self::Linear {
                format, rows, cols, ..
            } => Cost {
                bytes: stored + n * (rows + cols) * F32,
                ops: 2 * n * rows * cols,
                number: match format {
                    WeightFormat::Q4 | WeightFormat::Q8 => Number::Int8,
                    WeightFormat::Bf16 | WeightFormat::F32 => Number::F32,
                },
            },
            // |x|, max, times, round, sum
            Self::Quantize => float(n * HIDDEN * (F32 + 1), 5 * n * HIDDEN),
            // square and add; times the root and the weight
            Self::RmsNorm => float(2 * n * HIDDEN * F32, 4 * n * HIDDEN),
            // two products and a sum an element
            Self::Rope => float(2 * n * 2 * HIDDEN * F32, 3 * n * 2 * HIDDEN),
            // -g, exp, 1 +, /, times
            Self::SiluMul => float(3 * n * INNER * F32, 5 * n * INNER),
            // add; minus the mean, square and add; minus the mean, times the root and the weight, plus
            Self::LayerNorm => float(2 * n * HIDDEN * F32, 8 * n * HIDDEN),
            // three limits, times, exp, 1 +, /, 1 +, times
            Self::Gegelu => float(3 * n * SMALL_INNER * F32, 9 * n * SMALL_INNER),
            // times, exp, 1 +, /
            Self::QuickGelu => float(2 * n * CLIP_INNER * F32, 4 * n * CLIP_INNER),
            // |x|, limit, nine multiply-adds and a division, square, exp, two products, max, -
            Self::Gelu => float(2 * n * HIDDEN * F32, 27 * n * HIDDEN),
            Self::Attention {
                layer, kv, first, ..
            } => {
                let Heads { head_dim, .. } = layer.heads;
                float(
                    layer.read(first, n) * kv.bytes_per_key(head_dim)
                        + 2 * n * layer.heads.queries() * F32,
                    4 * layer.seen(first, n) * head_dim,
                )
            }
        }
    }

    /// One row of an operation that the engine has as a part of others.
    fn row(&self, kernels: &Kernels, x: &[f32], weight: &[f32], y: &mut [f32]) {
        match self {
            Self::SiluMul => {
                let (gate, up) = x.split_at(y.len());
                kernels.silu_mul(gate, up, y);
            }
            Self::RmsNorm => kernels.rms_norm(x, weight, 1e-5, y),
            Self::LayerNorm => kernels.layer_norm(x, weight, weight, 1e-5, y),
            Self::Gegelu => kernels.gegelu(x, 20.0, y),
            Self::QuickGelu => {
                y.copy_from_slice(x);
                kernels.quick_gelu(y);
            }
            Self::Gelu => {
                y.copy_from_slice(x);
                kernels.gelu(y);
            }
            Self::Linear { .. } | Self::Quantize | Self::Rope | Self::Attention { .. } => {}
        }
    }

    /// Inputs for the operation; weights of more than `working_set` bytes together.
    /// # Errors
    /// Memory that is refused; cancellation.
    pub fn prepare(
        &self,
        cpu: &Cpu,
        working_set: usize,
        cancel: &Cancel,
    ) -> Result<Prepared, BenchError> {
        let mut prepared = Prepared {
            operation: *self,
            ..Prepared::default()
        };
        match *self {
            Self::Linear {
                format, rows, cols, ..
            } => {
                prepared.matrices = matrices(format, rows, cols, working_set, cpu.pool(), cancel)?;
                prepared.columns = cols;
            }
            Self::Quantize => {
                // A matrix that asks for quantized inputs, and shows in its product what they are.
                let (format, rows) = (WeightFormat::Q8, HIDDEN / 8);
                prepared.matrices = matrices(format, rows, HIDDEN, 0, cpu.pool(), cancel)?;
                prepared.columns = HIDDEN;
            }
            Self::RmsNorm | Self::LayerNorm | Self::Gelu => prepared.columns = HIDDEN,
            Self::Rope => prepared.columns = QKV,
            Self::SiluMul => prepared.columns = 2 * INNER,
            Self::Gegelu => prepared.columns = 2 * SMALL_INNER,
            Self::QuickGelu => prepared.columns = CLIP_INNER,
            Self::Attention {
                layer,
                kv,
                first,
                tokens,
            } => {
                prepared.columns = layer.heads.columns();
                prepared.cache = Some(cache(cpu, layer, kv, first + tokens.max(CHECKED))?);
            }
        }
        Ok(prepared)
    }
}

/// Tokens of the calls whose results are compared with the scalar table's.
pub const CHECKED: usize = 2;

/// An operation with its inputs.
#[derive(Debug)]
pub struct Prepared {
    operation: Operation,
    columns: usize,
    x: Buffer,
    y: Buffer,
    /// Several, visited in turn, so that none is in a cache when its turn comes.
    matrices: Vec<Linear>,
    input: Input,
    rotations: Rotations,
    weight: Vec<f32>,
    cache: Option<KvCache>,
    /// Calls so far.
    calls: usize,
}

impl Default for Prepared {
    fn default() -> Self {
        Self {
            operation: Operation::Quantize,
            columns: 0,
            x: Buffer::default(),
            y: Buffer::default(),
            matrices: Vec::new(),
            input: Input::default(),
            rotations: Rotations::default(),
            weight: Vec::new(),
            cache: None,
            calls: 0,
        }
    }
}

impl Prepared {
    /// Makes inputs for `n` tokens, always the same ones.
    pub fn set_tokens(&mut self, cpu: &Cpu, n: usize) {
        self.calls = 0;
        fill(&mut self.x, n, self.columns, 1);
        match self.operation {
            Operation::Linear { .. } => {
                let (x, matrix) = (&self.x, &self.matrices[0].weight);
                cpu.enter(|ops| ops.input(x, matrix, &mut self.input));
            }
            Operation::RmsNorm | Operation::LayerNorm => {
                fill(&mut self.y, 1, HIDDEN, 2);
                self.weight = self.y.data().to_vec();
                self.y.reshape(n, HIDDEN);
            }
            Operation::Rope => self.rotations = rotations(n, HEADS),
            Operation::SiluMul | Operation::Gegelu => self.y.reshape(n, self.columns / 2),
            Operation::QuickGelu | Operation::Gelu => self.y.reshape(n, self.columns),
            Operation::Quantize | Operation::Attention { .. } => {}
        }
    }

    /// Bytes of one of the matrices.
    #[must_use]
    pub fn stored(&self) -> usize {
        self.matrices.first().map_or(0, |w| w.weight.bytes())
    }

    /// The time of `count` calls, after one entry into the pool.
    pub fn time(&mut self, cpu: &Cpu, count: usize) -> Duration {
        let first = self.calls;
        self.calls += count;
        let calls = first..first + count;
        let kernels = cpu.kernels();
        let (x, y, rotations) = (&mut self.x, &mut self.y, &self.rotations);
        match self.operation {
            // The engine does these as parts of others.
            Operation::Rope => cpu.pool().enter(|team| {
                let start = Instant::now();
                for _ in calls {
                    let rows = x.data_mut().chunks_exact_mut(QKV).enumerate();
                    team.each_part(rows.collect(), |(t, row)| {
                        let (cos, sin) = (rotations.cos.row(t), rotations.sin.row(t));
                        kernels.rope(&mut row[..2 * HIDDEN], cos, sin);
                    });
                }
                start.elapsed()
            }),
            Operation::RmsNorm
            | Operation::LayerNorm
            | Operation::SiluMul
            | Operation::Gegelu
            | Operation::QuickGelu
            | Operation::Gelu => {
                let (operation, weight) = (self.operation, &self.weight);
                let (columns, width) = (x.cols(), y.cols());
                cpu.pool().enter(|team| {
                    let start = Instant::now();
                    for _ in calls {
                        let rows = (y.data_mut().chunks_exact_mut(width))
                            .zip(x.data().chunks_exact(columns));
                        team.each_part(rows.collect(), |(y, x)| {
                            operation.row(kernels, x, weight, y);
                        });
                    }
                    start.elapsed()
                })
            }
            _ => cpu.enter(|ops| {
                let start = Instant::now();
                for call in calls {
                    self.call(ops, call);
                }
                start.elapsed()
            }),
        }
    }

    /// One call of an operation that the engine has.
    fn call(&mut self, ops: &CpuOps<'_>, call: usize) {
        let (x, y, input) = (&self.x, &mut self.y, &mut self.input);
        match self.operation {
            Operation::Linear { .. } => {
                ops.linear(&self.matrices[call % self.matrices.len()], input, y);
            }
            Operation::Quantize => ops.input(x, &self.matrices[0].weight, input),
            Operation::Attention { layer, first, .. } => {
                let Some(cache) = &self.cache else { return };
                let Layer { heads, mask, .. } = layer;
                let scale = 1.0 / (heads.head_dim as f32).sqrt();
                let layer = call % CACHE_LAYERS;
                ops.attention(x, heads, cache, layer, first, mask, scale, y);
            }
            // In [`Self::time`].
            Operation::RmsNorm
            | Operation::LayerNorm
            | Operation::Rope
            | Operation::SiluMul
            | Operation::Gegelu
            | Operation::QuickGelu
            | Operation::Gelu => {}
        }
    }

    /// What the last call computed; of quantized rows, their product with a matrix.
    #[must_use]
    pub fn result(&mut self, cpu: &Cpu) -> Vec<f32> {
        match self.operation {
            Operation::Rope => self.x.data().to_vec(),
            Operation::Quantize => {
                let (matrix, input, y) = (&self.matrices[0], &self.input, &mut self.y);
                cpu.enter(|ops| ops.linear(matrix, input, y));
                self.y.data().to_vec()
            }
            _ => self.y.data().to_vec(),
        }
    }
}

/// Rotations of `n` positions.
fn rotations(n: usize, heads: Heads) -> Rotations {
    let mut rotations = Rotations::default();
    fill(&mut rotations.cos, n, heads.head_dim / 2, 3);
    rotations.sin = rotations.cos.clone();
    let pairs = (rotations.cos.data_mut().iter_mut()).zip(rotations.sin.data_mut());
    for (cos, sin) in pairs {
        (*sin, *cos) = (*cos * 3.0).sin_cos();
    }
    rotations
}

/// A cache of so many positions of random keys and values.
fn cache(cpu: &Cpu, of: Layer, kv: KvType, positions: usize) -> Result<KvCache, BenchError> {
    let heads = of.heads;
    let mut cache = KvCache::new(of.cache_shape(), kv);
    (cache.reserve(positions)).map_err(phidias_models::Error::from)?;
    let mut qkv = Buffer::default();
    for first in (0..positions).step_by(CHUNK) {
        let count = CHUNK.min(positions - first);
        let rotations = rotations(count, heads);
        for layer in 0..CACHE_LAYERS {
            fill(&mut qkv, count, heads.columns(), (first + layer) as u64);
            let (qkv, cache) = (&mut qkv, &mut cache);
            cpu.enter(|ops| ops.rope_and_store(qkv, heads, &rotations, cache, layer, first));
        }
    }
    cache.set_len(positions);
    Ok(cache)
}

/// Random values in -1..1.
fn fill(buffer: &mut Buffer, rows: usize, cols: usize, seed: u64) {
    buffer.reshape(rows, cols);
    let mut state = seed;
    for value in buffer.data_mut() {
        *value = unit(split_mix(&mut state));
    }
}

/// In -1..1.
fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A matrix in the making: uniform values.
#[derive(Debug)]
struct Uniform([usize; 2]);

impl Values for Uniform {
    fn dtype(&self) -> DType {
        DType::Bf16
    }
    fn shape(&self) -> &[usize] {
        &self.0
    }
    fn raw(&self) -> Option<&[u8]> {
        None
    }
    fn widen(&self, first: usize, out: &mut [f32]) -> bool {
        for (i, value) in (first as u64..).zip(out) {
            // Eight bits: a bf16 number.
            *value = ((split_mix(&mut { i }) >> 56) as f32 - 127.5) / 4096.0;
        }
        true
    }
}

/// Copies of one matrix, larger together than `working_set`.
fn matrices(
    format: WeightFormat,
    rows: usize,
    cols: usize,
    working_set: usize,
    pool: &Pool,
    cancel: &Cancel,
) -> Result<Vec<Linear>, BenchError> {
    const NAME: &str = "weight";
    let error = |e| BenchError::Model(phidias_models::Error::Checkpoint(e));
    let values = Uniform([rows, cols]);
    let item = Item {
        name: NAME.into(),
        source: NAME.into(),
        values: &values,
        treatment: match (format.packed(), format) {
            (Some(packed), _) => Treatment::Pack(packed),
            (None, WeightFormat::F32) => Treatment::Cast(DType::F32),
            (None, _) => Treatment::Keep,
        },
    };
    let plan = Prepack::of(Path::new("benchmark"), vec![item]).map_err(error)?;
    let first = plan
        .to_memory(pool, cancel, &mut |_, _| {})
        .map_err(error)?;
    let copies = working_set.div_ceil(first.len()).max(1);
    let mut all = vec![first.clone()];
    for _ in 1..copies {
        let copy =
            OwnedBytes::copy(&first).map_err(|_| BenchError::OutOfMemory { bytes: first.len() })?;
        all.push(Bytes::from(copy));
    }
    (all.into_iter())
        .map(|bytes| {
            let checkpoint = Checkpoint::from_bytes("benchmark", bytes).map_err(error)?;
            let tensor = checkpoint.tensor(NAME, &[rows, cols]).map_err(error)?;
            Ok(Linear {
                weight: Matrix::new(tensor).expect("two dimensions"),
                bias: None,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_by_hand() {
        let find = |kernel: &str, shape: &str| {
            (all().into_iter())
                .find(|o| o.kernel() == kernel && o.shape().starts_with(shape))
                .unwrap_or_else(|| panic!("{kernel} {shape}"))
        };
        // gate_up in q4: 18 bytes for 32 weights.
        let stored = 16384 * 3072 / 32 * 18;
        let cost = find("gemm_q4", "gate_up").cost(2, stored);
        assert_eq!(cost.ops, 4 * 16384 * 3072);
        assert_eq!(cost.bytes, stored + 2 * 4 * (16384 + 3072));
        assert_eq!(cost.number, Number::Int8);
        // One layer at depth 4096 in f16: 12288 bytes a position; 4 operations an element seen.
        let cost = find("attend_f16", "at depth").cost(1, 0);
        assert_eq!(cost.ops, 4097 * 4 * 3072);
        assert_eq!(cost.bytes, 4097 * 12288 + 2 * 4 * 3072);
        // One head of Phi-3-small at position 8192 sees block 128 up to itself, the fifteen before it, and of
        // the first 113 those whose number and its own make 7 modulo 8: 14, or 15 for head 7 (block 0).
        let sparse = find("attend_f16", "Phi-3-small, block-sparse, at depth 8192");
        let own = 15 * 64 + 1;
        let dense = 8193.0;
        let strides = |offset: usize| (0..113).filter(|k| k % 8 == 7 - offset % 8).count() * 64;
        let seen: usize = (0..32).map(|h| own + strides(h)).sum();
        assert_eq!(sparse.cost(1, 0).ops, seen * 4 * 128);
        let read: usize = (0..8)
            .map(|g| own + (0..4).map(|h| strides(4 * g + h)).sum::<usize>())
            .sum();
        assert_eq!(sparse.cost(1, 0).bytes, read * 512 + 2 * 4 * 4096);
        let [seen, read] = [seen as f64 / 32.0, read as f64 / 8.0].map(|n| 100.0 * n / dense);
        let shares = format!("{seen:.0} % seen, {read:.0} % read");
        assert!(sparse.shape().ends_with(&shares), "{}", sparse.shape());
        let cost = find("attend_f16", "a prompt").cost(512, 0);
        assert_eq!(cost.ops, 512 * 513 / 2 * 4 * 3072);
        assert_eq!(find("rms_norm", "").cost(1, 0).bytes, 2 * 3072 * 4);
        assert_eq!(find("silu_mul", "").cost(1, 0).ops, 5 * 8192);
        assert_eq!(find("gemm_bf16", "").cost(1, 0).number, Number::F32);
    }
}
