//! `phidias quantize`: a prepacked folder.

use super::args::{Global, Quantize};
use super::console::Unit;
use super::open::Setup;
use anyhow::{Result, bail};
use phidias::engine::memory::Size;
use phidias::models::quantize::quantize_folder;
use phidias::{OpenOptions, WeightFormat};

/// Writes MODEL in another format to OUT.
pub fn quantize(args: &Quantize, global: &Global) -> Result<()> {
    let setup = Setup::new(global)?;
    if args.format == WeightFormat::F32 {
        bail!("--format f32: expected q4, q8 or bf16; f32 runs from the original folder");
    }
    let folder = setup.folder(&args.model)?;
    let mut bar = setup.console.bar("quantizing", Unit::Bytes);
    let mut written = 0;
    let mut progress = |done: usize, total: usize| {
        written = total;
        bar.set(done as u64, Some(total as u64));
    };
    let mut options = OpenOptions {
        threads: setup.threads,
        cancel: setup.cancel.clone(),
        progress: Some(&mut progress),
        ..OpenOptions::default()
    };
    quantize_folder(&folder, &args.out, args.format, &mut options)?;
    setup.console.note(format_args!(
        "{}: {} in {}",
        args.out.display(),
        Size(written),
        args.format
    ));
    Ok(())
}
