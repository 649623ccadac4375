//! `phidias logits`: what the model thinks after every token of a prompt.

use super::args::{Global, Logits};
use super::open::Setup;
use super::run::prompt_ids;
use anyhow::{Context, Result};
use phidias::WeightFormat;
use serde_json::json;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes `input_ids [n] i64` and `logits [n, vocab] f32`.
pub fn logits(args: &Logits, global: &Global) -> Result<()> {
    let setup = Setup::new(global)?;
    // Exact unless something else is asked: this command exists for comparisons.
    let origin = setup.locate(args.model.as_deref())?;
    let stored = super::open::open_source(&origin)?.stored_format();
    let default = if stored.packed().is_some() {
        stored
    } else {
        WeightFormat::F32
    };
    let model = setup.open(&origin, Some(args.running.format.unwrap_or(default)))?;
    let ids = match &args.prompt {
        Some(prompt) => prompt_ids(&model, prompt, args.raw)?,
        None => args.tokens.clone(),
    };
    let mut session = setup.session(&model, &args.running)?;
    let vocab = model.config().vocab_size;
    let name = || args.out.display().to_string();
    // Under a temporary name beside it, so that a reader sees the whole file or none.
    let parent = args
        .out
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".logits-")
        .tempfile_in(parent)
        .with_context(name)?;
    let mut out = BufWriter::new(file.as_file_mut());
    out.write_all(&header(ids.len(), vocab))
        .with_context(name)?;
    for id in &ids {
        out.write_all(&i64::from(*id).to_le_bytes())
            .with_context(name)?;
    }
    let mut written = Ok(());
    session.extend_all(&ids, |_, logits| {
        if written.is_ok() {
            written = logits
                .iter()
                .try_for_each(|v| out.write_all(&v.to_le_bytes()));
        }
    })?;
    written.and_then(|()| out.flush()).with_context(name)?;
    drop(out);
    make_readable(file.as_file()).with_context(name)?;
    file.persist(&args.out)
        .map_err(|e| e.error)
        .with_context(name)?;
    setup.console.note(format_args!(
        "{}: {} x {vocab}",
        args.out.display(),
        ids.len()
    ));
    Ok(())
}

fn header(tokens: usize, vocab: usize) -> Vec<u8> {
    let ids = tokens * 8;
    let json = json!({
        "input_ids": { "dtype": "I64", "shape": [tokens], "data_offsets": [0, ids] },
        "logits": { "dtype": "F32", "shape": [tokens, vocab], "data_offsets": [ids, ids + tokens * vocab * 4] },
    });
    let mut json = json.to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

/// Temporary files are private; a result is not.
fn make_readable(file: &std::fs::File) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    #[cfg(not(unix))]
    let _ = file;
    Ok(())
}
