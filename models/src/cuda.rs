//! A model on a GPU: its weights are copied there once, and all its sessions run there.

use crate::config::Config;
use crate::error::Error;
use crate::format::WeightFormat;
use crate::model::{Model, Source};
use crate::running::{LOGIT_ROWS, Runner, Running};
use crate::session::SessionOptions;
use crate::transformer::{FeedForward, Transformer};
use crate::weights::{EMBED, Role};
use phidias_engine::Cancel;
use phidias_engine::backend::cuda::{
    Cuda, DeviceCache, Part, ROOM, Resident, Width, matrix_bytes, places_bytes,
};
use phidias_engine::backend::{GateUp, HeadOrder, Norm};
use phidias_engine::kernels::cuda::{Device, experts};
use phidias_engine::memory::MemoryPlan;
use phidias_engine::tensor::Linear;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The parts of a model that its operations need on a device.
pub(crate) struct Parts<'m> {
    pub(crate) list: Vec<Part<'m>>,
    /// What matrices become.
    width: Width,
}

impl<'m> Parts<'m> {
    pub(crate) fn linear(&mut self, linear: &'m Linear) {
        self.linear_as(linear, self.width);
    }

    /// A small matrix whose inputs are not rounded, whatever the others' are.
    pub(crate) fn exact(&mut self, linear: &'m Linear) {
        self.linear_as(linear, Width::Widened);
    }

    fn linear_as(&mut self, linear: &'m Linear, width: Width) {
        self.list.push(Part::Matrix(&linear.weight, width));
        let bias = linear.bias.as_deref();
        self.list.extend(bias.map(Part::Values));
    }

    pub(crate) fn norm(&mut self, norm: &'m Norm) {
        match norm {
            Norm::Rms { weight, .. } => self.list.push(Part::Values(weight)),
            Norm::Layer { weight, bias, .. } => {
                self.list
                    .extend([weight, bias].map(|values| Part::Values(values)));
            }
        }
    }

    fn gate_up(&mut self, gate_up: &'m GateUp) {
        match gate_up {
            GateUp::Stacked(both) | GateUp::Interleaved { both, .. } => self.linear(both),
            GateUp::Pair { gate, up } => [gate, up].into_iter().for_each(|w| self.linear(w)),
        }
    }

    fn transformer(&mut self, transformer: &'m Transformer) {
        let width = self.width;
        self.list
            .push(Part::Matrix(&transformer.embed_tokens, width));
        for layer in &transformer.layers {
            self.norm(&layer.input_norm);
            (layer.attention.qkv_proj.iter()).for_each(|w| self.linear(w));
            self.linear(&layer.attention.o_proj);
            self.norm(&layer.post_attention_norm);
            match &layer.feed_forward {
                FeedForward::Dense(mlp) => {
                    self.gate_up(&mlp.gate_up);
                    self.linear(&mlp.down_proj);
                }
                FeedForward::Moe(moe) => {
                    self.exact(&moe.router);
                    // The experts' matrices of one kind lie one after the other.
                    let mut kinds: Vec<_> = (moe.experts.iter())
                        .map(|expert| expert.matrices())
                        .collect();
                    loop {
                        let kind: Vec<_> = kinds.iter_mut().filter_map(Iterator::next).collect();
                        if kind.is_empty() {
                            break;
                        }
                        self.list.push(Part::Experts(kind, width));
                    }
                }
            }
        }
        self.norm(&transformer.norm);
        self.linear(&transformer.lm_head.linear);
        self.list.push(Part::Ids(&transformer.lm_head.unused));
    }
}

impl Model {
    /// Everything that goes to a device.
    fn parts(&self) -> Parts<'_> {
        let mut parts = Parts {
            list: Vec::new(),
            width: width(self.format()),
        };
        parts.transformer(self.transformer());
        if let Ok((vision, _)) = self.vision() {
            vision.parts(&mut parts);
        }
        parts
    }

    /// Copies the weights to a device, on which the sessions of the model run from then on. `progress`
    /// hears of bytes done and in all.
    /// # Errors
    /// Heads that the kernels do not have; weights that are more than the free memory; cancellation; a
    /// device that fails.
    pub fn put_on(
        &mut self,
        device: Arc<dyn Device>,
        cancel: &Cancel,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), Error> {
        check_heads(self.config(), self.path())?;
        let parts = self.parts();
        let needed = Part::bytes_of(&parts.list, &*device);
        let free = free(&device)?;
        if needed > free {
            let device = device.name();
            return Err(Error::DeviceWeights {
                device,
                needed,
                free,
            });
        }
        let resident = Resident::load(device, &parts.list, cancel, progress)?;
        let resident = resident.ok_or(Error::Cancelled)?;
        self.set_resident(Arc::new(resident));
        Ok(())
    }

    /// What a session of `plan` takes on the device: `plan`'s share of it.
    pub(crate) fn on_device(
        &self,
        resident: &Resident,
        options: &SessionOptions,
        plan: MemoryPlan,
    ) -> Result<MemoryPlan, Error> {
        let (device, weights) = (&**resident.device(), resident.bytes());
        on_device(device, weights, self.config(), self.format(), options, plan)
    }

    /// A session's share of the device.
    pub(crate) fn runner(
        &self,
        resident: &Arc<Resident>,
        options: &SessionOptions,
        plan: &MemoryPlan,
    ) -> Result<Box<dyn Runner>, Error> {
        let device = resident.device();
        let free = free(device)?;
        // The weights are there already.
        if options.check_memory && plan.total() - plan.weights > free {
            return Err(Error::DevicePlan {
                device: device.name(),
                plan: Box::new(*plan),
                free,
            });
        }
        let kind = options.kv_type.unwrap_or(self.format().default_kv_type());
        let (shape, context) = (self.config().kv_shape(), plan.context);
        let cache = DeviceCache::new(device, shape, kind, context)?;
        let heads = self.config().heads(HeadOrder::Parts);
        let exact = self.format() == WeightFormat::F32;
        let cuda = Cuda::new(Arc::clone(resident), heads, context, exact)?;
        Ok(Box::new(Running::new(cuda, cache)))
    }
}

/// Buffers of a decoder's pass, at most: three of the residual stream, three of attention, two of an MLP, three of
/// the head, the tokens, and both projections where they cannot be gated at once.
const BUFFERS: usize = 13;
/// Those of a mixture beside them: what is normed, two of the router, the routes, four of the experts.
const MIXTURE_BUFFERS: usize = 8;
/// Buffers of the encoder and the projector of pictures.
const PICTURE_BUFFERS: usize = 12;

/// Launches, copies and zeroings of a decoder's pass of few tokens, at most.
fn steps(config: &Config) -> usize {
    // Attention: its projections, three where one launch does not do, the output projection, and the norm behind it.
    let attention = 6;
    // An MLP: its gates, three where they cannot be gated at once, the other projection, the norm behind it. A mixture:
    // three of the router, five of the experts, the norm.
    let feed_forward = match config.moe {
        None => 5,
        Some(_) => 9,
    };
    // Embedding, an empty branch; norm, head, unused ids, the likeliest tokens.
    config.num_hidden_layers * (attention + feed_forward) + 6
}

/// # Errors
/// Heads that the kernels do not have.
fn check_heads(config: &Config, path: &Path) -> Result<(), Error> {
    let encoder = config.vision.as_ref().map(|vision| vision.clip.heads());
    for heads in [config.heads(HeadOrder::Parts)].into_iter().chain(encoder) {
        Cuda::check(heads).map_err(|reason| Error::DeviceHeads {
            path: path.to_owned(),
            reason,
        })?;
    }
    Ok(())
}

/// What a session of `plan` takes on a device that holds `weights` bytes of its model. Each allocation counts
/// as whole pieces.
fn on_device(
    device: &dyn Device,
    weights: usize,
    config: &Config,
    format: WeightFormat,
    options: &SessionOptions,
    plan: MemoryPlan,
) -> Result<MemoryPlan, Error> {
    let context = plan.context;
    let pieces = |bytes: usize| {
        bytes
            .checked_next_multiple_of(device.piece())
            .unwrap_or(bytes)
    };
    let buffers = |count: usize| count * device.piece().max(ROOM);
    let kind = options.kv_type.unwrap_or(format.default_kv_type());
    let kv_cache = DeviceCache::bytes_of(&config.kv_shape(), kind, context)?;
    let heads = config.heads(HeadOrder::Parts);
    let chunk = options.chunk.clamp(1, context);
    let mixture = config.moe.map_or(0, |moe| {
        let routes = experts::Routes::words(chunk, moe.experts) * size_of::<u32>();
        // Its two inputs are there at once; the activations have the larger one.
        let input = chunk * config.hidden_size * size_of::<f32>();
        buffers(MIXTURE_BUFFERS)
            + routes
            + input
            + config.num_hidden_layers * pieces(experts::load_bytes(moe.experts))
    });
    // Panels of packed rows are of 16: both projections of others are computed before the gate. The activations have
    // them; the result has memory of its own here.
    let gated = match config.intermediate_size.is_multiple_of(16) {
        true => 0,
        false => config.intermediate_size * chunk * size_of::<f32>(),
    };
    let pass = Cuda::pass_bytes(heads, chunk, LOGIT_ROWS) + mixture + gated + buffers(BUFFERS);
    let pictures = (options.pictures).on_device(config, format, context, plan.activations);
    Ok(MemoryPlan {
        weights,
        recordings: Cuda::recordings_bytes(device, steps(config)),
        kv_cache: pieces(kv_cache),
        activations: plan.activations + pass + pieces(Cuda::bytes(heads, context)),
        pictures: match pictures {
            0 => 0,
            pictures => pictures + buffers(PICTURE_BUFFERS),
        },
        context,
        ..MemoryPlan::default()
    })
}

/// The name of an expert's tensor without the expert's number: that of the tensors of all experts.
fn without_expert(name: &str) -> String {
    let parts = name.split('.');
    let named: Vec<_> = parts
        .scan("", |before, part| {
            let number = std::mem::replace(before, part) == "experts";
            Some(if number { "*" } else { part })
        })
        .collect();
    named.join(".")
}

/// What matrices become. In f32 nothing is rounded that the CPU does not round.
fn width(format: WeightFormat) -> Width {
    match format {
        WeightFormat::F32 => Width::Widened,
        _ => Width::Stored,
    }
}

impl Source {
    /// What a session on a device takes there when it runs in `format`, as the model would say that is put
    /// there; `plan` is [`memory_plan`](crate::session::memory_plan)'s.
    /// # Errors
    /// A type of cache, or heads, that devices do not have.
    pub fn plan_on(
        &self,
        device: &dyn Device,
        format: WeightFormat,
        options: &SessionOptions,
        plan: MemoryPlan,
    ) -> Result<MemoryPlan, Error> {
        check_heads(&self.config, self.checkpoint.path())?;
        let weights = places_bytes(self.parts(format).into_values(), device);
        on_device(device, weights, &self.config, format, options, plan)
    }

    /// Bytes of everything that goes to a device: what [`Model::parts`] lists, from shapes alone. The
    /// experts' matrices of one kind are one.
    fn parts(&self, format: WeightFormat) -> BTreeMap<String, usize> {
        let width = width(format);
        let mut parts = BTreeMap::new();
        for (spec, dtype) in self.tensors_in(format) {
            let elements: usize = spec.shape.iter().product();
            let matrix = |width| {
                let rows = spec.shape[0];
                matrix_bytes(dtype, rows, elements / rows, width)
            };
            let bytes = match spec.role {
                Role::Matrix | Role::Expert => matrix(width),
                Role::Router | Role::Patch => matrix(Width::Widened),
                Role::Embedding if spec.name == EMBED => matrix(width),
                // Positions and separators are added on the host.
                Role::Embedding => continue,
                Role::Norm | Role::Bias => elements * size_of::<f32>(),
            };
            let name = match spec.role {
                Role::Expert => without_expert(&spec.name),
                _ => spec.name,
            };
            *parts.entry(name).or_insert(0) += bytes;
        }
        let unused = 2 * self.config.unused_ids.len() * size_of::<u32>();
        parts.insert("unused ids".to_owned(), unused);
        parts
    }
}

fn free(device: &Arc<dyn Device>) -> Result<usize, Error> {
    (device.free_memory()).map_err(|error| {
        let device = device.name();
        let source = Box::new(error);
        Error::Device(phidias_engine::backend::DeviceFailed { device, source })
    })
}
