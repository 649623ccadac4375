//! `phidias logits`: what the model thinks after every token of a prompt.

use super::args::{Global, Logits};
use super::files::{is_device, temporary_beside};
use super::open::Setup;
use super::run::prompt_ids;
use anyhow::{Context, Result};
use phidias::{Session, WeightFormat};
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};

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
    let name = || args.out.display().to_string();
    if is_device(&args.out) {
        let mut file = OpenOptions::new()
            .write(true)
            .open(&args.out)
            .with_context(name)?;
        write(&mut session, &ids, &mut file)?.with_context(name)?;
    } else {
        let mut file = temporary_beside(&args.out).with_context(name)?;
        write(&mut session, &ids, file.as_file_mut())?.with_context(name)?;
        file.persist(&args.out)
            .map_err(|e| e.error)
            .with_context(name)?;
    }
    setup.console.note(format_args!(
        "{}: logits of {} tokens",
        args.out.display(),
        ids.len()
    ));
    Ok(())
}

/// Writes the whole file: what the model says as an error of the outer result, the writer's inside.
fn write(session: &mut Session, ids: &[u32], file: &mut File) -> Result<io::Result<()>> {
    let mut out = BufWriter::new(file);
    let mut written = out.write_all(&header(ids.len(), session.model().config().vocab_size));
    let mut put = |bytes: &[u8]| {
        if written.is_ok() {
            written = out.write_all(bytes);
        }
    };
    ids.iter().for_each(|id| put(&i64::from(*id).to_le_bytes()));
    session.extend_all(ids, |_, logits| {
        logits.iter().for_each(|v| put(&v.to_le_bytes()))
    })?;
    Ok(written.and_then(|()| out.flush()))
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
