//! A sequence of tokens in the hands of a model: prompt in, logits out, cache kept.

use crate::blocks::head;
use crate::blocks::moe::LayerRouting;
use crate::blocks::rope::Regime;
use crate::config::Config;
use crate::error::Error;
use crate::format::WeightFormat;
use crate::image::Processed;
use crate::model::{Model, WeightBytes};
use crate::text::{Detokenizer, PLACEHOLDER, TextError};
use crate::transformer::{Cancelled, Observer, Pass, Placed, Workspace};
use phidias_engine::backend::{Cpu, Ops, PICKS};
use phidias_engine::generate::{Detokenize, Sequence};
use phidias_engine::kv_cache::{KvCache, KvType};
use phidias_engine::memory::MemoryPlan;
use phidias_engine::pool::Pool;
use phidias_engine::tensor::Buffer;
use phidias_engine::{Cancel, Kernels};
use std::sync::Arc;

/// What to do with cached keys when a sequence outgrows `original_max_position_embeddings`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Crossing {
    /// Compute the cache again with the long factors: what the reference gives, and what a fresh
    /// prompt of the whole sequence gives.
    #[default]
    Exact,
    /// Turn the cached keys to the long factors in place. Fast and approximate: the keys' angles
    /// are right, but the deeper layers' keys and values still come from attention before it.
    Rotate,
}

/// How a session runs.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Most tokens the sequence may have; `None`: [`default_context`].
    pub context: Option<usize>,
    /// What the cache stores; `None`: f32 when the weights are asked in f32, else f16.
    pub kv_type: Option<KvType>,
    /// Tokens computed together in a prompt. Memory, not results, depend on it.
    pub chunk: usize,
    /// Crossing of the original length.
    pub crossing: Crossing,
    /// Threads; `None`: as many as this process may use.
    pub threads: Option<usize>,
    /// Kernels; `None`: the best the CPU has.
    pub kernels: Option<&'static Kernels>,
    /// Give back the blocks of the cache that no later query sees. Results do not change; going back to where
    /// such a block was seen computes the sequence again.
    pub drop_hidden: bool,
    /// Pictures that will be encoded.
    pub pictures: PictureMemory,
    /// Refuse a plan that does not fit in memory.
    pub check_memory: bool,
}

/// What decides the memory that pictures take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PictureMemory {
    /// Crops of the largest one.
    pub crops: usize,
    /// Positions of all of them.
    pub rows: usize,
}

impl PictureMemory {
    /// That of some pictures.
    #[must_use]
    pub fn of(pictures: &[Processed]) -> Self {
        Self {
            crops: pictures.iter().map(Processed::crops).max().unwrap_or(0),
            rows: pictures.iter().map(Processed::tokens).sum(),
        }
    }

    /// Bytes: features stay, what the encoder works with is gone before the decoder starts.
    fn bytes(self, c: &Config, decoder: usize) -> usize {
        let encoder = c.vision.as_ref().map_or(0, |vision| {
            vision.activation_bytes(c.hidden_size, self.crops)
        });
        4 * self.rows * c.hidden_size + encoder.max(decoder)
    }
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            context: None,
            kv_type: None,
            chunk: 512,
            crossing: Crossing::Exact,
            threads: None,
            kernels: None,
            drop_hidden: false,
            pictures: PictureMemory::default(),
            check_memory: true,
        }
    }
}

/// The context when none is asked: the model's, at most 8192. The cache grows on demand, so a
/// larger one costs nothing until it is used; this bounds what a runaway answer can take.
#[must_use]
pub fn default_context(config: &Config) -> usize {
    config.max_position_embeddings.min(8192)
}

/// The memory that a session takes when its context is full.
/// # Errors
/// [`Error::Context`] when the context is zero or beyond the model's.
pub fn memory_plan(
    config: &Config,
    format: WeightFormat,
    weights: WeightBytes,
    options: &SessionOptions,
) -> Result<MemoryPlan, Error> {
    let max = config.max_position_embeddings;
    let context = options.context.unwrap_or_else(|| default_context(config));
    if context == 0 || context > max {
        return Err(Error::Context {
            asked: context,
            max,
        });
    }
    let kind = options.kv_type.unwrap_or(format.default_kv_type());
    let (shape, chunk) = (config.kv_shape(), options.chunk.clamp(1, context));
    // Dropping comes before a chunk, so what the last chunk hides is still there.
    let hidden = shape.hidden_bytes(kind, context - chunk);
    let dropped = if options.drop_hidden { hidden } else { 0 };
    Ok(MemoryPlan {
        weights: weights.all,
        pageable: weights.experts,
        working_set: config
            .moe
            .map_or(0, |moe| weights.experts / moe.experts * PICKS),
        kv_cache: shape.bytes(kind, context) - dropped,
        hidden,
        dropped,
        activations: (options.pictures).bytes(config, activation_bytes(config, chunk)),
        context,
    })
}

/// Bytes of activations of a chunk of `tokens`.
fn activation_bytes(c: &Config, tokens: usize) -> usize {
    let qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim;
    // x, normed, branch; qkv, heads; gated; the inputs of the matrices, as floats at most.
    let floats = 4 * c.hidden_size + qkv + c.intermediate_size;
    let inputs = 2 * c.hidden_size + c.intermediate_size;
    // Of each pick: gated, the expert's output, and what its matrix takes.
    let pick = c.intermediate_size + c.hidden_size + c.intermediate_size.max(c.hidden_size);
    let experts = c.moe.map_or(0, |moe| PICKS * pick + moe.experts);
    let row = 4 * (floats + inputs + experts);
    row.saturating_mul(tokens)
        .saturating_add(4 * LOGIT_ROWS * c.vocab_size)
}

/// What a session is doing in a long prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens computed so far in this call.
    pub done: usize,
    /// Tokens to compute in this call.
    pub total: usize,
    /// Why tokens of earlier calls are computed again, if they are.
    pub recomputing: Option<Recomputing>,
}

/// Why tokens are computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recomputing {
    /// The sequence crossed the original length.
    Crossing,
    /// It went back to where keys are seen that were dropped.
    Dropped,
}

/// A part of a prompt.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Ids of text.
    Text(Vec<u32>),
    /// The features of a picture, `[tokens, hidden]`.
    Picture(Arc<Buffer>),
}

/// A sequence, its cache and the device it runs on.
pub struct Session {
    model: Arc<Model>,
    cpu: Cpu,
    cache: KvCache,
    /// The whole sequence; `ids[..cache.len()]` are in the cache. [`PLACEHOLDER`] where pictures stand.
    ids: Vec<u32>,
    /// The pictures of the sequence, in order.
    pictures: Vec<Placed>,
    /// The factors the cached keys were rotated with.
    regime: Regime,
    context: usize,
    chunk: usize,
    crossing: Crossing,
    drop_hidden: bool,
    workspace: Workspace,
    head: head::Scratch,
    cancel: Cancel,
    progress: Option<Box<dyn FnMut(Prefill) + Send>>,
}

/// Rows of logits computed together when all of them are wanted: bounds their memory.
const LOGIT_ROWS: usize = 32;

impl Session {
    /// A session with an empty sequence.
    /// # Errors
    /// A context beyond the model's, a plan that does not fit in memory, threads that cannot be had.
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Self, Error> {
        let plan = Self::plan(&model, options)?;
        if options.check_memory {
            plan.check(&phidias_engine::machine::Machine::detect())?;
        }
        let pool = Arc::new(Pool::new(options.threads)?);
        let kernels = options.kernels.unwrap_or_else(Kernels::best);
        let kv_type = options.kv_type.unwrap_or(model.format().default_kv_type());
        Ok(Self {
            cpu: Cpu::new(kernels, pool),
            cache: KvCache::new(model.config().kv_shape(), kv_type),
            ids: Vec::new(),
            pictures: Vec::new(),
            regime: Regime::Short,
            context: plan.context,
            chunk: options.chunk.max(1),
            crossing: options.crossing,
            drop_hidden: options.drop_hidden,
            workspace: Workspace::default(),
            head: head::Scratch::default(),
            cancel: Cancel::default(),
            progress: None,
            model,
        })
    }

    /// The memory that such a session takes when its context is full, weights included.
    /// # Errors
    /// As [`memory_plan`].
    pub fn plan(model: &Model, options: &SessionOptions) -> Result<MemoryPlan, Error> {
        memory_plan(
            model.config(),
            model.format(),
            model.weight_bytes(),
            options,
        )
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Every token of the sequence.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Most tokens the sequence may have.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// Its cache.
    #[must_use]
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Its device.
    #[must_use]
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The flag that stops [`Session::extend`]; the sequence is then what it was before the call.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    /// Called after each chunk of a prompt.
    pub fn set_progress(&mut self, progress: impl FnMut(Prefill) + Send + 'static) {
        self.progress = Some(Box::new(progress));
    }

    /// How the tokens since the last call were spread over the experts of each layer; a layer without
    /// experts counts none, and before the first token there are no layers. Tokens that were computed twice
    /// count twice.
    pub fn take_routing(&mut self) -> Vec<LayerRouting> {
        self.workspace.take_routing()
    }

    /// Forgets the tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.pictures.retain(|picture| picture.start < len);
        if let Some(last) = self.pictures.last_mut() {
            last.len = last.len.min(len - last.start);
        }
        self.cache.truncate(len);
    }

    /// Appends tokens and returns the logits after the last one, `[vocab]`.
    /// # Errors
    /// No tokens, a token outside the vocabulary, a sequence beyond the context, no memory for the
    /// cache, cancellation. The sequence is then what it was before.
    pub fn extend(&mut self, tokens: &[u32]) -> Result<&[f32], Error> {
        self.run(tokens, Want::Last, &mut |_, _, _| {})?;
        Ok(self.head.logits.row(0))
    }

    /// The ids of some pieces that are to be appended next, with [`PLACEHOLDER`]s where pictures stand.
    /// The pictures are taken note of; [`Session::extend`] and its siblings put them in their places, and
    /// [`Session::truncate`] forgets those that were not reached.
    /// # Panics
    /// When features are not as wide as the model.
    pub fn attach(&mut self, pieces: &[Piece]) -> Vec<u32> {
        let mut ids = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Text(text) => ids.extend_from_slice(text),
                Piece::Picture(rows) => {
                    let hidden = self.model.config().hidden_size;
                    assert_eq!(rows.cols(), hidden, "columns of the features, hidden_size");
                    self.pictures.push(Placed {
                        start: self.ids.len() + ids.len(),
                        len: rows.rows(),
                        rows: Arc::clone(rows),
                    });
                    ids.resize(ids.len() + rows.rows(), PLACEHOLDER);
                }
            }
        }
        ids
    }

    /// Appends tokens and hands out the logits after each of them: `each(position, logits)`.
    /// # Errors
    /// As [`Session::extend`].
    pub fn extend_all(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        self.run(tokens, Want::Each(&mut each), &mut |_, _, _| {})
    }

    /// [`Session::extend_all`] that also shows the values inside the forward pass.
    /// # Errors
    /// As [`Session::extend`].
    pub fn extend_observed(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]),
        observe: Observer<'_>,
    ) -> Result<(), Error> {
        self.run(tokens, Want::Each(&mut each), observe)
    }

    fn run(&mut self, tokens: &[u32], want: Want<'_>, observe: Observer<'_>) -> Result<(), Error> {
        let vocab = self.model.config().vocab_size;
        if tokens.is_empty() {
            return Err(Error::NoTokens);
        }
        if let Some(&id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::TokenId { id, vocab });
        }
        let before = self.ids.len();
        let total = before.saturating_add(tokens.len());
        if total > self.context {
            return Err(Error::TooLong {
                tokens: total,
                context: self.context,
            });
        }
        if !self.drop_hidden {
            self.cache.reserve(total)?;
        }
        self.ids.extend_from_slice(tokens);
        let result = self.advance(before, want, observe);
        if result.is_err() {
            self.truncate(before);
        }
        result
    }

    /// Brings the cache up to `ids`; logits are wanted for the tokens from `before` on.
    fn advance(
        &mut self,
        before: usize,
        mut want: Want<'_>,
        observe: Observer<'_>,
    ) -> Result<(), Error> {
        let total = self.ids.len();
        let model = Arc::clone(&self.model);
        let transformer = model.transformer();
        let short = self.cache.len() < before;
        self.enter_regime(transformer.rope.regime(total));
        let start = self.cache.len();
        let recomputing = match start < before {
            true if short => Some(Recomputing::Dropped),
            true => Some(Recomputing::Crossing),
            false => None,
        };
        while self.cache.len() < total {
            let first = self.cache.len();
            let end = total.min(first + self.chunk);
            if self.drop_hidden {
                // Not sooner: what the last pass computed may be truncated yet, as wrong guesses are.
                self.cache.drop_hidden(first);
                self.cache.reserve(end)?;
            }
            let wanted = match want {
                Want::Last => end.max(total) - 1..end,
                Want::Each(_) => before.max(first)..end,
            };
            let mut groups = (wanted.clone().step_by(LOGIT_ROWS))
                .map(|from| from..wanted.end.min(from + LOGIT_ROWS));
            let group = groups.next();
            // One entry into the pool for the whole pass, the first logits included.
            let Self {
                cpu,
                cache,
                workspace,
                head,
                ..
            } = self;
            let pass = |ops: &Ops<'_>| {
                let pass = Pass {
                    ops,
                    pictures: &self.pictures,
                    cache,
                    cancel: &self.cancel,
                    observe: &mut *observe,
                };
                let ids = &self.ids[first..end];
                transformer.forward(ids, self.regime, pass, workspace)?;
                if let Some(rows) = &group {
                    let hidden = workspace.hidden();
                    let rows = rows.start - first..rows.end - first;
                    transformer.lm_head.forward(ops, hidden, rows, head);
                }
                Ok(())
            };
            cpu.enter(pass).map_err(|Cancelled| Error::Cancelled)?;
            if let (Want::Each(each), Some(rows)) = (&mut want, group) {
                rows.clone()
                    .for_each(|t| each(t, head.logits.row(t - rows.start)));
                for rows in groups {
                    let hidden = workspace.hidden();
                    let range = rows.start - first..rows.end - first;
                    cpu.enter(|ops| transformer.lm_head.forward(ops, hidden, range, head));
                    rows.clone()
                        .for_each(|t| each(t, head.logits.row(t - rows.start)));
                }
            }
            if let Some(progress) = &mut self.progress {
                progress(Prefill {
                    done: end - start,
                    total: total - start,
                    recomputing,
                });
            }
        }
        Ok(())
    }

    /// Makes the cached keys fit the regime that the new length asks for, or drops them.
    fn enter_regime(&mut self, regime: Regime) {
        let old = std::mem::replace(&mut self.regime, regime);
        if old == regime || self.cache.is_empty() {
            return;
        }
        match self.crossing {
            Crossing::Exact => self.cache.truncate(0),
            Crossing::Rotate => {
                let rope = &self.model.transformer().rope;
                self.cache
                    .update_keys(|position, head| rope.change(old, regime, position, head));
            }
        }
    }
}

impl Sequence for Session {
    type Error = Error;
    fn ids(&self) -> &[u32] {
        self.ids()
    }
    fn vocab(&self) -> usize {
        self.model.config().vocab_size
    }
    fn context(&self) -> usize {
        self.context
    }
    fn extend(&mut self, tokens: &[u32]) -> Result<&[f32], Error> {
        Self::extend(self, tokens)
    }
    fn extend_all(
        &mut self,
        tokens: &[u32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        Self::extend_all(self, tokens, each)
    }
    fn truncate(&mut self, len: usize) {
        Self::truncate(self, len);
    }
    /// A pass uses the factors of its whole length, so it must not cross the original length before
    /// its first token does.
    fn lookahead(&self) -> usize {
        let next = self.ids.len() + 1;
        let end = self.model.transformer().rope.regime_end(next);
        end.min(self.context).saturating_sub(next)
    }
}

impl Detokenize for Detokenizer {
    type Error = TextError;
    fn push(&mut self, id: u32) -> Result<String, TextError> {
        Self::push(self, id)
    }
    fn finish(&mut self) -> Result<String, TextError> {
        Self::finish(self)
    }
}

/// Which logits a call wants.
enum Want<'a> {
    /// Those after the last token.
    Last,
    /// Those after each new token, handed out one by one.
    Each(&'a mut dyn FnMut(usize, &[f32])),
}

impl From<Cancelled> for Error {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}
