//! `phidias logits`: what the model thinks after every token of a prompt.

use super::args::{Global, Logits};
use super::console::count;
use super::files::{check_out, is_device, temporary_beside};
use super::open::Setup;
use super::pictures::{self, Room};
use anyhow::{Context, Result, bail};
use phidias::models::session::PictureMemory;
use phidias::models::text::Segment;
use phidias::{Session, WeightFormat};
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};

/// Writes `input_ids [n] i64` and `logits [n, vocab] f32`.
pub fn logits(args: &Logits, global: &Global) -> Result<()> {
    let setup = Setup::to_run(global, &args.running)?;
    // Exact unless something else is asked: this command exists for comparisons.
    let origin = setup.locate(args.model.as_deref())?;
    check_out(&args.out, origin.folder(), &args.pictures.files()?)?;
    let stored = super::open::open_source(&origin)?.stored_format();
    let default = if stored.packed().is_some() {
        stored
    } else {
        WeightFormat::F32
    };
    let model = setup.open(&origin, Some(args.running.format.unwrap_or(default)))?;
    let pictures = args
        .pictures
        .open(&setup, &model, Room::of(&model, &args.running))?;
    let segments = match &args.prompt {
        Some(prompt) => pictures::segments(&model, prompt, args.raw, &pictures)?,
        None if !pictures.is_empty() => {
            bail!("--image stands beside -p, whose text holds its place")
        }
        None => vec![Segment::Text(args.tokens.clone())],
    };
    let named = named_ids(&segments);
    let mut session = setup.session(&model, &args.running, PictureMemory::of(&pictures))?;
    let ids = pictures::attach(&setup, &mut session, segments, pictures)?;
    let name = || args.out.display().to_string();
    if is_device(&args.out) {
        let mut file = OpenOptions::new()
            .write(true)
            .open(&args.out)
            .with_context(name)?;
        write(&mut session, &ids, &named, &mut file)?.with_context(name)?;
    } else {
        let mut file = temporary_beside(&args.out).with_context(name)?;
        write(&mut session, &ids, &named, file.as_file_mut())?.with_context(name)?;
        file.persist(&args.out)
            .map_err(|e| e.error)
            .with_context(name)?;
    }
    setup.console.note(format_args!(
        "{}: logits of {}",
        args.out.display(),
        count(ids.len(), "token")
    ));
    Ok(())
}

/// The ids as the reference names them: picture n is -n, at every position that it takes.
fn named_ids(segments: &[Segment]) -> Vec<i64> {
    let ids = segments.iter().flat_map(|segment| match segment {
        Segment::Text(ids) => ids.iter().map(|id| i64::from(*id)).collect(),
        Segment::Image { index, tokens } => vec![-1 - *index as i64; *tokens],
    });
    ids.collect()
}

/// Writes the whole file: what the model says as an error of the outer result, the writer's inside.
fn write(
    session: &mut Session,
    ids: &[u32],
    named: &[i64],
    file: &mut File,
) -> Result<io::Result<()>> {
    let mut out = BufWriter::new(file);
    let mut written = out.write_all(&header(ids.len(), session.model().config().vocab_size));
    let mut put = |bytes: &[u8]| {
        if written.is_ok() {
            written = out.write_all(bytes);
        }
    };
    named.iter().for_each(|id| put(&id.to_le_bytes()));
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
