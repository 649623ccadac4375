//! The command line as types.

use super::pictures::Pictures;
use clap::builder::{NonEmptyStringValueParser, Resettable};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use phidias::WeightFormat;
use phidias::engine::Isa;
use phidias::engine::kv_cache::KvType;
use phidias::engine::sampling::{ParamError, SamplingParams};
use std::io;
use std::path::{Path, PathBuf};

/// Phi-3 / 3.5 language models on ordinary CPUs.
///
/// MODEL is a folder in the Hugging Face layout, a Hugging Face id (org/name), or absent: then the
/// demonstration model that is built in answers.
#[derive(Debug, Parser)]
#[command(name = "phidias", version, arg_required_else_help = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub global: Global,
}

impl Arguments {
    /// What the program was called with. Ends the process at bad usage, and after `--help`.
    pub fn read() -> Self {
        let mut command = Self::command();
        // An empty variable is one that is not set.
        if std::env::var_os("PHIDIAS_ISA").is_some_and(|isa| isa.is_empty()) {
            command = command.mut_arg("isa", |isa| isa.env(Resettable::Reset));
        }
        let matches = command.try_get_matches_from_mut(std::env::args_os());
        let matches = matches.unwrap_or_else(|error| leave(&error));
        let arguments = Self::from_arg_matches(&matches).and_then(|arguments| {
            arguments.check().map_err(|reason| {
                let name = matches.subcommand_name().expect("one is required");
                let command = command.find_subcommand_mut(name).expect("it was parsed");
                command.error(ErrorKind::ValueValidation, reason)
            })?;
            Ok(arguments)
        });
        arguments.unwrap_or_else(|error| leave(&error))
    }

    /// What no single value says.
    fn check(&self) -> Result<(), String> {
        if let Command::Run(args) = &self.command {
            super::run::check(args)?;
        }
        if let Command::Embed(Embed { picture, .. }) = &self.command
            && picture.images.len() != 1
        {
            let found = picture.images.len();
            return Err(format!("--image: expected one picture, found {found}"));
        }
        self.check_revision()?;
        if let Command::Eval(Eval { running, .. }) = &self.command
            && running.ctx == Some(1)
        {
            return Err(
                "--ctx 1: expected at least 2, a token and the one that it is predicted from"
                    .into(),
            );
        }
        let (Command::Run(Run { sampling, .. }) | Command::Chat(Chat { sampling, .. })) =
            &self.command
        else {
            return Ok(());
        };
        in_range(&SamplingParams {
            logit_bias: sampling.logit_bias.clone(),
            ..SamplingParams::default()
        })
    }
}

impl Arguments {
    /// A revision is one of a model that is fetched: there has to be one.
    fn check_revision(&self) -> Result<(), String> {
        let Some(revision) = &self.global.revision else {
            return Ok(());
        };
        let models = self.command.models();
        if models.iter().any(|model| !Path::new(model).exists()) {
            return Ok(());
        }
        let found = match models.first() {
            Some(folder) => format!("the folder {folder}, which has none"),
            None => "no MODEL".to_owned(),
        };
        Err(format!(
            "--revision {revision}: expected a model named by its Hugging Face id (org/name), found {found}"
        ))
    }
}

impl Command {
    /// The models that are named.
    fn models(&self) -> Vec<&str> {
        let (model, other) = match self {
            Self::Run(args) => (super::run::model(args), None),
            Self::Eval(args) => (args.model.as_deref(), args.against.as_deref()),
            Self::Chat(Chat { model, .. })
            | Self::Inspect(Inspect { model, .. })
            | Self::Logits(Logits { model, .. })
            | Self::Bench(Bench { model, .. }) => (model.as_deref(), None),
            Self::Quantize(Quantize { model, .. }) | Self::Embed(Embed { model, .. }) => {
                (Some(model.as_str()), None)
            }
            Self::Synth(_) => (None, None),
        };
        model.into_iter().chain(other).collect()
    }
}

/// Prints the help that was asked for, or what is wrong, and ends the process.
fn leave(error: &clap::Error) -> ! {
    let code = match error.print() {
        Err(cause) if !error.use_stderr() && cause.kind() != io::ErrorKind::BrokenPipe => {
            super::console::say(format_args!("error: stdout: {cause}"));
            1
        }
        _ => error.exit_code(),
    };
    std::process::exit(code)
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer one prompt
    Run(Run),
    /// Talk with a model, turn by turn
    Chat(Chat),
    /// Write a prepacked folder: int4 or int8 weights in the order the kernels read
    Quantize(Quantize),
    /// Show tensors, formats, sizes and the memory plan
    Inspect(Inspect),
    /// Write the logits after every token of a prompt to a safetensors file
    Logits(Logits),
    /// Write what a vision model's decoder sees of a picture to a safetensors file
    Embed(Embed),
    /// Write a folder with random weights in a published model's exact shapes
    Synth(Synth),
    /// Measure perplexity and bits per byte, and how far another format or model is away
    Eval(Eval),
    /// Measure how fast a model runs, as a share of what this machine can do
    Bench(Bench),
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Instruction set of the kernels [default: the best this CPU has]
    #[arg(
        long,
        global = true,
        env = "PHIDIAS_ISA",
        hide_env_values = true,
        value_name = "ISA"
    )]
    pub isa: Option<Isa>,
    /// Where to compute
    #[arg(long, global = true, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Threads [default: physical cores, within the affinity mask and the cgroup's quota]
    #[arg(long, global = true, value_name = "N", allow_negative_numbers = true, value_parser = threads)]
    pub threads: Option<usize>,
    /// Read the weights into memory of this process instead of mapping their file: a slower start and no
    /// sharing, but faster answers where the system keeps files in small pages
    #[arg(long, global = true)]
    pub copy_weights: bool,
    /// Print nothing but the answer and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Branch, tag or commit of a model named by its Hugging Face id
    #[arg(long, global = true, value_name = "REV")]
    pub revision: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// This machine's processor
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
    /// The GPU when there is one, the CPU otherwise
    Auto,
    /// The GPU's kernels, one thread after another on the CPU: very slow, for tests and for readers
    #[cfg(feature = "cuda")]
    #[value(hide = true)]
    Host,
}

/// How a model is run.
#[derive(Debug, Args)]
pub struct Running {
    /// f32, bf16, q8 or q4 [default: as stored; q4 when that is over 1 GiB]
    #[arg(long, value_name = "F")]
    pub format: Option<WeightFormat>,
    /// Most tokens of prompt and answer together [default: the model's, at most 8192]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = positive)]
    pub ctx: Option<usize>,
    /// What the KV cache stores: f32, f16, bf16 or int8 [default: f16; f32 with --format f32]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    pub kv: Option<KvType>,
    /// When a LongRoPE sequence outgrows its original length: `exact` computes the cache again once,
    /// as the reference gives it; `rotate` turns cached keys in place, faster and approximate (the
    /// keys' angles become right, but deeper layers keep what they saw before)
    #[arg(long, value_enum, default_value_t = RopeCrossing::Exact)]
    pub rope_crossing: RopeCrossing,
    /// Give back the blocks of the KV cache that no later token can see (block-sparse layers, sliding
    /// windows): the same answer in less memory; going back in a conversation computes it again
    #[arg(long)]
    pub drop_hidden_keys: bool,
    /// Run a model that does not fit in memory: its weights are read from disk again for each token, or
    /// the system swaps. Needless for the experts of a mixture, which may stay on disk
    #[arg(long)]
    pub allow_swap: bool,
}

/// What else to print.
#[derive(Clone, Copy, Debug, Args)]
pub struct Statistics {
    /// Of a mixture of experts: how the tokens were spread over them, as one JSON object on stderr, of
    /// bench one for each test; with --json as the field "routing". It holds "tokens_per_expert", for each
    /// layer the tokens of each expert (two experts for a token), and "expert_reads", for each layer how
    /// often an expert was read: once for each pass in which it had a token. bench counts all repetitions
    /// together, without the warm-up
    #[arg(long, value_name = "json", value_enum)]
    pub stats: Option<Stats>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stats {
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RopeCrossing {
    Exact,
    Rotate,
}

/// How tokens are chosen. What is not given comes from the model's generation_config.json, which
/// for Phi-3 means the likeliest token each time.
#[derive(Debug, Args)]
pub struct Sampling {
    /// Most tokens of an answer
    #[arg(
        short = 'n',
        long = "max-tokens",
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = whole,
        default_value_t = 1024
    )]
    pub max_tokens: usize,
    /// Temperature; 0 takes the likeliest token each time
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = parameter(|p| &mut p.temperature))]
    pub temp: Option<f32>,
    /// Choose among the K likeliest tokens; 0: all
    #[arg(long, value_name = "K", allow_negative_numbers = true, value_parser = whole)]
    pub top_k: Option<usize>,
    /// Choose among the likeliest tokens up to this probability together
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = parameter(|p| &mut p.top_p))]
    pub top_p: Option<f32>,
    /// Choose among tokens of at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = parameter(|p| &mut p.min_p))]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens seen before by this; 1: off
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = parameter(|p| &mut p.repeat_penalty))]
    pub repeat_penalty: Option<f32>,
    /// Subtract this for each time a token was seen; 0: off
    #[arg(
        long,
        value_name = "R",
        allow_negative_numbers = true,
        value_parser = parameter(|p| &mut p.frequency_penalty),
        default_value_t = 0.0
    )]
    pub frequency_penalty: f32,
    /// Subtract this once for a token seen before; 0: off
    #[arg(
        long,
        value_name = "R",
        allow_negative_numbers = true,
        value_parser = parameter(|p| &mut p.presence_penalty),
        default_value_t = 0.0
    )]
    pub presence_penalty: f32,
    /// Seed of the random choices [default: another one each time, printed]
    #[arg(long, value_name = "S", allow_negative_numbers = true, value_parser = seed)]
    pub seed: Option<u64>,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "STR", value_parser = NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Add B to the logit of token ID; may be given several times
    #[arg(long, value_name = "ID=B", value_parser = logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Where the last tokens have stood before in prompt or answer, guess up to N tokens that follow
    /// and check them in one pass: the same answer, sooner when it repeats something; 0: off
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = lookup)]
    pub lookup: usize,
}

#[derive(Debug, Args)]
pub struct Run {
    /// Folder or Hugging Face id; `-` reads the prompt from stdin
    #[arg(value_name = "MODEL", num_args = 0..=2)]
    pub model: Vec<String>,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub pictures: Pictures,
    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Print one JSON object instead of the text
    #[arg(long)]
    pub json: bool,
    /// With --json: log-probabilities of each token and of the N likeliest ones
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole, requires = "json")]
    pub logprobs: Option<usize>,
    #[command(flatten)]
    pub statistics: Statistics,
    #[command(flatten)]
    pub running: Running,
    #[command(flatten)]
    pub sampling: Sampling,
}

#[derive(Debug, Args)]
pub struct Chat {
    /// Folder or Hugging Face id
    pub model: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub running: Running,
    #[command(flatten)]
    pub sampling: Sampling,
}

#[derive(Debug, Args)]
pub struct Quantize {
    /// Folder or Hugging Face id
    pub model: String,
    /// New folder
    pub out: PathBuf,
    /// q4, q8 or bf16
    #[arg(long, value_name = "F")]
    pub format: WeightFormat,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// Folder or Hugging Face id
    pub model: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub running: Running,
}

#[derive(Debug, Args)]
pub struct Logits {
    /// Folder or Hugging Face id
    pub model: Option<String>,
    /// Token ids, separated by commas
    #[arg(
        long,
        value_name = "IDS",
        value_delimiter = ',',
        allow_negative_numbers = true,
        value_parser = token,
        required_unless_present = "prompt"
    )]
    pub tokens: Vec<u32>,
    /// The prompt
    #[arg(
        short,
        long,
        value_name = "TEXT",
        conflicts_with = "tokens",
        allow_hyphen_values = true
    )]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub pictures: Pictures,
    /// Take the prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// safetensors file to write: input_ids [n] i64, logits [n, vocab] f32
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    pub running: Running,
}

#[derive(Debug, Args)]
pub struct Embed {
    /// Folder or Hugging Face id
    pub model: String,
    #[command(flatten)]
    pub picture: Pictures,
    /// safetensors file to write: features [tokens, hidden] f32
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// f32, bf16, q8 or q4 [default: as stored; q4 when that is over 1 GiB]
    #[arg(long, value_name = "F")]
    pub format: Option<WeightFormat>,
}

#[derive(Debug, Args)]
pub struct Synth {
    /// Name of a published model, such as phi-3.5-mini
    pub preset: String,
    /// New folder
    pub out: PathBuf,
    /// Format of the matrices
    #[arg(long, value_name = "F", default_value = "bf16")]
    pub format: WeightFormat,
    /// Fewer layers than the published model
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = positive)]
    pub layers: Option<usize>,
    /// Seed of the weights
    #[arg(long, value_name = "S", allow_negative_numbers = true, value_parser = seed, default_value_t = 0)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct Eval {
    /// Folder or Hugging Face id
    pub model: Option<String>,
    /// Text to measure on
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Also measure how far the model is from this one
    #[arg(long, value_name = "MODEL")]
    pub against: Option<String>,
    /// Also measure how far the model is from itself in this format
    #[arg(long, value_name = "F", conflicts_with = "against")]
    pub against_format: Option<WeightFormat>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub statistics: Statistics,
    #[command(flatten)]
    pub running: Running,
}

#[derive(Debug, Args)]
pub struct Bench {
    /// Folder or Hugging Face id
    #[arg(conflicts_with_all = ["synth", "peaks", "kernels"])]
    pub model: Option<String>,
    /// Random weights in a published model's shapes, such as phi-3.5-mini; kept for the next time
    #[arg(long, value_name = "PRESET", conflicts_with_all = ["peaks", "kernels"])]
    pub synth: Option<String>,
    /// With --synth: fewer layers than the published model
    #[arg(long, value_name = "N", requires = "synth")]
    pub layers: Option<usize>,
    /// f32, bf16, q8 or q4 [default: as `run` has it; q4 with --synth]
    #[arg(long, value_name = "F", conflicts_with_all = ["peaks", "kernels"])]
    pub format: Option<WeightFormat>,
    /// What the KV cache stores: f32, f16, bf16 or int8 [default: f16; f32 with --format f32]
    #[arg(long, value_name = "TYPE", value_parser = kv_type, conflicts_with_all = ["peaks", "kernels"])]
    pub kv: Option<KvType>,
    /// Prefill: tokens of a prompt, computed together [default, without -p, -n and --lookup: -p 512 -n 128]
    #[arg(short, long = "prompt-tokens", value_name = "N", value_delimiter = ',', value_parser = count, conflicts_with_all = ["peaks", "kernels"])]
    pub prompt: Vec<usize>,
    /// Decode: tokens one after the other
    #[arg(short = 'n', long = "new-tokens", value_name = "N", value_delimiter = ',', value_parser = count, conflicts_with_all = ["peaks", "kernels"])]
    pub new: Vec<usize>,
    /// Tokens in the cache before each test
    #[arg(short, long, value_name = "DEPTH", value_delimiter = ',', value_parser = depth, default_value = "0", conflicts_with_all = ["peaks", "kernels"])]
    pub depth: Vec<usize>,
    /// Repetitions, after a warm-up
    #[arg(short, long = "reps", value_name = "REPS", value_parser = repetitions, default_value = "3", conflicts_with_all = ["peaks", "kernels"])]
    pub repetitions: usize,
    /// Prompt lookup, at most N tokens guessed for a pass: tokens a pass and a second on a text that
    /// repeats itself and on one that does not, against none; after the tests of -p and -n, or alone
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = lookup, conflicts_with_all = ["peaks", "kernels", "stats"])]
    pub lookup: Vec<usize>,
    /// Only a picture: what each stage takes until the decoder could begin
    #[arg(long, value_name = "FILE", conflicts_with_all = ["peaks", "kernels", "prompt", "new", "lookup", "kv", "stats"])]
    pub image: Option<PathBuf>,
    /// With --image: tiles that it may be cut into [default: the model's]
    #[arg(long, value_name = "N", requires = "image")]
    pub num_crops: Option<usize>,
    /// Numbers of threads, each measured [default: physical cores, within the affinity mask and the
    /// cgroup's quota; with --peaks also 1]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = threads)]
    pub threads: Vec<usize>,
    /// Only the machine's own limits: read bandwidth, and multiply-adds in registers
    #[arg(long, conflicts_with = "stats")]
    pub peaks: bool,
    /// Only the kernels, each alone, at the shapes of Phi-3.5-mini and of Phi-3-small's attention
    #[arg(long, conflicts_with_all = ["peaks", "stats"])]
    pub kernels: bool,
    /// With --kernels: draw them as a roofline
    #[arg(long, value_name = "FILE.svg", requires = "kernels")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub statistics: Statistics,
    /// Print one JSON object a line instead of the table
    #[arg(long)]
    pub json: bool,
    /// Measure the limits in no time, and so wrongly: for tests of the program
    #[arg(long, hide = true)]
    pub rough_peaks: bool,
}

fn kv_type(name: &str) -> Result<KvType, String> {
    let unknown = || format!("unknown type '{name}'; expected f32, f16, bf16 or int8");
    KvType::ALL
        .into_iter()
        .find(|t| t.name() == name)
        .ok_or_else(unknown)
}

fn threads(text: &str) -> Result<usize, String> {
    number(text, 1, phidias::engine::pool::MAX_THREADS)
}

/// More tokens than any model has positions.
const MAX_TOKENS: usize = 1 << 24;
const MAX_REPETITIONS: usize = 1000;

fn count(text: &str) -> Result<usize, String> {
    number(text, 1, MAX_TOKENS)
}

fn depth(text: &str) -> Result<usize, String> {
    number(text, 0, MAX_TOKENS)
}

fn repetitions(text: &str) -> Result<usize, String> {
    number(text, 1, MAX_REPETITIONS)
}

fn token(text: &str) -> Result<u32, String> {
    let id = text.parse();
    id.map_err(|_| {
        format!(
            "'{text}' is no token id; expected numbers from 0 to {}",
            u32::MAX
        )
    })
}

fn whole(text: &str) -> Result<usize, String> {
    number(text, 0, usize::MAX)
}

fn positive(text: &str) -> Result<usize, String> {
    number(text, 1, usize::MAX)
}

fn seed(text: &str) -> Result<u64, String> {
    let seed = text.parse();
    seed.map_err(|_| format!("expected 0 to {}", u64::MAX))
}

fn number(text: &str, min: usize, max: usize) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| (min..=max).contains(n));
    number.ok_or_else(|| format!("expected {min} to {max}"))
}

fn lookup(text: &str) -> Result<usize, String> {
    let max = phidias::engine::lookup::MAX_LOOKUP;
    let count = text.parse().ok().filter(|n| (0..=max).contains(n));
    count.ok_or_else(|| format!("expected 0 to {max}"))
}

/// A number in the range that the sampler accepts.
fn parameter(
    field: fn(&mut SamplingParams) -> &mut f32,
) -> impl Fn(&str) -> Result<f32, String> + Clone + Send + Sync {
    move |text| {
        let value = text.parse().map_err(|_| "expected a number".to_owned())?;
        let mut params = SamplingParams::default();
        *field(&mut params) = value;
        in_range(&params).map(|()| value)
    }
}

fn in_range(params: &SamplingParams) -> Result<(), String> {
    params
        .validate(ANY_VOCABULARY)
        .map_err(|error| match error {
            ParamError::OutOfRange { expected, .. } => format!("expected {expected}"),
            error => error.to_string(),
        })
}

/// As many tokens as ids can name: what a model has of them is known when it is open.
const ANY_VOCABULARY: usize = u32::MAX as usize;

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text
        .split_once('=')
        .and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    let bias = parsed.ok_or_else(|| "expected ID=B, such as 13=-2.5".to_owned())?;
    in_range(&SamplingParams {
        logit_bias: vec![bias],
        ..SamplingParams::default()
    })
    .map(|()| bias)
}
