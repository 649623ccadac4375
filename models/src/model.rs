//! A model: configuration, weights, tokenizer, opened from a folder.

use crate::config::{Config, GenerationConfig, PreprocessorConfig};
use crate::error::Error;
use crate::format::WeightFormat;
use crate::image::ImageProcessor;
use crate::quantize::{CACHE_FROM_BYTES, quantized};
use crate::text::{Builtin, ChatTemplate, TextError, Tokenizer};
use crate::transformer::Transformer;
use crate::vision::{self, Vision};
use crate::weights::{EMBED, HEAD, Role, Spec, Weights, has_own_head};
#[cfg(feature = "cuda")]
use phidias_engine::backend::cuda::Resident;
use phidias_engine::checkpoint::Checkpoint;
use phidias_engine::checkpoint::prepack::{Entry, Prepack, Treatment};
use phidias_engine::machine::Machine;
use phidias_engine::memory::{MemoryPlan, Pageable};
use phidias_engine::pool::Pool;
use phidias_engine::tensor::{DType, Tensor};
use phidias_engine::{Bytes, Cancel};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// Matrices of more bytes than this are quantized to q4 when no format is asked for: a model that
/// large is limited by memory bandwidth on a CPU, and a quarter of the bytes is four times the speed.
pub const AUTO_Q4_BYTES: usize = 1 << 30;

/// Where the weights of a model lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In the system's pages of their file: read when first needed, shared between processes, dropped when
    /// memory is short.
    #[default]
    Mapped,
    /// In memory of this process, read at once. Faster where the system keeps files in small pages
    /// (`docs/performance.md`).
    Copied,
}

/// How to open a model.
#[derive(Default)]
pub struct OpenOptions<'a> {
    /// What to multiply in; `None`: as stored, or q4 when that is over [`AUTO_Q4_BYTES`].
    pub format: Option<WeightFormat>,
    /// Folder for weights that were quantized while loading; `None`: keep them in memory only.
    pub cache: Option<PathBuf>,
    /// Where the weights lie.
    pub placement: Placement,
    /// Threads that quantize or copy; `None`: as many as this process may use.
    pub threads: Option<usize>,
    /// Stops the quantization or the copy.
    pub cancel: Cancel,
    /// Told how far the quantization or the copy is: bytes done, bytes in all.
    pub progress: Option<&'a mut dyn FnMut(usize, usize)>,
}

/// What the weights of a model take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// All of them.
    pub all: usize,
    /// Of these: tensors in mapped files, whose pages need not all be in memory.
    pub pageable: Pageable,
}

/// How much of the mapped weights is in memory, from samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Bytes of mapped weights.
    pub mapped: usize,
    /// Of these: in memory.
    pub resident: usize,
}

/// A model, ready for sessions. Weights are shared between them.
pub struct Model {
    path: PathBuf,
    config: Config,
    generation: GenerationConfig,
    format: WeightFormat,
    /// Where the weights are.
    checkpoint: Checkpoint,
    transformer: Transformer,
    vision: Option<(Vision, ImageProcessor)>,
    text: Option<Text>,
    stop_tokens: BTreeSet<u32>,
    weight_bytes: WeightBytes,
    note: Option<String>,
    /// The weights on a device, once they were put there.
    #[cfg(feature = "cuda")]
    resident: Option<Arc<Resident>>,
}

/// What turns text into tokens and back.
#[derive(Clone, Debug)]
pub struct Text {
    /// Tokenizer.
    pub tokenizer: Tokenizer,
    /// Chat template: the folder's own, or the built-in one that fits the tokenizer.
    pub template: ChatTemplate,
}

impl Text {
    /// Reads the text files of a folder; `None` when it has no tokenizer.
    /// # Errors
    /// Files that are not what they should be.
    pub fn open(folder: &Path) -> Result<Option<Self>, TextError> {
        let Some(tokenizer) = Tokenizer::open(folder)? else {
            return Ok(None);
        };
        let template = ChatTemplate::open(folder, Builtin::fitting(&tokenizer))?;
        Ok(Some(Self {
            tokenizer,
            template,
        }))
    }

    /// Text files built into the program; `name` is for messages.
    /// # Errors
    /// As [`Text::open`].
    pub fn from_bytes(
        name: &str,
        tokenizer: &[u8],
        tokenizer_config: &[u8],
    ) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_bytes(tokenizer, Some(tokenizer_config), name)?;
        let fallback = Builtin::fitting(&tokenizer);
        Ok(Self {
            tokenizer,
            template: ChatTemplate::from_config(tokenizer_config, name, fallback)?,
        })
    }
}

/// A model folder before its weights are chosen: configuration and mapped tensors.
pub struct Source {
    /// Configuration.
    pub config: Config,
    /// Generation defaults.
    pub generation: GenerationConfig,
    /// How pictures are prepared, for models that see them.
    pub preprocessor: Option<PreprocessorConfig>,
    /// Tensors.
    pub checkpoint: Checkpoint,
}

impl Source {
    /// Reads a folder.
    /// # Errors
    /// A folder that is not there or not a model, a configuration or container that is refused.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        if !folder.is_dir() {
            let path = folder.to_owned();
            return Err(if folder.exists() {
                Error::NotAFolder { path }
            } else {
                Error::NoFolder { path }
            });
        }
        let config = Config::open(folder)?;
        let generation = GenerationConfig::open(folder)?;
        Ok(Self {
            config,
            generation,
            preprocessor: PreprocessorConfig::open(folder)?,
            checkpoint: Checkpoint::open(folder)?,
        })
    }

    /// A model built into the program; `name` is for messages.
    /// # Errors
    /// As [`Source::open`].
    pub fn from_bytes(
        name: &str,
        config: &[u8],
        generation: &[u8],
        weights: Bytes,
    ) -> Result<Self, Error> {
        let path = |file: &str| Path::new(name).join(file);
        Ok(Self {
            config: Config::from_json(&path("config.json"), config)?,
            generation: GenerationConfig::from_json(&path("generation_config.json"), generation)?,
            preprocessor: None,
            checkpoint: Checkpoint::from_bytes(
                &path("model.safetensors").to_string_lossy(),
                weights,
            )?,
        })
    }

    /// The format its matrices are stored in.
    #[must_use]
    pub fn stored_format(&self) -> WeightFormat {
        match self.checkpoint.packed_format() {
            Some(format) => format.into(),
            None => match self.checkpoint.get(EMBED).map(|t| t.dtype()) {
                Some(DType::F32) => WeightFormat::F32,
                _ => WeightFormat::Bf16,
            },
        }
    }

    /// The format it is run in: the asked one, or the default.
    fn choose(&self, asked: Option<WeightFormat>) -> Result<WeightFormat, Error> {
        let stored = self.stored_format();
        match (asked, stored.packed()) {
            (None, None) if self.checkpoint.bytes() > AUTO_Q4_BYTES => Ok(WeightFormat::Q4),
            (None, _) => Ok(stored),
            (Some(asked), Some(_)) if asked != stored => Err(Error::Format {
                path: self.checkpoint.path().to_owned(),
                asked,
                found: stored.name(),
            }),
            (Some(asked), _) => Ok(asked),
        }
    }

    /// The format that asking for `format` gives, and the bytes of the weights in it. Weights that are to
    /// be converted are taken to be kept in a cache, and mapped, where they are worth it.
    /// # Errors
    /// A format that the folder cannot be run in, tensors that are not as the configuration says.
    pub fn planned(
        &self,
        format: Option<WeightFormat>,
    ) -> Result<(WeightFormat, WeightBytes), Error> {
        let format = self.choose(format)?;
        Weights::check(&self.config.specs(), &self.checkpoint)?;
        let bytes = match self.conversion(format) {
            Some(entries) => {
                let plan = Prepack::plan(&self.checkpoint, entries)?;
                // A tied head is packed into a matrix of its own.
                let own_head = !self.config.tie_word_embeddings || format.packed().is_some();
                WeightBytes {
                    all: plan.bytes(),
                    pageable: match self.checkpoint.bytes() >= CACHE_FROM_BYTES {
                        true => pageable(&self.config, own_head, |wanted| plan.bytes_of(wanted)),
                        false => Pageable::default(),
                    },
                }
            }
            None => weight_bytes(&self.config, &self.checkpoint),
        };
        Ok((format, bytes))
    }

    /// What becomes of each tensor when a source runs in `format`; `None` when all stay.
    fn conversion(&self, format: WeightFormat) -> Option<Vec<Entry>> {
        if self.stored_format().packed().is_some() {
            None
        } else {
            self.entries(format)
        }
    }

    /// What becomes of each tensor in `format`; `None` when all stay as they are.
    pub(crate) fn entries(&self, format: WeightFormat) -> Option<Vec<Entry>> {
        let mut changed = false;
        let mut entries = Vec::new();
        for spec in self.specs_in(format) {
            let source = self.stored_as(&spec).to_owned();
            let stored = self.checkpoint.get(&source).map(|t| t.dtype());
            let treatment = treatment(spec.role, stored, format);
            changed |= treatment != Treatment::Keep;
            entries.push(Entry {
                name: spec.name,
                source,
                treatment,
            });
        }
        changed.then_some(entries)
    }

    /// The tensors of a model that runs in `format`: a tied head that is packed is one of its own.
    fn specs_in(&self, format: WeightFormat) -> Vec<Spec> {
        let mut specs = self.config.specs();
        if self.config.tie_word_embeddings && format.packed().is_some() {
            let shape = vec![self.config.vocab_size, self.config.hidden_size];
            specs.push(Spec {
                name: HEAD.into(),
                shape,
                role: Role::Matrix,
            });
        }
        specs
    }

    /// The name of the tensor that one is made from.
    fn stored_as<'s>(&self, spec: &'s Spec) -> &'s str {
        match spec.name == HEAD && self.config.tie_word_embeddings {
            true => EMBED,
            false => &spec.name,
        }
    }

    /// The tensors of a model that runs in `format`, and what their elements are then.
    #[cfg(feature = "cuda")]
    pub(crate) fn tensors_in(&self, format: WeightFormat) -> Vec<(Spec, DType)> {
        let packed = self.stored_format().packed().is_some();
        let specs = self.specs_in(format).into_iter();
        let dtype = |spec: &Spec| {
            if packed {
                return Some(self.checkpoint.get(&spec.name)?.dtype());
            }
            let stored = self.checkpoint.get(self.stored_as(spec))?.dtype();
            Some(match treatment(spec.role, Some(stored), format) {
                Treatment::Keep => stored,
                Treatment::Pack(format) => DType::Packed(format),
                Treatment::Cast(dtype) => dtype,
            })
        };
        specs
            .filter_map(|spec| dtype(&spec).map(|dtype| (spec, dtype)))
            .collect()
    }
}

/// What becomes of a tensor of some role, stored as it is, in `format`.
pub(crate) fn treatment(role: Role, stored: Option<DType>, format: WeightFormat) -> Treatment {
    match format.packed() {
        _ if !role.takes_format() => Treatment::Keep,
        Some(packed) => Treatment::Pack(packed),
        None if format == WeightFormat::Bf16 && stored == Some(DType::F32) => {
            Treatment::Cast(DType::Bf16)
        }
        None => Treatment::Keep,
    }
}

impl Model {
    /// Opens a folder of the Hugging Face layout, or one that `quantize` wrote.
    /// # Errors
    /// [`Error`], naming file, tensor, expected and found.
    pub fn open(folder: &Path, options: OpenOptions<'_>) -> Result<Self, Error> {
        // Parsing a large tokenizer takes longer than mapping the weights: both at once.
        let (source, text) = std::thread::scope(|scope| {
            let text = scope.spawn(|| Text::open(folder));
            (
                Source::open(folder),
                text.join().expect("a parser that returns its errors"),
            )
        });
        Self::from_source(source?, text?, options)
    }

    /// Makes a model of a source.
    /// # Errors
    /// As [`Model::open`].
    pub fn from_source(
        source: Source,
        text: Option<Text>,
        mut options: OpenOptions<'_>,
    ) -> Result<Self, Error> {
        let format = source.choose(options.format)?;
        Weights::check(&source.config.specs(), &source.checkpoint)?;
        let stop_tokens = stop_tokens(&source, text.as_ref())?;
        let stored = source.stored_format();
        let entries = if stored.packed().is_some() {
            None
        } else {
            source.entries(format)
        };
        let mut note = None;
        let checkpoint = match entries {
            None => source.checkpoint.clone(),
            Some(entries) => {
                let plan = Prepack::plan(&source.checkpoint, entries)?;
                quantized(&source.checkpoint, &plan, format, &mut options, &mut note)?
            }
        };
        let checkpoint = match options.placement {
            Placement::Mapped => checkpoint,
            Placement::Copied => copied(&checkpoint, &mut options)?,
        };
        let weights = Weights::check(&source.config.specs(), &checkpoint)?;
        let transformer = source.config.family.load(&source.config, &weights)?;
        let vision = match &source.config.vision {
            None => None,
            Some(config) => {
                let preprocessor = source.preprocessor.unwrap_or_default();
                let vision = Vision::load(config, &weights)?;
                Some((vision, ImageProcessor::new(&preprocessor)))
            }
        };
        Ok(Self {
            path: source.checkpoint.path().to_owned(),
            weight_bytes: weight_bytes(&source.config, &checkpoint),
            config: source.config,
            generation: source.generation,
            format,
            checkpoint,
            transformer,
            vision,
            text,
            stop_tokens,
            note,
            #[cfg(feature = "cuda")]
            resident: None,
        })
    }

    /// The folder, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// Its generation defaults.
    #[must_use]
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }
    /// What it multiplies in.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.format
    }
    /// Its tokenizer and chat template.
    /// # Errors
    /// [`Error::NoTokenizer`] when the folder has none.
    pub fn text(&self) -> Result<&Text, Error> {
        self.text.as_ref().ok_or_else(|| Error::NoTokenizer {
            path: self.path.clone(),
        })
    }
    /// Tokens that end an answer: those of `config.json`, of `generation_config.json`, of the
    /// tokenizer, and the one the chat template ends a turn with. Each source alone is known to be
    /// incomplete in some published folder.
    #[must_use]
    pub fn stop_tokens(&self) -> &BTreeSet<u32> {
        &self.stop_tokens
    }
    /// Its weights.
    #[must_use]
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }
    /// Its side that sees pictures, and what prepares them.
    /// # Errors
    /// [`Error::NoVision`] for a model that reads text only.
    pub fn vision(&self) -> Result<(&Vision, &ImageProcessor), Error> {
        match &self.vision {
            Some((vision, processor)) => Ok((vision, processor)),
            None => Err(Error::NoVision {
                path: self.path.clone(),
                family: self.config.family,
            }),
        }
    }
    /// Bytes of its weights.
    #[must_use]
    pub fn weight_bytes(&self) -> WeightBytes {
        self.weight_bytes
    }
    /// How much of its mapped weights is in memory now; `None` where nothing is mapped, or the system does
    /// not tell. Takes milliseconds.
    #[must_use]
    pub fn residency(&self) -> Option<Residency> {
        /// Bytes that one sampled page stands for in a large matrix.
        const SAMPLED: usize = 1 << 20;
        let mut sum = Residency {
            mapped: 0,
            resident: 0,
        };
        for (_, tensor) in self.checkpoint.tensors() {
            let bytes = tensor.bytes();
            let samples = (bytes.len() / SAMPLED).max(4);
            if let Some(share) = bytes.resident_share(samples) {
                sum.mapped += bytes.len();
                sum.resident += (share * bytes.len() as f64) as usize;
            }
        }
        (sum.mapped > 0).then_some(sum)
    }
    /// Takes the mapped weights that look at pictures out of this process's memory: until the next picture
    /// nobody reads them. They come back when they are touched.
    pub fn release_encoder(&self) {
        let tensors = self.checkpoint.tensors();
        (tensors.filter(|(name, _)| name.starts_with(vision::PREFIX)))
            .for_each(|(_, tensor)| tensor.bytes().release());
    }
    /// Its weights on a device, where its sessions then run.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn resident(&self) -> Option<&Arc<Resident>> {
        self.resident.as_ref()
    }
    /// Whether its sessions multiply matrices that were widened to f32, whatever the file has: a device does
    /// when f32 is asked for.
    #[must_use]
    pub fn widens(&self) -> bool {
        #[cfg(feature = "cuda")]
        let on_device = self.resident.is_some();
        #[cfg(not(feature = "cuda"))]
        let on_device = false;
        on_device && self.format == WeightFormat::F32
    }
    #[cfg(feature = "cuda")]
    pub(crate) fn set_resident(&mut self, resident: Arc<Resident>) {
        self.resident = Some(resident);
    }
    /// Something the user should know about the opening: where quantized weights were kept.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}

/// The weights in memory of this process; refused before it is taken when it cannot be had.
fn copied(checkpoint: &Checkpoint, options: &mut OpenOptions<'_>) -> Result<Checkpoint, Error> {
    let mapped = |tensor: &Tensor| tensor.bytes().is_mapped();
    if !checkpoint.tensors().any(|(_, tensor)| mapped(tensor)) {
        return Ok(checkpoint.clone());
    }
    let plan = MemoryPlan {
        weights: checkpoint.bytes(),
        ..MemoryPlan::default()
    };
    plan.check(&Machine::detect())?;
    let mut ignore = |_: usize, _: usize| {};
    let progress: &mut dyn FnMut(usize, usize) = match &mut options.progress {
        Some(progress) => progress,
        None => &mut ignore,
    };
    let pool = Pool::new(options.threads)?;
    Ok(checkpoint.copied(&pool, &options.cancel, progress)?)
}

/// What the weights of a checkpoint take.
fn weight_bytes(config: &Config, checkpoint: &Checkpoint) -> WeightBytes {
    let mapped = |wanted: Wanted<'_>| {
        let tensors = (checkpoint.tensors())
            .filter(|(name, tensor)| wanted(name) && tensor.bytes().is_mapped());
        tensors.map(|(_, tensor)| tensor.bytes().len()).sum()
    };
    WeightBytes {
        all: checkpoint.bytes(),
        pageable: pageable(config, has_own_head(config, checkpoint), mapped),
    }
}

/// Chooses tensors by their names.
pub(crate) type Wanted<'a> = &'a dyn Fn(&str) -> bool;

/// The weights that not every token reads. `own_head`: whether the head is a tensor of its own; the
/// embedding table is read as a whole where it serves as one.
pub(crate) fn pageable(
    config: &Config,
    own_head: bool,
    bytes: impl Fn(Wanted<'_>) -> usize,
) -> Pageable {
    let experts = config.family.experts(config);
    Pageable {
        experts: bytes(&|name| experts.contains(name)),
        embedding: bytes(&|name| own_head && name == EMBED),
        encoder: bytes(&|name| name.starts_with(vision::PREFIX)),
    }
}

fn stop_tokens(source: &Source, text: Option<&Text>) -> Result<BTreeSet<u32>, TextError> {
    let mut stop: BTreeSet<u32> = source.config.eos_token_ids.iter().copied().collect();
    stop.extend(&source.generation.eos_token_ids);
    if let Some(Text {
        tokenizer,
        template,
    }) = text
    {
        tokenizer.check_rows(source.config.vocab_size)?;
        stop.extend(tokenizer.eos_id());
        stop.extend(template.stop_tokens(tokenizer)?);
    }
    Ok(stop)
}
