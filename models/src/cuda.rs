//! A model on a GPU: its weights are copied there once, and all its sessions run there.

use crate::error::Error;
use crate::format::WeightFormat;
use crate::model::Model;
use crate::running::{LOGIT_ROWS, Runner, Running};
use crate::session::SessionOptions;
use crate::transformer::{FeedForward, Transformer};
use phidias_engine::Cancel;
use phidias_engine::backend::cuda::{Cuda, DeviceCache, Part, Resident, Width};
use phidias_engine::backend::{GateUp, HeadOrder, Norm};
use phidias_engine::kernels::cuda::{Device, experts};
use phidias_engine::memory::MemoryPlan;
use phidias_engine::tensor::Linear;
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
    /// Everything that goes to a device. In f32 nothing is rounded that the CPU does not round.
    fn parts(&self) -> Parts<'_> {
        let mut parts = Parts {
            list: Vec::new(),
            width: match self.format() {
                WeightFormat::F32 => Width::Widened,
                _ => Width::Stored,
            },
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
        let heads = self.config().heads(HeadOrder::Parts);
        let encoder = (self.vision().ok()).map(|(vision, _)| vision.clip().config().heads());
        for heads in [heads].into_iter().chain(encoder) {
            Cuda::check(heads).map_err(|reason| Error::DeviceHeads {
                path: self.path().to_owned(),
                reason,
            })?;
        }
        let parts = self.parts();
        let (needed, free) = (Part::bytes_of(&parts.list), free(&device)?);
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
        let kind = options.kv_type.unwrap_or(self.format().default_kv_type());
        let heads = self.config().heads(HeadOrder::Parts);
        let kv_cache = DeviceCache::bytes_of(&self.config().kv_shape(), kind, plan.context)?;
        let (config, format, context) = (self.config(), self.format(), plan.context);
        let pictures = &options.pictures;
        let counted = config.moe.map_or(0, |moe| {
            config.num_hidden_layers * experts::load_bytes(moe.experts)
        });
        Ok(MemoryPlan {
            weights: resident.bytes(),
            kv_cache,
            activations: plan.activations + counted + Cuda::bytes(heads, context, LOGIT_ROWS),
            pictures: pictures.on_device(config, format, context, plan.activations),
            context: plan.context,
            ..MemoryPlan::default()
        })
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
                plan: *plan,
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

fn free(device: &Arc<dyn Device>) -> Result<usize, Error> {
    (device.free_memory()).map_err(|error| {
        let device = device.name();
        let source = Box::new(error);
        Error::Device(phidias_engine::backend::DeviceFailed { device, source })
    })
}
