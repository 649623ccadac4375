//! `phidias synth`: random weights in a published model's shapes.

use super::args::{Global, Synth};
use super::console::Unit;
use super::open::Setup;
use anyhow::Result;
use phidias::engine::memory::Size;
use phidias::models::synth::{Preset, SynthOptions, synthesize};

/// Writes a synthetic model to OUT.
pub fn synth(args: &Synth, global: &Global) -> Result<()> {
    let setup = Setup::new(global)?;
    let preset: Preset = args.preset.parse()?;
    let mut bar = setup.console.bar("drawing weights", Unit::Bytes);
    let mut written = 0;
    let mut progress = |done: usize, total: usize| {
        written = total;
        bar.set(done as u64, Some(total as u64));
    };
    let options = SynthOptions {
        format: args.format,
        layers: args.layers,
        seed: args.seed,
        threads: setup.threads,
        cancel: setup.cancel.clone(),
        progress: Some(&mut progress),
    };
    synthesize(preset, &args.out, options)?;
    setup.console.note(format_args!(
        "{}: {} in {}",
        args.out.display(),
        Size(written),
        args.format
    ));
    Ok(())
}
