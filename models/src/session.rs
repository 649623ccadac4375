//! A sequence of tokens in the hands of a model: prompt in, logits out, cache kept.

use crate::blocks::moe::LayerRouting;
use crate::blocks::rope::Regime;
use crate::config::Config;
use crate::error::Error;
use crate::format::WeightFormat;
use crate::image::{CROP_LEN, Processed, layout};
use crate::model::{Model, WeightBytes};
use crate::running::{Chunk, LOGIT_ROWS, Runner, Running};
use crate::text::{Detokenizer, PLACEHOLDER, TextError};
use crate::transformer::{Observer, Placed};
use crate::vision::TILE_TOKENS;
use phidias_engine::backend::{Cache, Cpu, Input, PICKS, gated_rows};
use phidias_engine::generate::{Detokenize, Next, Sequence};
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

/// Which pictures a session will see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PictureMemory {
    /// None.
    #[default]
    Without,
    /// All of them before the first token: what looking takes is given back before the decoder begins.
    First {
        /// Crops of the largest one.
        crops: usize,
        /// Crops of the others, which wait as pixels.
        waiting: usize,
        /// Positions of all of them.
        rows: usize,
    },
    /// One after the other, as many as the context has room for, while the decoder's memory is held. A
    /// picture is looked at only when there is room for it, so the cache is not full then.
    Anytime {
        /// Crops of the smallest one.
        fewest: usize,
        /// Crops of the largest one.
        most: usize,
    },
}

/// Bytes that pictures take beside the decoder.
#[derive(Clone, Copy, Debug, Default)]
struct Looking {
    /// Features, which stay, and what the encoder works with beyond what the decoder has not taken then.
    held: usize,
    /// Of the encoder's weights: what is read beyond that.
    weights: usize,
}

/// What looking at pictures is planned beside.
struct Beside<'a> {
    config: &'a Config,
    format: WeightFormat,
    /// Bytes of the encoder's weights.
    encoder: usize,
    /// Bytes of the cache when it holds so many positions.
    cache: &'a dyn Fn(usize) -> usize,
    context: usize,
    /// Bytes of the decoder's activations.
    activations: usize,
}

impl Beside<'_> {
    /// What looking takes at a moment when the decoder has not taken `free` bytes of what it takes in the end:
    /// a picture of `crops` is encoded, and pixels of `waiting` others are held. Features not counted.
    fn looking(&self, crops: usize, waiting: usize, free: usize) -> Looking {
        let (hidden, vision) = (self.config.hidden_size, self.config.vision.as_ref());
        let works = vision.map_or(0, |v| v.activation_bytes(hidden, crops, self.format));
        let works = works.saturating_add(waiting.saturating_mul(CROP_LEN));
        Looking {
            held: works.saturating_sub(free),
            weights: (self.encoder).saturating_sub(free.saturating_sub(works)),
        }
    }
}

impl PictureMemory {
    /// That of some pictures that are looked at first.
    #[must_use]
    pub fn of(pictures: &[Processed]) -> Self {
        let crops = pictures.iter().map(Processed::crops);
        let all = crops.clone().sum::<usize>();
        match crops.max() {
            None => Self::Without,
            Some(crops) => Self::First {
                crops,
                waiting: all - crops,
                rows: pictures.iter().map(Processed::tokens).sum(),
            },
        }
    }

    /// Positions of a context that pictures take.
    fn rows(self, context: usize) -> usize {
        match self {
            Self::Without => 0,
            Self::First { rows, .. } => rows,
            Self::Anytime { .. } => context,
        }
    }

    fn looking(self, beside: &Beside<'_>) -> Looking {
        let full = (beside.cache)(beside.context);
        let looking = match self {
            Self::Without => return Looking::default(),
            Self::First { crops, waiting, .. } => {
                beside.looking(crops, waiting, full.saturating_add(beside.activations))
            }
            // The pictures of a question have `all` crops together. Few leave most to the cache, many take most
            // themselves.
            Self::Anytime { fewest, most } => (fewest..=beside.context / TILE_TOKENS)
                .map(|all| {
                    let held = beside.context.saturating_sub(layout::fewest_tokens(all));
                    let free = full.saturating_sub((beside.cache)(held));
                    let largest = all.min(most);
                    beside.looking(largest, all - largest, free)
                })
                .max_by_key(|looking| looking.held + looking.weights)
                .unwrap_or_default(),
        };
        let row = beside.config.hidden_size * size_of::<f32>();
        let features = self.rows(beside.context).saturating_mul(row);
        Looking {
            held: looking.held.saturating_add(features),
            ..looking
        }
    }

    /// What they take on a device, whose cache is held as a whole from the start, beside a decoder of so many bytes
    /// of activations.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(
        self,
        config: &Config,
        format: WeightFormat,
        context: usize,
        activations: usize,
    ) -> usize {
        let looking = self.looking(&Beside {
            config,
            format,
            encoder: 0, // among the weights, which stay
            cache: &|_| 0,
            context,
            activations,
        });
        looking.held
    }

    /// Bytes of the embedding table that a full context reads, where a row touches `row` bytes of pages: a
    /// position has a row of it or one of a picture's features.
    fn embedded(self, config: &Config, context: usize, row: usize) -> usize {
        match self {
            // Whichever is larger; the features are counted already.
            Self::Anytime { .. } => row
                .saturating_sub(config.hidden_size * size_of::<f32>())
                .saturating_mul(context),
            _ => row.saturating_mul(context.saturating_sub(self.rows(context))),
        }
    }
}

/// Bytes of pages that a row may lie on: it may begin near the end of one. Pages of 4 KiB, the smallest
/// there are where these programs run.
fn pages_of_row(bytes: usize) -> usize {
    const PAGE: usize = 4096;
    (bytes.div_ceil(PAGE) + 1) * PAGE
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
    let hidden = |positions: usize| shape.hidden_bytes(kind, positions.saturating_sub(chunk));
    let dropped = |positions| match options.drop_hidden {
        true => hidden(positions),
        false => 0,
    };
    let cache = |positions| shape.bytes(kind, positions) - dropped(positions);
    let activations = activation_bytes(config, format, chunk);
    let pageable = weights.pageable;
    let pictures = options.pictures.looking(&Beside {
        config,
        format,
        encoder: pageable.encoder,
        cache: &cache,
        context,
        activations,
    });
    let experts = (config.moe).map_or(0, |moe| pageable.experts / moe.experts * PICKS);
    // The kernels of packed weights have some.
    let scratch = format.packed().map_or(0, |_| {
        let kernels = options.kernels.unwrap_or_else(Kernels::best);
        (kernels.scratch_bytes()).saturating_mul(Pool::threads_of(options.threads))
    });
    let row = pages_of_row(pageable.embedding / config.vocab_size);
    let embedded = options.pictures.embedded(config, context, row);
    Ok(MemoryPlan {
        weights: weights.all,
        pageable,
        working_set: experts + embedded.min(pageable.embedding) + pictures.weights,
        kv_cache: cache(context),
        hidden: hidden(context),
        dropped: dropped(context),
        activations,
        scratch,
        pictures: pictures.held,
        recordings: 0,
        context,
    })
}

/// Bytes of activations of a chunk of `tokens`.
fn activation_bytes(c: &Config, format: WeightFormat, tokens: usize) -> usize {
    let input = |cols| Input::bytes_per_row(format.packed(), cols);
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    let qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim;
    // x, branch, heads; qkv. What is gated is counted by itself.
    let floats = 3 * hidden + qkv;
    let gated = gated_rows(tokens, inner).saturating_mul(4 * inner);
    let inputs = 2 * input(hidden) + input(inner);
    // What is normed, the router's scores and its input; of each pick gated, the expert's output, and what its
    // matrix takes.
    let experts = c.moe.map_or(0, |moe| {
        let pick = 4 * (inner + hidden) + input(inner.max(hidden));
        4 * (moe.experts + 2 * hidden) + PICKS * pick
    });
    (4 * floats + inputs + experts)
        .saturating_mul(tokens)
        .saturating_add(gated)
        .saturating_add(LOGIT_ROWS * (4 * c.vocab_size + input(hidden)))
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
    runner: Box<dyn Runner>,
    /// What it runs on, if that is the CPU.
    cpu: Option<Cpu>,
    /// The whole sequence; as many as the cache holds are in it. [`PLACEHOLDER`] where pictures stand.
    ids: Vec<u32>,
    /// The pictures of the sequence, in order.
    pictures: Vec<Placed>,
    /// The factors the cached keys were rotated with.
    regime: Regime,
    context: usize,
    chunk: usize,
    crossing: Crossing,
    drop_hidden: bool,
    /// Those after the last token, `[vocab]`.
    logits: Vec<f32>,
    cancel: Cancel,
    progress: Option<Box<dyn FnMut(Prefill) + Send>>,
}

impl Session {
    /// A session with an empty sequence.
    /// # Errors
    /// A context beyond the model's, a plan that does not fit in memory, threads that cannot be had.
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Self, Error> {
        let plan = Self::plan(&model, options)?;
        #[cfg(feature = "cuda")]
        if let Some(resident) = model.resident() {
            let runner = model.runner(resident, options, &plan)?;
            return Ok(Self::of(
                Arc::clone(&model),
                options,
                plan.context,
                runner,
                None,
            ));
        }
        if options.check_memory {
            plan.check(&phidias_engine::machine::Machine::detect())?;
        }
        let pool = Arc::new(Pool::new(options.threads)?);
        let kernels = options.kernels.unwrap_or_else(Kernels::best);
        let kv_type = options.kv_type.unwrap_or(model.format().default_kv_type());
        let cpu = Cpu::new(kernels, pool);
        let cache = KvCache::new(model.config().kv_shape(), kv_type);
        let runner = Box::new(Running::new(cpu.clone(), cache));
        Ok(Self::of(model, options, plan.context, runner, Some(cpu)))
    }

    fn of(
        model: Arc<Model>,
        options: &SessionOptions,
        context: usize,
        runner: Box<dyn Runner>,
        cpu: Option<Cpu>,
    ) -> Self {
        Self {
            runner,
            cpu,
            ids: Vec::new(),
            pictures: Vec::new(),
            regime: Regime::Short,
            context,
            chunk: options.chunk.max(1),
            crossing: options.crossing,
            drop_hidden: options.drop_hidden,
            logits: Vec::new(),
            cancel: Cancel::default(),
            progress: None,
            model,
        }
    }

    /// The memory that such a session takes when its context is full, weights included: that of the
    /// device, when the model was put on one.
    /// # Errors
    /// As [`memory_plan`].
    pub fn plan(model: &Model, options: &SessionOptions) -> Result<MemoryPlan, Error> {
        let plan = memory_plan(
            model.config(),
            model.format(),
            model.weight_bytes(),
            options,
        )?;
        #[cfg(feature = "cuda")]
        if let Some(resident) = model.resident() {
            return model.on_device(resident, options, plan);
        }
        Ok(plan)
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
    pub fn cache(&self) -> &dyn Cache {
        self.runner.cache()
    }

    /// The CPU, if it runs on that.
    #[must_use]
    pub fn cpu(&self) -> Option<&Cpu> {
        self.cpu.as_ref()
    }

    /// The device, if it runs on one.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn device(&self) -> Option<&Arc<dyn phidias_engine::kernels::cuda::Device>> {
        self.model.resident().map(|resident| resident.device())
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
    /// # Errors
    /// A device that fails.
    pub fn take_routing(&mut self) -> Result<Vec<LayerRouting>, Error> {
        self.runner.take_routing()
    }

    /// Forgets the tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.pictures.retain(|picture| picture.start < len);
        if let Some(last) = self.pictures.last_mut() {
            last.len = last.len.min(len - last.start);
        }
        self.runner.cache_mut().truncate(len);
    }

    /// Appends tokens and returns the logits after the last one, `[vocab]`.
    /// # Errors
    /// No tokens, a token outside the vocabulary, a sequence beyond the context, no memory for the
    /// cache, cancellation. The sequence is then what it was before.
    pub fn extend(&mut self, tokens: &[u32]) -> Result<&[f32], Error> {
        let mut logits = std::mem::take(&mut self.logits);
        let mut keep = |_: usize, next: Next<'_>| {
            logits.clear();
            logits.extend_from_slice(whole(next));
        };
        let want = Want {
            rows: 1,
            candidates: None,
            each: &mut keep,
        };
        let result = self.run(tokens, want, None);
        self.logits = logits;
        result.map(|()| &*self.logits)
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
        self.run(
            tokens,
            Want::each(tokens, &mut |t, next| each(t, whole(next))),
            None,
        )
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
        let mut each = |t: usize, next: Next<'_>| each(t, whole(next));
        self.run(tokens, Want::each(tokens, &mut each), Some(observe))
    }

    /// The features of pictures, for [`Piece::Picture`]; `progress` hears of the crops that are done. Pictures
    /// that will not fit in the context should be refused before: the memory plan counts on room for them.
    /// # Errors
    /// [`Error::NoVision`] when there are any and the model sees none, cancellation, a device that fails.
    pub fn encode(
        &mut self,
        pictures: &[Processed],
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<Arc<Buffer>>, Error> {
        if pictures.is_empty() {
            return Ok(Vec::new());
        }
        let model = Arc::clone(&self.model);
        let (vision, _) = model.vision()?;
        (self.runner).encode(vision, pictures, &self.cancel, progress)
    }

    fn run(
        &mut self,
        tokens: &[u32],
        want: Want<'_>,
        observe: Option<Observer<'_>>,
    ) -> Result<(), Error> {
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
            self.runner.cache_mut().reserve(total)?;
        }
        self.ids.extend_from_slice(tokens);
        let result = self.advance(before, want, observe);
        if result.is_err() {
            self.truncate(before);
        }
        result
    }

    /// Brings the cache up to `ids`, of which `before` were there.
    fn advance(
        &mut self,
        before: usize,
        want: Want<'_>,
        mut observe: Option<Observer<'_>>,
    ) -> Result<(), Error> {
        let total = self.ids.len();
        let model = Arc::clone(&self.model);
        let transformer = model.transformer();
        let short = self.cache().len() < before;
        self.enter_regime(transformer.rope.regime(total))?;
        let start = self.cache().len();
        let recomputing = match start < before {
            true if short => Some(Recomputing::Dropped),
            true => Some(Recomputing::Crossing),
            false => None,
        };
        while self.cache().len() < total {
            let first = self.cache().len();
            let end = total.min(first + self.chunk);
            if self.drop_hidden {
                // Not sooner: what the last pass computed may be truncated yet, as wrong guesses are.
                self.runner.cache_mut().drop_hidden(first);
                self.runner.cache_mut().reserve(end)?;
            }
            let chunk = Chunk {
                ids: &self.ids[first..end],
                regime: self.regime,
                pictures: &self.pictures,
                wanted: first.max(total - want.rows)..end,
                candidates: want.candidates,
                cancel: &self.cancel,
                observe: observe
                    .as_mut()
                    .map(|observe| &mut **observe as Observer<'_>),
            };
            self.runner.pass(transformer, chunk, want.each)?;
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
    fn enter_regime(&mut self, regime: Regime) -> Result<(), Error> {
        let old = std::mem::replace(&mut self.regime, regime);
        let cache = self.runner.cache_mut();
        if old == regime || cache.is_empty() {
            return Ok(());
        }
        match self.crossing {
            Crossing::Exact => cache.truncate(0),
            Crossing::Rotate => {
                let rope = &self.model.transformer().rope;
                cache
                    .update_keys(&mut |position, head| rope.change(old, regime, position, head))?;
            }
        }
        Ok(())
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
    fn extend(
        &mut self,
        tokens: &[u32],
        rows: usize,
        candidates: Option<usize>,
        each: &mut dyn FnMut(usize, Next<'_>),
    ) -> Result<(), Error> {
        let want = Want {
            rows,
            candidates,
            each,
        };
        self.run(tokens, want, None)
    }
    fn logits(&mut self, position: usize) -> Result<&[f32], Error> {
        self.runner.logits(position)
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

/// What a call wants to know.
struct Want<'a> {
    /// What may follow so many of the last tokens.
    rows: usize,
    /// How many of the likeliest tokens might do in place of all logits.
    candidates: Option<usize>,
    /// Hears of each.
    each: &'a mut dyn FnMut(usize, Next<'_>),
}

impl<'a> Want<'a> {
    /// All logits after each of some new tokens.
    fn each(tokens: &[u32], each: &'a mut dyn FnMut(usize, Next<'_>)) -> Self {
        Self {
            rows: tokens.len(),
            candidates: None,
            each,
        }
    }
}

/// All logits, where nothing else was asked for.
fn whole(next: Next<'_>) -> &[f32] {
    match next {
        Next::Logits(row) => row,
        Next::Candidates(_) => unreachable!("candidates that nobody asked for"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::pageable;
    use crate::synth::Preset;
    use crate::weights::Spec;

    /// Phi-3.5-vision in q4: 18 bytes for 32 weights of the matrices, bf16 else.
    fn published() -> (Config, WeightBytes) {
        let preset: Preset = "phi-3.5-vision".parse().unwrap();
        let config = preset.configuration(None).unwrap();
        let bytes = |spec: &Spec| {
            let elements: usize = spec.shape.iter().product();
            match spec.role.takes_format() {
                true => elements / 32 * 18,
                false => elements * 2,
            }
        };
        let specs = config.specs();
        let weights = WeightBytes {
            all: specs.iter().map(bytes).sum(),
            pageable: pageable(&config, true, |wanted| {
                let specs = specs.iter().filter(|spec| wanted(&spec.name));
                specs.map(bytes).sum()
            }),
        };
        (config, weights)
    }

    fn plan(pictures: PictureMemory) -> MemoryPlan {
        let (config, weights) = published();
        let options = SessionOptions {
            context: Some(4096),
            pictures,
            ..SessionOptions::default()
        };
        memory_plan(&config, WeightFormat::Q4, weights, &options).unwrap()
    }

    /// The goal: 4 GB for the whole model, a picture of 16 tiles, and 4096 positions.
    #[test]
    fn a_full_vision_model_takes_less_than_four_gigabytes() {
        let plan = plan(PictureMemory::First {
            crops: 17,
            waiting: 0,
            rows: 2509,
        });
        assert_eq!(plan.kv_cache, 4096 * 393_216);
        assert_eq!(plan.pageable.embedding, 32_064 * 3072 * 2);
        // The decoder's matrices, and less than 1 MB of its norms.
        let decoder = plan.weights - plan.pageable.all();
        assert!((2_093_838_336..2_094_838_336).contains(&decoder));
        // ViT-L has 0.30e9 weights in its matrices, and 0.02e9 are the projector's.
        assert!((170_000_000..195_000_000).contains(&plan.pageable.encoder));
        // The encoder works before there is a cache, so only the features are held beside it.
        assert_eq!(plan.pictures, 2509 * 3072 * 4);
        // A row of 6144 bytes touches two pages, or three; pictures need none.
        assert_eq!(plan.working_set, (4096 - 2509) * 3 * 4096);
        assert!(plan.least() < 4_000_000_000, "{plan}");
        assert!(plan.least() > 3_800_000_000, "{plan}");
    }

    /// The same goal for a conversation, whatever pictures it has and whenever they come.
    #[test]
    fn pictures_of_a_conversation_are_looked_at_beside_a_cache_with_room_for_them() {
        let text = plan(PictureMemory::Without);
        assert_eq!(text.pictures, 0);
        assert!(!text.to_string().contains("pictures"), "{text}");
        // As many features as the context has positions; each has a row of the table or one of these.
        let features = 4096 * 3072 * 4;
        assert_eq!(text.working_set, 4096 * 3 * 4096);
        let seen = |fewest| plan(PictureMemory::Anytime { fewest, most: 17 });
        // Of 16 tiles every picture takes 8 at least. Before their 1321 positions the cache has 11 blocks of
        // 16: five are more than looking takes.
        let published = seen(9);
        assert_eq!(published.pictures + published.working_set, features);
        assert!(
            published.to_string().contains(" + pictures "),
            "{published}"
        );
        assert!(published.least() < 3_850_000_000, "{published}");
        // Pictures of one tile or two may come when 15 blocks are held: one is less than looking takes.
        let small = seen(2);
        let (config, weights) = self::published();
        let vision = config.vision.as_ref().unwrap();
        let works = vision.activation_bytes(3072, 3, WeightFormat::Q4);
        let looking = works + weights.pageable.encoder - 256 * 393_216;
        assert_eq!(small.pictures + small.working_set, features + looking);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_device_holds_its_whole_cache_while_it_looks() {
        let (config, _) = published();
        let anytime = PictureMemory::Anytime {
            fewest: 9,
            most: 17,
        };
        let vision = config.vision.as_ref().unwrap();
        let works = vision.activation_bytes(3072, 17, WeightFormat::Q4);
        // 28 crops fit in the context: one picture is encoded, the pixels of 11 crops wait.
        assert_eq!(
            anytime.on_device(&config, WeightFormat::Q4, 4096, 0),
            4096 * 3072 * 4 + works + 11 * 336 * 336 * 3
        );
    }

    /// A question may have several pictures: one is encoded, the others wait as pixels.
    #[test]
    fn pictures_that_wait_are_planned() {
        let (config, weights) = published();
        let plan = |waiting| {
            let pictures = PictureMemory::First {
                crops: 5,
                waiting,
                rows: 0,
            };
            let options = SessionOptions {
                context: Some(1),
                pictures,
                ..SessionOptions::default()
            };
            memory_plan(&config, WeightFormat::Q4, weights, &options).unwrap()
        };
        // More than the one block of the cache is.
        assert_eq!(
            plan(1000).pictures - plan(900).pictures,
            100 * 336 * 336 * 3
        );
    }

    /// Each thread keeps what the table says, where weights are packed.
    #[test]
    fn scratch_is_planned_for_every_thread() {
        let (config, weights) = published();
        for isa in phidias_engine::Isa::ALL {
            let Some(kernels) = Kernels::for_isa(isa) else {
                continue;
            };
            let scratch = |format, threads| {
                let options = SessionOptions {
                    kernels: Some(kernels),
                    threads: Some(threads),
                    ..SessionOptions::default()
                };
                let plan = memory_plan(&config, format, weights, &options).unwrap();
                plan.scratch
            };
            let each = scratch(WeightFormat::Q4, 1);
            assert_eq!(each > 0, isa == phidias_engine::Isa::Amx, "{isa}");
            assert_eq!(scratch(WeightFormat::Q8, 3), 3 * each);
            assert_eq!(scratch(WeightFormat::F32, 3), 0);
        }
    }

    /// With next to no cache the encoder is what takes most.
    #[test]
    fn a_small_context_still_holds_the_encoder() {
        let (config, weights) = published();
        let pictures = PictureMemory::First {
            crops: 17,
            waiting: 0,
            rows: 0,
        };
        let options = SessionOptions {
            context: Some(1),
            pictures,
            ..SessionOptions::default()
        };
        let plan = memory_plan(&config, WeightFormat::Q4, weights, &options).unwrap();
        let works = config.vision.as_ref().unwrap();
        let works = works.activation_bytes(3072, 17, WeightFormat::Q4);
        let later = plan.kv_cache + plan.activations;
        // One block of the cache is less than the encoder and what it works with.
        assert!(later < works + weights.pageable.encoder);
        assert_eq!(plan.pictures, works.saturating_sub(later));
        let encoder = weights.pageable.encoder - later.saturating_sub(works);
        assert_eq!(plan.working_set, 3 * 4096 + encoder);
    }
}
