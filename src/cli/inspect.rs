//! `phidias inspect`: what a model is made of and what it will take.

use super::args::{Global, Inspect};
use super::console::Stdout;
use super::device::Planned;
use super::open::{Setup, beyond_memory, open_source, refusal};
use anyhow::Result;
use phidias::WeightFormat;
use phidias::engine::backend::PICKS;
use phidias::engine::machine::Machine;
use phidias::engine::memory::{Fit, MemoryPlan, Size};
use phidias::models::Source;
use phidias::models::session::memory_plan;
use serde_json::{Value, json};
use std::io::{self, Write};

/// Shows a model.
pub fn inspect(args: &Inspect, global: &Global) -> Result<()> {
    let setup = Setup::to_run(global, &args.running)?;
    let origin = setup.locate(args.model.as_deref())?;
    let source = open_source(&origin)?;
    let name = origin.folder().unwrap_or(source.checkpoint.path());
    let name = name.display().to_string();
    let (format, weights) = source.planned(args.running.format)?;
    let options = setup.session_options(&args.running);
    let plan = memory_plan(&source.config, format, weights, &options)?;
    let planned = (setup.devices).planned(&source, format, &options, plan, setup.console)?;
    let (device, plan, machine) = match planned {
        Some(Planned { name, plan, free }) => {
            let machine = Machine {
                memory_available: Some(free as u64),
                ..Machine::default()
            };
            (Some(name), plan, machine)
        }
        None => (None, plan, Machine::detect()),
    };
    let seen = Seen {
        name,
        source: &source,
        format,
        device,
        plan,
        machine,
    };
    if args.json {
        writeln!(Stdout, "{:#}", seen.json())?;
    } else {
        seen.summary(&mut Stdout)?;
        seen.tensors(&mut Stdout)?;
    }
    Ok(())
}

/// A model, and what it will take here.
struct Seen<'a> {
    name: String,
    source: &'a Source,
    format: WeightFormat,
    /// What it will run on, where that is not the CPU.
    device: Option<String>,
    plan: MemoryPlan,
    /// Whose memory that takes.
    machine: Machine,
}

impl Seen<'_> {
    fn parameters(&self) -> usize {
        let tensors = self.source.checkpoint.tensors();
        tensors
            .map(|(_, t)| t.shape().iter().product::<usize>())
            .sum()
    }

    fn json(&self) -> Value {
        let Self {
            name,
            source,
            format,
            device,
            plan,
            machine,
        } = self;
        let c = &source.config;
        let tensors: Vec<_> = (source.checkpoint.tensors())
            .map(|(name, t)| json!({ "name": name, "format": t.dtype().name(), "shape": t.shape(), "bytes": t.bytes().len() }))
            .collect();
        json!({
            "model": name,
            "model_type": c.family.name(),
            "stored_format": source.stored_format().name(),
            "format": format.name(),
            "parameters": self.parameters(),
            "bytes": source.checkpoint.bytes(),
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads,
            "max_position_embeddings": c.max_position_embeddings,
            "sliding_window": c.sliding_window,
            "block_sparse": c.block_sparse.map(|s| json!({
                "block_size": s.layout.block,
                "local_blocks": s.layout.local_blocks,
                "vert_stride": s.layout.vert_stride,
                "head_step": s.layout.head_step,
                "dense_every": s.dense_every,
            })),
            "num_local_experts": c.moe.map(|moe| moe.experts),
            "num_experts_per_tok": c.moe.map(|_| PICKS),
            "plan": {
                "device": device,
                "context": plan.context,
                "weights": plan.weights,
                "pageable": plan.pageable.all(),
                "experts": plan.pageable.experts,
                "embedding": plan.pageable.embedding,
                "encoder": plan.pageable.encoder,
                "working_set": plan.working_set,
                "kv_cache": plan.kv_cache,
                "kv_hidden": plan.hidden,
                "kv_dropped": plan.dropped,
                "activations": plan.activations,
                "scratch": plan.scratch,
                "pictures": plan.pictures,
                "recordings": plan.recordings,
                "total": plan.total(),
                "least": plan.least(),
                "available": machine.memory_available,
                "fits": plan.check(machine) == Ok(Fit::Whole),
                "runs": plan.check(machine).is_ok(),
            },
            "tensors": tensors,
        })
    }

    /// What it is, and what it will take.
    fn summary(&self, out: &mut impl Write) -> io::Result<()> {
        let Self {
            name,
            source,
            format,
            device,
            plan,
            machine,
        } = self;
        let c = &source.config;
        writeln!(out, "{name}")?;
        writeln!(
            out,
            "  {}: {} parameters, {} stored as {}",
            c.family,
            self.parameters(),
            Size(source.checkpoint.bytes()),
            source.stored_format()
        )?;
        writeln!(
            out,
            "  {} layer{}, hidden {}, {}MLP {}, {} heads of {} ({} for keys and values), vocabulary {}",
            c.num_hidden_layers,
            if c.num_hidden_layers == 1 { "" } else { "s" },
            c.hidden_size,
            c.moe.map_or(String::new(), |moe| format!(
                "{} experts ({PICKS} for a token) of ",
                moe.experts
            )),
            c.intermediate_size,
            c.num_attention_heads,
            c.head_dim,
            c.num_key_value_heads,
            c.vocab_size
        )?;
        let window = c.sliding_window.filter(|w| *w < c.max_position_embeddings);
        writeln!(
            out,
            "  up to {} positions{}{}",
            c.max_position_embeddings,
            window.map_or(String::new(), |w| format!(", each sees the last {w}")),
            c.rope.long.as_ref().map_or(String::new(), |l| format!(
                "; LongRoPE, long factors beyond {}, attention factor {}",
                l.original_max_position_embeddings, l.short_multiplier
            )),
        )?;
        if let Some(sparse) = c.block_sparse {
            let layout = sparse.layout;
            let dense = sparse.dense_every.map_or("no layer is dense".into(), |n| {
                format!("dense every {n} layers")
            });
            writeln!(
                out,
                "  block-sparse attention: blocks of {}, the last {} and one of {}; {dense}",
                layout.block, layout.local_blocks, layout.vert_stride
            )?;
        }
        match device {
            Some(device) => writeln!(out, "  run as {format} on {device}: {plan}")?,
            None => writeln!(out, "  run as {format}: {plan}")?,
        }
        if plan.hidden > plan.dropped {
            writeln!(
                out,
                "  of the KV cache up to {} are seen by no later token (--drop-hidden-keys gives them back)",
                Size(plan.hidden)
            )?;
        }
        match (plan.check(machine), device) {
            (Ok(Fit::Whole), _) => {}
            (Ok(Fit::WithDisk), _) => writeln!(out, "  {}", beyond_memory(plan, machine))?,
            (Err(error), None) => writeln!(out, "  {}", refusal(&error))?,
            (Err(error), Some(_)) => writeln!(out, "  {error}; --device cpu computes on the CPU")?,
        }
        Ok(())
    }

    /// A line for each tensor.
    fn tensors(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out)?;
        for (name, tensor) in self.source.checkpoint.tensors() {
            let shape: Vec<_> = tensor.shape().iter().map(usize::to_string).collect();
            writeln!(
                out,
                "{:>10}  {:5} {:>14}  {name}",
                Size(tensor.bytes().len()).to_string(),
                tensor.dtype().name(),
                shape.join(" x ")
            )?;
        }
        Ok(())
    }
}
