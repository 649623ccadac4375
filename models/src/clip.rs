//! The CLIP vision encoder (Radford et al. 2021), a ViT (Dosovitskiy et al. 2021): a picture in, one
//! vector for each of its patches out.
//!
//! ```text
//! x     = [class | conv(patches)] + positions      the convolution's stride is its size: a GEMM
//! x     = pre_layrnorm(x)                          spelled so in the checkpoints; hidden state 0
//! layer   x += out_proj(attention(layer_norm1(x)))             every token sees every other
//!         x += fc2(quick_gelu(fc1(layer_norm2(x))))            hidden states 1, 2, ...
//! ```
//!
//! Every linear layer has a bias but the convolution. The vision models take the hidden state *before
//! the last layer*, without the class token.

use crate::config::{ConfigError, Fields};
#[cfg(feature = "cuda")]
use crate::cuda::Parts;
use crate::error::Error;
use crate::format::WeightFormat;
use crate::model::treatment;
use crate::weights::{Role, Spec, Weights};
use phidias_engine::Cancel;
use phidias_engine::backend::{Activation, Backend, HeadOrder, Heads, Norm, Ops};
use phidias_engine::checkpoint::prepack::{Entry, Prepack, Treatment};
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::files::{MAX_JSON_BYTES, read_at_most};
use phidias_engine::pool::Pool;
use phidias_engine::tensor::{Buffer, Linear};
use std::path::Path;

/// The shape of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Pixels on each side of a picture.
    pub image_size: usize,
    /// Pixels on each side of a patch.
    pub patch_size: usize,
    /// Epsilon of the norms.
    pub layer_norm_eps: f32,
}

/// Red, green and blue.
const CHANNELS: usize = 3;

impl ClipConfig {
    /// ViT-L/14 at 336 pixels.
    pub const VIT_L_14_336: Self = Self {
        hidden_size: 1024,
        intermediate_size: 4096,
        num_hidden_layers: 24,
        num_attention_heads: 16,
        image_size: 336,
        patch_size: 14,
        layer_norm_eps: 1e-5,
    };

    /// Reads the fields of a `clip_vision_model`.
    pub(crate) fn read(f: &Fields<'_>) -> Result<Self, ConfigError> {
        let hidden_size = f.required("hidden_size", 1..=1 << 14)?;
        let heads = f.required("num_attention_heads", 1..=1 << 10)?;
        if !hidden_size.is_multiple_of(heads) {
            let expected = format!("a divisor of hidden_size {hidden_size}");
            return f.wrong("num_attention_heads", expected);
        }
        let image_size = f.required("image_size", 1..=1 << 12)?;
        let patch_size = f.required("patch_size", 1..=1 << 10)?;
        if patch_size > image_size {
            let expected = format!("at most image_size {image_size}");
            return f.wrong("patch_size", expected);
        }
        if f.count("num_channels", 0..=1 << 10)?
            .is_some_and(|c| c != CHANNELS)
        {
            return f.wrong("num_channels", "3");
        }
        if f.text("hidden_act")?.is_some_and(|act| act != "quick_gelu") {
            return f.wrong("hidden_act", "\"quick_gelu\"");
        }
        Ok(Self {
            hidden_size,
            intermediate_size: f.required("intermediate_size", 1..=1 << 16)?,
            num_hidden_layers: f.required("num_hidden_layers", 1..=1 << 8)?,
            num_attention_heads: heads,
            image_size,
            patch_size,
            layer_norm_eps: f.number("layer_norm_eps", 0.0..=1.0)?.unwrap_or(1e-5) as f32,
        })
    }

    /// Patches on each side of a picture; pixels beyond the last whole one are not looked at.
    #[must_use]
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens of a picture: the class, and its patches.
    #[must_use]
    pub fn tokens(&self) -> usize {
        1 + self.grid() * self.grid()
    }

    /// Floats of a picture, `[3, image_size, image_size]`.
    #[must_use]
    pub fn pixels(&self) -> usize {
        CHANNELS * self.image_size * self.image_size
    }

    /// Floats of a patch.
    pub(crate) fn patch(&self) -> usize {
        CHANNELS * self.patch_size * self.patch_size
    }

    pub(crate) fn heads(&self) -> Heads {
        Heads {
            heads: self.num_attention_heads,
            kv_heads: self.num_attention_heads,
            head_dim: self.hidden_size / self.num_attention_heads,
            order: HeadOrder::Parts,
        }
    }

    /// Every tensor of an encoder whose names begin with `prefix`.
    pub(crate) fn specs(&self, prefix: &str) -> Vec<Spec> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let mut specs = Vec::new();
        let mut put = |name: String, shape: &[usize], role| {
            specs.push(Spec::new(format!("{prefix}{name}"), shape, role));
        };
        put(
            "embeddings.class_embedding".into(),
            &[hidden],
            Role::Embedding,
        );
        let patch = [hidden, CHANNELS, self.patch_size, self.patch_size];
        put(
            "embeddings.patch_embedding.weight".into(),
            &patch,
            Role::Patch,
        );
        let positions = [self.tokens(), hidden];
        let name = "embeddings.position_embedding.weight";
        put(name.into(), &positions, Role::Embedding);
        let mut norms = vec!["pre_layrnorm".to_owned(), "post_layernorm".into()];
        for l in 0..self.num_hidden_layers {
            let p = format!("encoder.layers.{l}");
            norms.extend([1, 2].map(|n| format!("{p}.layer_norm{n}")));
            for (name, rows, cols) in [
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", hidden, hidden),
                ("self_attn.v_proj", hidden, hidden),
                ("self_attn.out_proj", hidden, hidden),
                ("mlp.fc1", inner, hidden),
                ("mlp.fc2", hidden, inner),
            ] {
                put(format!("{p}.{name}.weight"), &[rows, cols], Role::Matrix);
                put(format!("{p}.{name}.bias"), &[rows], Role::Bias);
            }
        }
        for norm in norms {
            put(format!("{norm}.weight"), &[hidden], Role::Norm);
            put(format!("{norm}.bias"), &[hidden], Role::Bias);
        }
        specs
    }
}

/// One layer.
#[derive(Clone, Debug)]
struct Layer {
    norm1: Norm,
    /// `q_proj`, `k_proj`, `v_proj`
    projections: Vec<Linear>,
    out_proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
}

/// The encoder.
#[derive(Clone, Debug)]
pub struct Clip {
    config: ClipConfig,
    /// `[hidden, 3 * patch * patch]`
    patches: Linear,
    /// `[hidden]`
    class: Vec<f32>,
    /// `[tokens, hidden]`
    positions: Vec<f32>,
    pre_norm: Norm,
    layers: Vec<Layer>,
    post_norm: Norm,
}

/// What the encoder works with, kept from call to call.
#[derive(Debug)]
pub struct Scratch<B: Backend> {
    /// The residual stream, `[pictures * tokens, hidden]`.
    x: B::Buffer,
    normed: B::Buffer,
    branch: B::Buffer,
    patches: B::Buffer,
    projected: B::Buffer,
    heads: B::Buffer,
    wide: B::Buffer,
    input: B::Input,
    /// The pictures cut into patches.
    host: Buffer,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self {
            x: B::Buffer::default(),
            normed: B::Buffer::default(),
            branch: B::Buffer::default(),
            patches: B::Buffer::default(),
            projected: B::Buffer::default(),
            heads: B::Buffer::default(),
            wide: B::Buffer::default(),
            input: B::Input::default(),
            host: Buffer::default(),
        }
    }
}

impl<B: Backend> Scratch<B> {
    /// The hidden states of the last call, `[pictures * tokens, hidden]`: those after its last layer.
    #[must_use]
    pub fn hidden(&self) -> &B::Buffer {
        &self.x
    }

    /// The same after `post_layernorm`; row 0 of each picture is CLIP's pooled output.
    #[must_use]
    pub fn normed(&self) -> &B::Buffer {
        &self.normed
    }
}

#[cfg(test)]
impl Scratch<phidias_engine::backend::Cpu> {
    /// Bytes of its buffers. The one input was the patches' once, in floats, and that of `fc2` in `format`.
    pub(crate) fn bytes(
        &self,
        format: Option<phidias_engine::Format>,
        config: &ClipConfig,
    ) -> usize {
        use phidias_engine::backend::Input;
        let Self {
            x,
            normed,
            branch,
            patches,
            projected,
            heads,
            wide,
            input,
            host,
        } = self;
        let buffers = [x, normed, branch, patches, projected, heads, wide, host];
        let floats: usize = buffers.map(|b| size_of_val(b.data())).iter().sum();
        let input_row = Input::bytes_per_row(format, config.intermediate_size)
            .max(Input::bytes_per_row(None, config.patch()));
        floats + input.rows() * input_row
    }
}

/// Prefix of the tensors in a checkpoint that is an encoder alone.
const ALONE: &str = "vision_model.";

impl Clip {
    /// Opens a folder that holds an encoder alone (`model_type` `clip_vision_model`).
    /// # Errors
    /// [`Error`]: a configuration or a tensor that is missing or wrong.
    pub fn open(folder: &Path, format: WeightFormat) -> Result<Self, Error> {
        let path = folder.join("config.json");
        let text = read_at_most(&path, MAX_JSON_BYTES).map_err(|source| Error::Io {
            path: path.clone(),
            source,
        })?;
        let map = crate::config::parse(&path, &text)?;
        let fields = Fields::new(&path, &map);
        if fields.text("model_type")? != Some("clip_vision_model") {
            return Err(fields
                .wrong::<()>("model_type", "\"clip_vision_model\"")
                .expect_err("always one")
                .into());
        }
        let config = ClipConfig::read(&fields)?;
        let checkpoint = Checkpoint::open(folder)?;
        let specs = config.specs(ALONE);
        let weights = Weights::check(&specs, &checkpoint)?;
        let entries: Vec<_> = (specs.iter())
            .map(|spec| Entry {
                name: spec.name.clone(),
                source: spec.name.clone(),
                treatment: treatment(
                    spec.role,
                    checkpoint.get(&spec.name).map(|t| t.dtype()),
                    format,
                ),
            })
            .collect();
        if entries.iter().all(|e| e.treatment == Treatment::Keep) {
            return Ok(Self::load(&config, &weights, ALONE)?);
        }
        let bytes = Prepack::plan(&checkpoint, entries)?.to_memory(
            &Pool::new(None)?,
            &Cancel::default(),
            &mut |_, _| {},
        )?;
        let converted = Checkpoint::from_bytes(&folder.to_string_lossy(), bytes)?;
        let weights = Weights::check(&specs, &converted)?;
        Ok(Self::load(&config, &weights, ALONE)?)
    }

    /// Takes the weights whose names begin with `prefix`.
    pub(crate) fn load(
        config: &ClipConfig,
        weights: &Weights<'_>,
        prefix: &str,
    ) -> Result<Self, CheckpointError> {
        let eps = config.layer_norm_eps;
        let norm = |name: &str| weights.layer_norm(&format!("{prefix}{name}"), eps);
        let mut layers = Vec::new();
        for l in 0..config.num_hidden_layers {
            let p = format!("encoder.layers.{l}");
            let linear = |name: &str| weights.biased(&format!("{prefix}{p}.{name}"));
            let projections =
                ["q", "k", "v"].map(|name| format!("{prefix}{p}.self_attn.{name}_proj"));
            let [q, k, v] = &projections;
            let projections = weights.of_one_input([q, k, v], |name| weights.biased(name))?;
            layers.push(Layer {
                norm1: norm(&format!("{p}.layer_norm1"))?,
                projections: projections.into(),
                out_proj: linear("self_attn.out_proj")?,
                norm2: norm(&format!("{p}.layer_norm2"))?,
                fc1: linear("mlp.fc1")?,
                fc2: linear("mlp.fc2")?,
            });
        }
        let embedding = |name: &str| format!("{prefix}embeddings.{name}");
        Ok(Self {
            config: config.clone(),
            patches: Linear {
                weight: weights.flattened(&embedding("patch_embedding.weight"))?,
                bias: None,
            },
            class: weights.values(&embedding("class_embedding"))?,
            positions: weights.values(&embedding("position_embedding.weight"))?,
            pre_norm: norm("pre_layrnorm")?,
            layers,
            post_norm: norm("post_layernorm")?,
        })
    }

    /// What it multiplies and normalises with.
    #[cfg(feature = "cuda")]
    pub(crate) fn parts<'m>(&'m self, parts: &mut Parts<'m>) {
        parts.exact(&self.patches);
        parts.norm(&self.pre_norm);
        for layer in &self.layers {
            parts.norm(&layer.norm1);
            let matrices = layer.projections.iter();
            (matrices.chain([&layer.out_proj, &layer.fc1, &layer.fc2]))
                .for_each(|w| parts.linear(w));
            parts.norm(&layer.norm2);
        }
        parts.norm(&self.post_norm);
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Operations of the first `depth` layers on one picture: a multiply-add is two.
    #[must_use]
    pub fn operations(&self, depth: usize) -> f64 {
        let (c, tokens) = (&self.config, self.config.tokens());
        let size = |w: &Linear| w.weight.rows() * w.weight.cols();
        let matrices: usize = (self.layers[..depth].iter())
            .flat_map(|l| l.projections.iter().chain([&l.out_proj, &l.fc1, &l.fc2]))
            .map(size)
            .sum();
        let attention = 4 * depth * tokens * tokens * c.hidden_size;
        (2 * (tokens * matrices + (tokens - 1) * size(&self.patches)) + attention) as f64
    }

    /// Runs the first `depth` layers on some pictures together: `pixels` is
    /// `[pictures, 3, image_size, image_size]`, normalised. The result is in `s`; `observe` sees hidden
    /// state 0, 1, ... `depth - 1` on the way.
    /// # Panics
    /// When `pixels` are not whole pictures or there are fewer than `depth` layers.
    pub fn forward<B: Backend>(
        &self,
        ops: &impl Ops<B>,
        pixels: &[f32],
        depth: usize,
        s: &mut Scratch<B>,
        observe: &mut dyn FnMut(usize, &B::Buffer),
    ) {
        let c = &self.config;
        assert!(depth <= self.layers.len(), "layer {depth}");
        assert_eq!(pixels.len() % c.pixels(), 0, "floats of whole pictures");
        self.embed(ops, pixels, s);
        let scale = 1.0 / (c.heads().head_dim as f32).sqrt();
        for (l, layer) in self.layers[..depth].iter().enumerate() {
            let matrix = &layer.projections[0].weight;
            ops.add_norm_input(&mut s.x, &s.branch, &layer.norm1, matrix, &mut s.input);
            observe(l, &s.x);
            ops.linears(&layer.projections, &s.input, &mut s.projected);
            ops.full_attention(&s.projected, c.heads(), c.tokens(), scale, &mut s.heads);
            ops.input(&s.heads, &layer.out_proj.weight, &mut s.input);
            ops.linear(&layer.out_proj, &s.input, &mut s.branch);
            let matrix = &layer.fc1.weight;
            ops.add_norm_input(&mut s.x, &s.branch, &layer.norm2, matrix, &mut s.input);
            ops.activated_linear(&layer.fc1, Activation::QuickGelu, &s.input, &mut s.wide);
            ops.input(&s.wide, &layer.fc2.weight, &mut s.input);
            ops.linear(&layer.fc2, &s.input, &mut s.branch);
        }
        ops.add_norm(&mut s.x, &s.branch, &self.post_norm, &mut s.normed);
    }

    /// Hidden state 0 of some pictures in `s.x`, and nothing to be added to it.
    fn embed<B: Backend>(&self, ops: &impl Ops<B>, pixels: &[f32], s: &mut Scratch<B>) {
        let c = &self.config;
        let (hidden, tokens) = (c.hidden_size, c.tokens());
        let pictures = pixels.len() / c.pixels();
        self.cut(pixels, &mut s.host);
        ops.reshape(s.host.rows(), s.host.cols(), &mut s.patches);
        ops.write(s.host.data(), 0, &mut s.patches);
        ops.input(&s.patches, &self.patches.weight, &mut s.input);
        ops.linear(&self.patches, &s.input, &mut s.projected);
        // The class token and the positions, to which the patches are added.
        ops.reshape(pictures * tokens, hidden, &mut s.normed);
        ops.reshape(pictures * tokens, hidden, &mut s.branch);
        for picture in 0..pictures {
            let patches = picture * (tokens - 1)..(picture + 1) * (tokens - 1);
            let first = picture * tokens;
            ops.write(&self.positions, first, &mut s.normed);
            ops.write(&self.class, first, &mut s.branch);
            ops.copy_rows(&s.projected, patches, &mut s.branch, first + 1);
        }
        ops.add_norm(&mut s.normed, &s.branch, &self.pre_norm, &mut s.x);
        ops.zeros(pictures * tokens, hidden, &mut s.branch);
    }

    /// Pictures cut into patches, `[pictures * grid * grid, 3 * patch * patch]`, in the order of the
    /// convolution's weights.
    fn cut(&self, pixels: &[f32], patches: &mut Buffer) {
        let c = &self.config;
        let (grid, patch, size) = (c.grid(), c.patch_size, c.image_size);
        let pictures = pixels.len() / c.pixels();
        patches.reshape(pictures * grid * grid, CHANNELS * patch * patch);
        for (i, picture) in pixels.chunks_exact(c.pixels()).enumerate() {
            for cell in 0..grid * grid {
                let (top, left) = (cell / grid * patch, cell % grid * patch);
                let row = patches.row_mut(i * grid * grid + cell);
                for (line, out) in row.chunks_exact_mut(patch).enumerate() {
                    let (channel, y) = (line / patch, line % patch);
                    let from = (channel * size + top + y) * size + left;
                    out.copy_from_slice(&picture[from..from + patch]);
                }
            }
        }
    }
}
