//! A model: configuration, weights, tokenizer, opened from a folder.

use crate::config::{Config, ConfigError, GenerationConfig};
use crate::phi3::{self, Role};
use crate::text::{Builtin, ChatTemplate, TextError, Tokenizer};
use crate::transformer::Transformer;
use phidias_engine::cancel::Cancel;
use phidias_engine::checkpoint::prepack::{Entry, Prepack, Treatment};
use phidias_engine::checkpoint::{Checkpoint, CheckpointError};
use phidias_engine::kv_cache::{KvOutOfMemory, KvType};
use phidias_engine::machine::free_disk;
use phidias_engine::memory::DoesNotFit;
use phidias_engine::pool::{Pool, PoolError};
use phidias_engine::tensor::DType;
use phidias_engine::{Bytes, Format};
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Why a model does not open or does not run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what each field is")]
pub enum Error {
    #[error("{}: no such folder", path.display())]
    NoFolder { path: PathBuf },
    #[error("{}: a file, expected a model folder", path.display())]
    NotAFolder { path: PathBuf },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("{}: the folder has no tokenizer.json, so it takes token ids only (--tokens)", path.display())]
    NoTokenizer { path: PathBuf },
    #[error("{}: holds {found} weights and cannot be run as {asked}; name the original folder", path.display())]
    Format {
        path: PathBuf,
        asked: WeightFormat,
        found: &'static str,
    },
    #[error("{}: the weights are {found} already; quantize the original folder", path.display())]
    AlreadyPacked { path: PathBuf, found: &'static str },
    #[error("{}: already there; name a folder that does not exist", path.display())]
    Exists { path: PathBuf },
    #[error("{}: needs {needed} bytes, the file system has {available} free", path.display())]
    DiskSpace {
        path: PathBuf,
        needed: u64,
        available: u64,
    },
    #[error("{asked} layers: expected 1 to {max}, the layers of {preset}")]
    Layers {
        preset: &'static str,
        asked: usize,
        max: usize,
    },
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "context of {asked} positions: expected 1 to {max}, the model's max_position_embeddings"
    )]
    Context { asked: usize, max: usize },
    #[error("the sequence has {tokens} tokens, the context holds {context}")]
    TooLong { tokens: usize, context: usize },
    #[error("token {id} is outside the vocabulary of {vocab}")]
    TokenId { id: u32, vocab: usize },
    #[error("no tokens")]
    NoTokens,
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Memory(#[from] DoesNotFit),
    #[error(transparent)]
    Kv(#[from] KvOutOfMemory),
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// What the matrices are multiplied in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// As stored, widened to f32 while multiplying; the cache in f32 too. For exact comparison.
    F32,
    /// 16-bit: bf16 (or f16 where the checkpoint has that), f32 activations.
    Bf16,
    /// int8 blocks of 32 with int8 activations.
    Q8,
    /// int4 blocks of 32 with int8 activations.
    Q4,
}

impl WeightFormat {
    /// Every format there is.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Q8, Self::Q4];

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The block format, for those that have one.
    #[must_use]
    pub fn packed(self) -> Option<Format> {
        match self {
            Self::F32 | Self::Bf16 => None,
            Self::Q8 => Some(Format::Q8),
            Self::Q4 => Some(Format::Q4),
        }
    }
}

impl WeightFormat {
    /// What the KV cache stores when nothing else is asked: f32 for exact comparison, else f16.
    #[must_use]
    pub fn default_kv_type(self) -> KvType {
        if self == Self::F32 {
            KvType::F32
        } else {
            KvType::F16
        }
    }
}

impl From<Format> for WeightFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Q4 => Self::Q4,
            Format::Q8 => Self::Q8,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is not a format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown format '{0}'; expected f32, bf16, q8 or q4")]
pub struct UnknownFormat(String);

impl FromStr for WeightFormat {
    type Err = UnknownFormat;
    fn from_str(s: &str) -> Result<Self, UnknownFormat> {
        Self::ALL
            .into_iter()
            .find(|f| f.name() == s)
            .ok_or_else(|| UnknownFormat(s.to_owned()))
    }
}

/// Matrices of more bytes than this are quantized to q4 when no format is asked for: a model that
/// large is limited by memory bandwidth on a CPU, and a quarter of the bytes is four times the speed.
pub const AUTO_Q4_BYTES: usize = 1 << 30;

/// A source smaller than this is quantized in memory at every start; a file would save nothing.
const CACHE_FROM_BYTES: usize = 32 << 20;

/// How to open a model.
#[derive(Default)]
pub struct OpenOptions<'a> {
    /// What to multiply in; `None`: as stored, or q4 when that is over [`AUTO_Q4_BYTES`].
    pub format: Option<WeightFormat>,
    /// Folder for weights that were quantized while loading; `None`: keep them in memory only.
    pub cache: Option<PathBuf>,
    /// Threads that quantize; `None`: as many as this process may use.
    pub threads: Option<usize>,
    /// Stops the quantization.
    pub cancel: Cancel,
    /// Told how far the quantization is: bytes done, bytes in all.
    pub progress: Option<&'a mut dyn FnMut(usize, usize)>,
}

/// A model, ready for sessions. Weights are shared between them.
pub struct Model {
    path: PathBuf,
    config: Config,
    generation: GenerationConfig,
    format: WeightFormat,
    transformer: Transformer,
    text: Option<Text>,
    stop_tokens: BTreeSet<u32>,
    weight_bytes: usize,
    note: Option<String>,
}

/// What turns text into tokens and back.
#[derive(Clone, Debug)]
pub struct Text {
    /// Tokenizer.
    pub tokenizer: Tokenizer,
    /// Chat template: the folder's own, or the built-in one of Phi-3.5.
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
        Ok(Some(Self {
            tokenizer,
            template: ChatTemplate::open(folder, Builtin::Phi35Mini)?,
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
        Ok(Self {
            tokenizer: Tokenizer::from_bytes(tokenizer, Some(tokenizer_config), name)?,
            template: ChatTemplate::from_config(tokenizer_config, name, Builtin::Phi35Mini)?,
        })
    }
}

/// A model folder before its weights are chosen: configuration and mapped tensors.
pub struct Source {
    /// Configuration.
    pub config: Config,
    /// Generation defaults.
    pub generation: GenerationConfig,
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
            None => match self.checkpoint.get(phi3::EMBED).map(|t| t.dtype()) {
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

    /// The format that asking for `format` gives, and the bytes of the weights in it.
    /// # Errors
    /// A format that the folder cannot be run in, tensors that are not as the configuration says.
    pub fn planned(&self, format: Option<WeightFormat>) -> Result<(WeightFormat, usize), Error> {
        let format = self.choose(format)?;
        check_shapes(&self.config, &self.checkpoint)?;
        let bytes = match self.conversion(format) {
            Some(entries) => Prepack::plan(&self.checkpoint, entries)?.bytes(),
            None => self.checkpoint.bytes(),
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
    fn entries(&self, format: WeightFormat) -> Option<Vec<Entry>> {
        let mut changed = false;
        let mut entries = Vec::new();
        let mut specs = phi3::specs(&self.config);
        if self.config.tie_word_embeddings && format.packed().is_some() {
            let shape = vec![self.config.vocab_size, self.config.hidden_size];
            specs.push(phi3::Spec {
                name: phi3::HEAD.into(),
                shape,
                role: Role::Matrix,
            });
        }
        for spec in specs {
            let tied = spec.name == phi3::HEAD && self.config.tie_word_embeddings;
            let source = if tied {
                phi3::EMBED.to_owned()
            } else {
                spec.name.clone()
            };
            let stored = self.checkpoint.get(&source).map(|t| t.dtype());
            let treatment = match (spec.role, format.packed()) {
                (Role::Matrix, Some(packed)) => Treatment::Pack(packed),
                (Role::Matrix, None)
                    if format == WeightFormat::Bf16 && stored == Some(DType::F32) =>
                {
                    Treatment::Cast(DType::Bf16)
                }
                _ => Treatment::Keep,
            };
            changed |= treatment != Treatment::Keep;
            entries.push(Entry {
                name: spec.name,
                source,
                treatment,
            });
        }
        changed.then_some(entries)
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
        check_shapes(&source.config, &source.checkpoint)?;
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
        let transformer = phi3::load(&source.config, &checkpoint)?;
        Ok(Self {
            path: source.checkpoint.path().to_owned(),
            weight_bytes: checkpoint.bytes(),
            config: source.config,
            generation: source.generation,
            format,
            transformer,
            text,
            stop_tokens,
            note,
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
    /// Bytes of all weights.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }
    /// Something the user should know about the opening: where quantized weights were kept.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
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

/// Every tensor that the configuration asks for is there and has the right shape.
fn check_shapes(config: &Config, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    phi3::specs(config)
        .iter()
        .try_for_each(|spec| checkpoint.tensor(&spec.name, &spec.shape).map(|_| ()))
}

/// Weights in another format than stored: from the cache, into the cache, or in memory.
fn quantized(
    source: &Checkpoint,
    plan: &Prepack<'_>,
    format: WeightFormat,
    options: &mut OpenOptions<'_>,
    note: &mut Option<String>,
) -> Result<Checkpoint, Error> {
    let mut ignore = |_: usize, _: usize| {};
    let pool = Pool::new(options.threads)?;
    let progress: &mut dyn FnMut(usize, usize) = match &mut options.progress {
        Some(progress) => progress,
        None => &mut ignore,
    };
    if let Some(folder) = options
        .cache
        .as_deref()
        .filter(|_| source.bytes() >= CACHE_FROM_BYTES)
    {
        let Some(key) = source_key(source.path()) else {
            return in_memory(source, plan, &pool, &options.cancel, progress);
        };
        let file = folder.join(format!(
            "{key}-{format}-v{}.safetensors",
            phidias_engine::PACKED_VERSION
        ));
        // A cached file that is damaged, or is another's, is written again.
        if let Some(checkpoint) = (Checkpoint::open_file(&file).ok()).filter(|c| plan.describes(c))
        {
            *note = Some(format!("weights in {format} from {}", file.display()));
            return Ok(checkpoint);
        }
        match write_file(&file, plan, &pool, &options.cancel, progress) {
            Ok(()) => {
                *note = Some(format!("weights in {format} kept in {}", file.display()));
                return Ok(Checkpoint::open_file(&file)?);
            }
            Err(Error::Io { path, source })
            | Err(Error::Checkpoint(CheckpointError::Io { path, source })) => {
                *note = Some(format!(
                    "weights in {format} could not be kept for the next start: {}: {source}",
                    path.display()
                ));
            }
            Err(full @ Error::DiskSpace { .. }) => {
                *note = Some(format!(
                    "weights in {format} could not be kept for the next start: {full}"
                ));
            }
            Err(other) => return Err(other),
        }
    }
    in_memory(source, plan, &pool, &options.cancel, progress)
}

fn in_memory(
    source: &Checkpoint,
    plan: &Prepack<'_>,
    pool: &Pool,
    cancel: &Cancel,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Checkpoint, Error> {
    let bytes = plan.to_memory(pool, cancel, progress)?;
    Ok(Checkpoint::from_bytes(
        &source.path().to_string_lossy(),
        bytes,
    )?)
}

/// Refuses a file that the file system of `folder` has no room for.
fn check_room(folder: &Path, path: &Path, needed: u64) -> Result<(), Error> {
    match free_disk(folder) {
        Some(available) if available < needed => Err(Error::DiskSpace {
            path: path.to_owned(),
            needed,
            available,
        }),
        _ => Ok(()),
    }
}

/// Writes under a temporary name and renames: a reader sees the whole file or none. A disk without
/// room for it is refused before the first byte.
pub(crate) fn write_file(
    file: &Path,
    plan: &Prepack<'_>,
    pool: &Pool,
    cancel: &Cancel,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    let folder = file.parent().unwrap_or(Path::new("."));
    let io = |source| Error::Io {
        path: folder.to_owned(),
        source,
    };
    fs::create_dir_all(folder).map_err(io)?;
    check_room(folder, file, plan.bytes() as u64)?;
    let mut temporary = not_private(tempfile::Builder::new().prefix(".quantizing-"), 0o666)
        .tempfile_in(folder)
        .map_err(io)?;
    plan.write(temporary.as_file_mut(), file, pool, cancel, progress)?;
    temporary.persist(file).map_err(|e| io(e.error))?;
    Ok(())
}

/// Temporary files are private; this one becomes a model, which others may read where the user's
/// mask lets them.
fn not_private<'b>(
    builder: &'b mut tempfile::Builder<'static, 'static>,
    mode: u32,
) -> &'b mut tempfile::Builder<'static, 'static> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(mode))
    }
    #[cfg(not(unix))]
    {
        let _ = mode;
        builder
    }
}

/// Identity of the source: its place, and name, size and time of change of every weight file.
fn source_key(folder: &Path) -> Option<String> {
    // FNV-1a, 64 bits: the same in every build of the program, unlike the standard hasher.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    let folder = folder.canonicalize().ok()?;
    add(folder.as_os_str().as_encoded_bytes());
    let mut files: Vec<_> = fs::read_dir(&folder)
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()))
        .collect();
    files.sort();
    for file in files.iter().filter(|f| {
        f.extension()
            .is_some_and(|e| e == "safetensors" || e == "json")
    }) {
        let meta = fs::metadata(file).ok()?;
        let time = meta
            .modified()
            .ok()?
            .duration_since(std::time::UNIX_EPOCH)
            .ok()?;
        add(file.file_name()?.as_encoded_bytes());
        add(&meta.len().to_le_bytes());
        add(&time.as_nanos().to_le_bytes());
    }
    let name: String = (folder.file_name()?.to_string_lossy().chars())
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-._".contains(c) {
                c
            } else {
                '_'
            }
        })
        .take(64)
        .collect();
    Some(format!("{}-{hash:016x}", name.trim_start_matches('.')))
}

/// Writes `out` as a prepacked folder: the weights of `folder` in `format`, and the small files
/// beside them as they are. The folder appears whole or not at all.
/// # Errors
/// A folder that is there already, one that is packed already, a disk without room for it (before
/// anything is written) or that fills up meanwhile, cancellation.
pub fn quantize_folder(
    folder: &Path,
    out: &Path,
    format: WeightFormat,
    options: &mut OpenOptions<'_>,
) -> Result<(), Error> {
    let source = Source::open(folder)?;
    if let Some(found) = source.checkpoint.packed_format() {
        return Err(Error::AlreadyPacked {
            path: folder.to_owned(),
            found: found.name(),
        });
    }
    check_shapes(&source.config, &source.checkpoint)?;
    let keep = || {
        phi3::specs(&source.config)
            .into_iter()
            .map(|s| Entry {
                source: s.name.clone(),
                name: s.name,
                treatment: Treatment::Keep,
            })
            .collect()
    };
    let plan = Prepack::plan(
        &source.checkpoint,
        source.entries(format).unwrap_or_else(keep),
    )?;
    let mut ignore = |_: usize, _: usize| {};
    let progress: &mut dyn FnMut(usize, usize) = match &mut options.progress {
        Some(progress) => progress,
        None => &mut ignore,
    };
    let pool = Pool::new(options.threads)?;
    new_folder(out, |temporary| {
        write_file(
            &temporary.join(phidias_engine::checkpoint::SINGLE),
            &plan,
            &pool,
            &options.cancel,
            progress,
        )?;
        copy_small_files(folder, temporary)
    })
}

/// Fills a folder under a temporary name beside `out` and renames it.
/// # Errors
/// [`Error::Exists`], or what `fill` or the file system say; nothing is left then.
pub fn new_folder(out: &Path, fill: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let exists = || Error::Exists {
        path: out.to_owned(),
    };
    if out.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let io = |source| Error::Io {
        path: out.to_owned(),
        source,
    };
    fs::create_dir_all(parent).map_err(io)?;
    let temporary = not_private(tempfile::Builder::new().prefix(".phidias-"), 0o777)
        .tempdir_in(parent)
        .map_err(io)?;
    fill(temporary.path()).map_err(|error| match error {
        // The temporary name would tell the user nothing.
        Error::DiskSpace {
            needed, available, ..
        } => Error::DiskSpace {
            path: out.to_owned(),
            needed,
            available,
        },
        other => other,
    })?;
    fs::rename(temporary.path(), out).map_err(io)?;
    // Renamed away: nothing is left to remove.
    let _ = temporary.keep();
    Ok(())
}

/// Configuration, tokenizer and licence files: everything small that is not weights.
fn copy_small_files(from: &Path, to: &Path) -> Result<(), Error> {
    const KINDS: [&str; 6] = ["json", "jinja", "model", "tiktoken", "md", "txt"];
    const LARGEST: u64 = 64 << 20;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    for entry in fs::read_dir(from).map_err(io(from))? {
        let path = entry.map_err(io(from))?.path();
        let meta = fs::metadata(&path).map_err(io(&path))?;
        let kind = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let Some(name) = path
            .file_name()
            .filter(|n| *n != phidias_engine::checkpoint::INDEX)
        else {
            continue;
        };
        if meta.is_file() && meta.len() <= LARGEST && (KINDS.contains(&kind) || name == "LICENSE") {
            let target = to.join(name);
            fs::copy(&path, &target).map_err(io(&target))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_refused_with_both_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        check_room(folder.path(), &file, 1).unwrap();
        let error = check_room(folder.path(), &file, u64::MAX).unwrap_err();
        assert!(
            matches!(&error, Error::DiskSpace { needed: u64::MAX, available, path }
                if *available > 0 && *path == file),
            "{error}"
        );
    }
}
