//! `--device`: from its word to a GPU, and models on it.

use super::args::{Device as Asked, Global};
use super::console::Console;
use anyhow::{Result, bail};
use phidias::engine::Cancel;
use phidias::engine::kv_cache::KvType;
use phidias::engine::memory::MemoryPlan;
use phidias::models::Source;
use phidias::{Model, SessionOptions, WeightFormat};

/// A model's memory on a device, before it is there.
pub struct Planned {
    /// The device.
    pub name: String,
    /// What the model will take there.
    pub plan: MemoryPlan,
    /// What is free there.
    pub free: usize,
}

/// Where to compute, as far as the command line says.
#[cfg(feature = "cuda")]
pub struct Devices {
    asked: Asked,
    /// The device, once it was looked for.
    found: std::sync::OnceLock<Option<Device>>,
}

#[cfg(feature = "cuda")]
type Device = std::sync::Arc<dyn phidias::engine::kernels::cuda::Device>;

#[cfg(feature = "cuda")]
impl Devices {
    pub fn new(global: &Global) -> Result<Self> {
        // Whoever names an instruction set means the CPU.
        let asked = match (global.device, global.isa) {
            (Asked::Auto, Some(_)) => Asked::Cpu,
            (asked, _) => asked,
        };
        Ok(Self {
            asked,
            found: std::sync::OnceLock::new(),
        })
    }

    /// Where it is left open, takes the CPU for what a device does not have: other types of cache, and dropping.
    pub fn prefer_cpu_for(&mut self, kv: Option<KvType>, drop_hidden: bool) {
        use phidias::engine::backend::cuda::DeviceCache;
        let lacks = drop_hidden || kv.is_some_and(|kind| !DeviceCache::takes(kind));
        if lacks && self.asked == Asked::Auto {
            self.asked = Asked::Cpu;
        }
    }

    /// The device that is asked for, or that is there; `None`: the CPU.
    pub fn find(&self, console: Console) -> Result<Option<Device>> {
        use phidias::engine::kernels::cuda::{DeviceError, Gpu, HostDevice, Order};
        use std::sync::Arc;
        if let Some(found) = self.found.get() {
            return Ok(found.clone());
        }
        let gpu = || {
            let cache = super::open::cache_folder().map(|folder| folder.join("cuda"));
            Gpu::open(0, cache.as_deref()).map(|gpu| Arc::new(gpu) as Device)
        };
        let found = match self.asked {
            Asked::Cpu => None,
            Asked::Cuda => match gpu() {
                Ok(device) => Some(device),
                Err(error) => bail!("--device cuda: {error}"),
            },
            Asked::Host => match HostDevice::new(Order::Forward) {
                Ok(device) => Some(Arc::new(device) as Device),
                Err(error) => bail!("--device host: {error}"),
            },
            Asked::Auto => match gpu() {
                Ok(device) => Some(device),
                Err(DeviceError::NoDriver { .. } | DeviceError::NoDevice { .. }) => None,
                Err(error) => {
                    console.note(format_args!("the GPU is not used: {error}"));
                    None
                }
            },
        };
        Ok(self.found.get_or_init(|| found).clone())
    }

    /// Puts a model on the device. One that `auto` found is left alone when the model does not fit there.
    pub fn place(&self, model: &mut Model, console: Console, cancel: &Cancel) -> Result<()> {
        use super::console::Unit;
        use phidias::Error;
        let Some(device) = self.find(console)? else {
            return Ok(());
        };
        let what = format!("copying the weights to {}", device.name());
        let mut bar = console.bar(&what, Unit::Bytes);
        let mut progress = |done: usize, total: usize| bar.set(done as u64, Some(total as u64));
        match model.put_on(device, cancel, &mut progress) {
            Err(error @ (Error::DeviceWeights { .. } | Error::DeviceHeads { .. }))
                if self.asked == Asked::Auto =>
            {
                console.note(format_args!("the GPU is not used: {error}"));
                Ok(())
            }
            placed => placed.map_err(or_cpu),
        }
    }
}

#[cfg(feature = "cuda")]
impl Devices {
    /// What a model will take on the device; `plan` is that of the CPU. `None` where that is what will compute,
    /// for the same reasons as in [`Devices::place`].
    pub fn planned(
        &self,
        source: &Source,
        format: WeightFormat,
        options: &SessionOptions,
        plan: MemoryPlan,
        console: Console,
    ) -> Result<Option<Planned>> {
        use phidias::Error;
        let Some(device) = self.find(console)? else {
            return Ok(None);
        };
        let (name, free) = (device.name(), device.free_memory()?);
        let planned = source.plan_on(&*device, format, options, plan);
        let unused = match planned {
            Ok(plan) if self.asked == Asked::Auto && plan.weights > free => Error::DeviceWeights {
                device: name,
                needed: plan.weights,
                free,
            },
            Ok(_) if options.drop_hidden => bail!(keeps_all(&name)),
            Ok(plan) => return Ok(Some(Planned { name, plan, free })),
            Err(error @ Error::DeviceHeads { .. }) if self.asked == Asked::Auto => error,
            Err(error) => return Err(or_cpu(error)),
        };
        console.note(format_args!("the GPU is not used: {unused}"));
        Ok(None)
    }
}

/// Why keys are not dropped on a device.
pub fn keeps_all(device: &str) -> String {
    format!("--drop-hidden-keys: {device} keeps the whole cache; --device cpu can drop")
}

/// The device that a model was put on.
#[cfg(feature = "cuda")]
pub fn of(model: &Model) -> Option<String> {
    model.resident().map(|resident| resident.device().name())
}

/// The same with what else can be done, where a device cannot take a session.
#[cfg(feature = "cuda")]
pub fn or_cpu(error: phidias::Error) -> anyhow::Error {
    use phidias::Error;
    match error {
        Error::DevicePlan { .. } | Error::DeviceKv(_) | Error::DeviceWeights { .. } => {
            anyhow::anyhow!("{error}; --device cpu computes on the CPU")
        }
        error => error.into(),
    }
}

/// There is the CPU only.
#[cfg(not(feature = "cuda"))]
pub struct Devices;

#[cfg(not(feature = "cuda"))]
impl Devices {
    pub fn new(global: &Global) -> Result<Self> {
        if global.device == Asked::Cuda {
            bail!(
                "--device cuda: this build computes on the CPU only (it lacks the feature 'cuda')"
            );
        }
        Ok(Self)
    }

    pub fn prefer_cpu_for(&mut self, _: Option<KvType>, _: bool) {}

    pub fn place(&self, _: &mut Model, _: Console, _: &Cancel) -> Result<()> {
        Ok(())
    }

    pub fn planned(
        &self,
        _: &Source,
        _: WeightFormat,
        _: &SessionOptions,
        _: MemoryPlan,
        _: Console,
    ) -> Result<Option<Planned>> {
        Ok(None)
    }
}

#[cfg(not(feature = "cuda"))]
pub fn of(_: &Model) -> Option<String> {
    None
}

#[cfg(not(feature = "cuda"))]
pub fn or_cpu(error: phidias::Error) -> anyhow::Error {
    error.into()
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_lacks_is_the_cpus_where_that_is_open() {
        let after = |asked, kv, drop| {
            let found = std::sync::OnceLock::new();
            let mut devices = Devices { asked, found };
            devices.prefer_cpu_for(kv, drop);
            devices.asked
        };
        for kv in [None, Some(KvType::F16), Some(KvType::F32)] {
            assert_eq!(after(Asked::Auto, kv, false), Asked::Auto);
            assert_eq!(after(Asked::Auto, kv, true), Asked::Cpu);
        }
        for kv in [KvType::Int8, KvType::Bf16] {
            assert_eq!(after(Asked::Auto, Some(kv), false), Asked::Cpu);
            assert_eq!(after(Asked::Cuda, Some(kv), true), Asked::Cuda);
        }
    }
}
