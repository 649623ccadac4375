//! From the command line's words to a model and a session.

use super::args::{Global, RopeCrossing, Running, Sampling};
use super::console::{Bar, Console, Unit};
use super::device::{self, Devices};
use super::signals;
use anyhow::{Context, Result, bail};
use phidias::engine::machine::Machine;
use phidias::engine::memory::{DoesNotFit, Fit, MemoryPlan, Size};
use phidias::engine::pool::Pool;
use phidias::engine::{Cancel, Isa, Kernels};
use phidias::models::session::{PictureMemory, Prefill, Recomputing};
use phidias::models::{Crossing, Placement, Source};
use phidias::{GenerateOptions, Model, OpenOptions, Session, SessionOptions, WeightFormat};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What every command needs: where to print, what stops it, what to compute with.
pub struct Setup {
    pub console: Console,
    pub cancel: Cancel,
    pub kernels: &'static Kernels,
    pub threads: Option<usize>,
    pub devices: Devices,
    placement: Placement,
    revision: Option<String>,
}

/// Where the weights come from.
pub enum Origin {
    Folder(PathBuf),
    #[cfg(feature = "fable")]
    BuiltIn,
}

impl Origin {
    /// The folder, where it is one.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(folder) => Some(folder),
            #[cfg(feature = "fable")]
            Self::BuiltIn => None,
        }
    }
}

impl Setup {
    pub fn new(global: &Global) -> Result<Self> {
        let kernels = match global.isa {
            None => Kernels::best(),
            Some(isa) => Kernels::for_isa(isa).with_context(|| {
                let has: Vec<_> = Isa::ALL
                    .into_iter()
                    .filter(|i| i.is_available())
                    .map(Isa::name)
                    .collect();
                format!(
                    "--isa {isa}: this CPU cannot run it; it can run: {}",
                    has.join(", ")
                )
            })?,
        };
        Ok(Self {
            console: Console::new(global.quiet),
            cancel: signals::cancelling(),
            kernels,
            threads: global.threads,
            devices: Devices::new(global)?,
            placement: match global.copy_weights {
                true => Placement::Copied,
                false => Placement::Mapped,
            },
            revision: global.revision.clone(),
        })
    }

    /// The same for a model that is run so.
    pub fn to_run(global: &Global, running: &Running) -> Result<Self> {
        let mut setup = Self::new(global)?;
        (setup.devices).prefer_cpu_for(running.kv, running.drop_hidden_keys);
        Ok(setup)
    }

    /// Finds MODEL: the built-in one when there is none.
    pub fn locate(&self, model: Option<&str>) -> Result<Origin> {
        match model {
            Some(model) => self.folder(model).map(Origin::Folder),
            None => built_in(self.console),
        }
    }

    /// Finds the folder of MODEL, fetching it when it is a Hugging Face id.
    pub fn folder(&self, model: &str) -> Result<PathBuf> {
        match Path::new(model).exists() {
            true => Ok(model.into()),
            false => self.fetch(model),
        }
    }

    #[cfg(feature = "hub")]
    fn fetch(&self, model: &str) -> Result<PathBuf> {
        use phidias::hub;
        if !hub::is_model_id(model) {
            bail!("{model}: no such folder, and not a Hugging Face id (org/name)");
        }
        let options = hub::HubOptions::from_env()?;
        let mut bar: Option<(String, Bar)> = None;
        let mut progress = |progress: hub::Progress<'_>| {
            let (_, bar) = match &mut bar {
                Some(current) if current.0 == progress.file => current,
                other => other.insert((
                    progress.file.to_owned(),
                    self.console.bar(progress.file, Unit::Bytes),
                )),
            };
            bar.set(progress.done, progress.total);
        };
        // What came so far stays, and the next start goes on from there.
        Ok(signals::waiting(|| {
            hub::fetch(model, self.revision.as_deref(), &options, &mut progress)
        })?)
    }

    #[cfg(not(feature = "hub"))]
    fn fetch(&self, model: &str) -> Result<PathBuf> {
        let _ = &self.revision;
        bail!("{model}: no such folder (this build cannot download: it lacks the feature 'hub')")
    }

    /// Opens a model, quantizing it when the format asks for that, and puts it on the device.
    pub fn open(&self, origin: &Origin, format: Option<WeightFormat>) -> Result<Arc<Model>> {
        let what = match self.placement {
            Placement::Mapped => "quantizing",
            Placement::Copied => "reading the weights",
        };
        let mut bar = self.console.bar(what, Unit::Bytes);
        let mut progress = |done: usize, total: usize| bar.set(done as u64, Some(total as u64));
        let options = OpenOptions {
            format,
            cache: cache_folder(),
            placement: self.placement,
            threads: self.threads,
            cancel: self.cancel.clone(),
            progress: Some(&mut progress),
        };
        let mut model = match origin {
            Origin::Folder(folder) => Model::open(folder, options)?,
            #[cfg(feature = "fable")]
            Origin::BuiltIn => phidias::models::fable::open(options)?,
        };
        if let Some(note) = model.note() {
            self.console.note(note);
        }
        drop(bar);
        let Self {
            devices,
            console,
            cancel,
            ..
        } = self;
        devices.place(&mut model, *console, cancel)?;
        Ok(Arc::new(model))
    }

    /// Starts a session and prints what it runs on and what it will take.
    pub fn session(
        &self,
        model: &Arc<Model>,
        running: &Running,
        pictures: PictureMemory,
    ) -> Result<Session> {
        let options = SessionOptions {
            pictures,
            ..self.session_options(running)
        };
        let plan = Session::plan(model, &options).map_err(device::or_cpu)?;
        let on = device::of(model).unwrap_or_else(|| {
            let count = options.threads;
            let threads = count.unwrap_or_else(|| Machine::detect().threads());
            let plural = if threads == 1 { "" } else { "s" };
            format!("{} kernels, {threads} thread{plural}", self.kernels.isa())
        });
        self.console.note(format_args!(
            "{}: {} weights, {on}",
            model.path().display(),
            model.format(),
        ));
        self.console.note(format_args!("memory: {plan}"));
        let check_memory = self.admit(model, &plan, running)?;
        self.tell_residency(model);
        let options = SessionOptions {
            check_memory,
            ..options
        };
        let mut session = Session::new(Arc::clone(model), &options).map_err(device::or_cpu)?;
        session.set_cancel(self.cancel.clone());
        session.set_progress(self.prefill_progress());
        Ok(session)
    }

    /// A session that only looks at pictures.
    pub fn encoder(&self, model: &Arc<Model>, pictures: PictureMemory) -> Result<Session> {
        let options = SessionOptions {
            context: Some(1),
            threads: self.threads,
            kernels: Some(self.kernels),
            pictures,
            ..SessionOptions::default()
        };
        let mut session = Session::new(Arc::clone(model), &options).map_err(device::or_cpu)?;
        session.set_cancel(self.cancel.clone());
        Ok(session)
    }

    /// Threads, as many as were asked for.
    pub fn pool(&self) -> Result<Pool> {
        Ok(Pool::new(self.threads).map_err(phidias::Error::from)?)
    }

    /// Says when the disk will be read; refuses what does not fit, unless that is wanted. On a device the
    /// session has to look itself, and nothing is wanted beyond its memory: whether that is so.
    pub fn admit(&self, model: &Model, plan: &MemoryPlan, running: &Running) -> Result<bool> {
        if let Some(device) = device::of(model) {
            if running.drop_hidden_keys {
                bail!(device::keeps_all(&device));
            }
            return Ok(true);
        }
        let machine = Machine::detect();
        match plan.check(&machine) {
            Ok(Fit::Whole) => {}
            Ok(Fit::WithDisk) => self.console.note(beyond_memory(plan, &machine)),
            Err(error) if running.allow_swap => {
                self.console.note(format_args!("--allow-swap: {error}"));
            }
            Err(error) => bail!(refusal(&error)),
        }
        Ok(false)
    }

    /// Says how much of the mapped weights is in memory, where they are read from there.
    pub fn tell_residency(&self, model: &Model) {
        if device::of(model).is_some() {
            return;
        }
        if let Some(now) = model.residency() {
            let share = 100.0 * now.resident as f64 / now.mapped as f64;
            let [resident, mapped] = [now.resident, now.mapped].map(Size);
            self.console.note(format_args!(
                "resident: {resident} of {mapped} of mapped weights ({share:.0} %)"
            ));
        }
    }

    pub fn session_options(&self, running: &Running) -> SessionOptions {
        SessionOptions {
            context: running.ctx,
            kv_type: running.kv,
            crossing: match running.rope_crossing {
                RopeCrossing::Exact => Crossing::Exact,
                RopeCrossing::Rotate => Crossing::Rotate,
            },
            threads: self.threads,
            kernels: Some(self.kernels),
            drop_hidden: running.drop_hidden_keys,
            check_memory: !running.allow_swap,
            ..SessionOptions::default()
        }
    }

    /// Draws a bar for prompts of several chunks, and says when the cache is computed again.
    fn prefill_progress(&self) -> impl FnMut(Prefill) + Send + use<> {
        let console = self.console;
        let mut bar: Option<Bar> = None;
        move |p| {
            if p.done == p.total {
                bar = None;
                match p.recomputing {
                    Some(Recomputing::Crossing) => console.note(format_args!(
                        "the sequence outgrew the model's original length: {} tokens computed again with the long factors",
                        p.total
                    )),
                    Some(Recomputing::Dropped) => console.note(format_args!(
                        "the conversation went back to keys that were dropped: {} tokens computed again",
                        p.total
                    )),
                    None => {}
                }
                return;
            }
            let what = if p.recomputing.is_some() {
                "computing the cache again"
            } else {
                "reading the prompt"
            };
            bar.get_or_insert_with(|| console.bar(what, Unit::Tokens))
                .set(p.done as u64, Some(p.total as u64));
        }
    }
}

/// The line about weights that do not all fit in memory.
pub fn beyond_memory(plan: &MemoryPlan, machine: &Machine) -> String {
    let available = machine.memory_available.unwrap_or(0);
    let available = Size(usize::try_from(available).unwrap_or(usize::MAX));
    format!(
        "more than the {available} that can be had: of {} of pageable weights, what is not resident is read from disk when it is needed",
        Size(plan.pageable.all())
    )
}

/// Why a plan is refused, and what would have it run.
pub fn refusal(error: &DoesNotFit) -> String {
    format!("{error}; --allow-swap runs it all the same")
}

/// The options of an answer: what the command line says, else what the model's own file says.
pub fn generate_options(
    model: &Model,
    sampling: &Sampling,
    console: Console,
) -> Result<GenerateOptions> {
    let mut options = phidias::default_options(model);
    options.max_new_tokens = sampling.max_tokens;
    options.stop_strings = sampling.stop.clone();
    options.lookup = sampling.lookup;
    let chosen = &mut options.sampling;
    fn given<T: Copy>(to: &mut T, value: Option<T>) {
        *to = value.unwrap_or(*to);
    }
    given(&mut chosen.temperature, sampling.temp);
    given(&mut chosen.top_k, sampling.top_k);
    given(&mut chosen.top_p, sampling.top_p);
    given(&mut chosen.min_p, sampling.min_p);
    given(&mut chosen.repeat_penalty, sampling.repeat_penalty);
    chosen.frequency_penalty = sampling.frequency_penalty;
    chosen.presence_penalty = sampling.presence_penalty;
    chosen.logit_bias = sampling.logit_bias.clone();
    chosen.seed = sampling.seed.unwrap_or_else(random_seed);
    if sampling.seed.is_none() && chosen.temperature > 0.0 {
        console.note(format_args!("seed: {}", chosen.seed));
    }
    chosen.validate(model.config().vocab_size)?;
    Ok(options)
}

/// Another one each time; short enough to type again.
fn random_seed() -> u64 {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = time.map_or(0, |t| t.as_nanos() as u64);
    (nanos ^ u64::from(std::process::id()) << 32) % 1_000_000_007
}

#[cfg(feature = "fable")]
fn built_in(console: Console) -> Result<Origin> {
    console.note("no MODEL given: the built-in demonstration model answers (phidias run org/name or a folder for a real one)");
    Ok(Origin::BuiltIn)
}

#[cfg(not(feature = "fable"))]
fn built_in(_: Console) -> Result<Origin> {
    bail!(
        "no MODEL given, and this build has no demonstration model (it lacks the feature 'fable')"
    )
}

/// A source without its text files, for commands that only look at tensors.
pub fn open_source(origin: &Origin) -> Result<Source> {
    Ok(match origin {
        Origin::Folder(folder) => Source::open(folder)?,
        #[cfg(feature = "fable")]
        Origin::BuiltIn => phidias::models::fable::source()?,
    })
}

/// `$PHIDIAS_CACHE`, or `phidias` in the user's cache directory.
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    variable("PHIDIAS_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|c| c.join("phidias")))
        .or_else(|| variable("LOCALAPPDATA").map(|c| c.join("phidias")))
        .or_else(|| variable("HOME").map(|h| h.join(".cache").join("phidias")))
}
