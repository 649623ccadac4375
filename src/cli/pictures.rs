//! Pictures of the command line, and the prompts they stand in.

use super::args::Running;
use super::console::{Bar, Unit};
use super::files::check_out;
use super::open::Setup;
use super::signals;
use anyhow::{Context, Result, bail};
use clap::Args;
use phidias::engine::tensor::Buffer;
use phidias::models::image::{Picture, Processed, frames};
use phidias::models::session::{PictureMemory, Piece, default_context};
use phidias::models::text::{GenerationPrompt, Message, Segment, encode_with_images};
use phidias::{Model, Session};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug, Args)]
pub struct Pictures {
    /// A picture (PNG, JPEG, WebP, GIF), or a folder of frames; may be given several times. The prompt
    /// holds <|image_1|>, <|image_2|>, ... where they belong
    #[arg(long = "image", value_name = "FILE")]
    pub images: Vec<PathBuf>,
    /// Tiles that each picture may be cut into [default: the model's; its authors give 4 to frames]
    #[arg(long, value_name = "N", requires = "images")]
    pub num_crops: Option<usize>,
}

impl Pictures {
    /// Reads and prepares them, as many as there is room for.
    pub fn open(&self, setup: &Setup, model: &Model, room: Room) -> Result<Vec<Processed>> {
        if self.images.is_empty() {
            return Ok(Vec::new());
        }
        let (_, processor) = model.vision()?;
        let mut processor = processor.clone();
        if let Some(crops) = self.num_crops {
            processor = processor.with_num_crops(crops)?;
        }
        let pool = setup.pool()?;
        let (mut pictures, mut taken) = (Vec::new(), 0);
        for file in self.files()? {
            let picture = Picture::open(&file)?;
            let picture = pool.install(|| processor.process(&picture))?;
            // Not after all of them: a folder may hold thousands.
            taken += picture.tokens();
            if taken > room.positions {
                let which = match pictures.len() {
                    0 => "this picture takes".to_owned(),
                    n => format!("this picture and the {n} before it take"),
                };
                bail!(
                    "{}: {which} {taken} positions; the context has room for {} ({})",
                    file.display(),
                    room.positions,
                    room.more
                );
            }
            pictures.push(picture);
        }
        Ok(pictures)
    }

    /// What is named, and the frames of what is a folder. All of them are there: better said before
    /// weights are read for them.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for image in &self.images {
            match image.is_dir() {
                true => files.extend(frames::list(image)?),
                false => {
                    fs::metadata(image).with_context(|| image.display().to_string())?;
                    files.push(image.clone());
                }
            }
        }
        Ok(files)
    }
}

/// Positions that pictures may take.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub positions: usize,
    /// How to come to more of them.
    pub more: &'static str,
}

impl Room {
    /// All of the context of a prompt.
    pub fn of(model: &Model, running: &Running) -> Self {
        let context = running.ctx;
        Self {
            positions: context.unwrap_or_else(|| default_context(model.config())),
            more: "--ctx makes room, --num-crops makes pictures smaller",
        }
    }
}

/// The pieces of a prompt, in the chat template or as it is, with pictures in the places of their tags.
pub fn segments(
    model: &Model,
    prompt: &str,
    raw: bool,
    pictures: &[Processed],
) -> Result<Vec<Segment>> {
    let text = model.text()?;
    // Of megabytes this takes seconds, in which the libraries that do it hear nothing.
    signals::waiting(|| {
        let rendered = match raw {
            true => prompt.to_owned(),
            false => {
                let question = Message::user(prompt);
                text.template.render(&[question], GenerationPrompt::Add)?
            }
        };
        let tokens: Vec<_> = pictures.iter().map(Processed::tokens).collect();
        Ok(encode_with_images(&text.tokenizer, &rendered, &tokens)?)
    })
}

/// Encodes the pictures and appends the prompt to the session's next tokens; gives its ids.
pub fn attach(
    setup: &Setup,
    session: &mut Session,
    segments: Vec<Segment>,
    pictures: Vec<Processed>,
) -> Result<Vec<u32>> {
    let (positions, context) = (
        segments.iter().map(Segment::len).sum::<usize>(),
        session.context(),
    );
    if positions > context && !pictures.is_empty() {
        bail!(
            "the prompt takes {positions} positions, its {} pictures included; the context holds {context} (--ctx makes room, --num-crops makes pictures smaller)",
            pictures.len()
        );
    }
    let features = encode(setup, session, &pictures)?;
    // Their pixels are not needed beside the decoder's memory.
    drop(pictures);
    let pieces: Vec<_> = (segments.into_iter())
        .map(|segment| match segment {
            Segment::Text(ids) => Piece::Text(ids),
            Segment::Image { index, .. } => Piece::Picture(Arc::clone(&features[index])),
        })
        .collect();
    Ok(session.attach(&pieces))
}

/// The features of some pictures.
pub fn encode(
    setup: &Setup,
    session: &mut Session,
    pictures: &[Processed],
) -> Result<Vec<Arc<Buffer>>> {
    let mut bar: Bar = setup.console.bar("looking", Unit::Crops);
    let total: usize = pictures.iter().map(Processed::crops).sum();
    let mut progress = |done| bar.set(done as u64, Some(total as u64));
    let features = session.encode(pictures, &mut progress)?;
    session.model().release_encoder();
    Ok(features)
}

/// `phidias embed`: what the decoder sees of a picture.
pub fn embed(args: &super::args::Embed, global: &super::args::Global) -> Result<()> {
    let setup = Setup::new(global)?;
    let files = args.picture.files()?;
    if files.len() != 1 {
        bail!("--image: expected one picture, found {}", files.len());
    }
    let origin = setup.locate(Some(&args.model))?;
    check_out(&args.out, origin.folder(), &files)?;
    let model = setup.open(&origin, args.format)?;
    let any = Room {
        positions: usize::MAX,
        more: "",
    };
    let pictures = args.picture.open(&setup, &model, any)?;
    let picture = &pictures[0];
    let mut session = setup.encoder(&model, PictureMemory::of(&pictures))?;
    let [features] = &encode(&setup, &mut session, &pictures)?[..] else {
        unreachable!("features of one picture");
    };
    let bytes = size_of_val(features.data());
    let shape = [features.rows(), features.cols()];
    let header = serde_json::json!({
        "features": { "dtype": "F32", "shape": shape, "data_offsets": [0, bytes] },
    });
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.append(&mut header);
    file.extend(features.data().iter().flat_map(|v| v.to_le_bytes()));
    super::files::write(&args.out, &file).with_context(|| args.out.display().to_string())?;
    let grid = picture.grid();
    setup.console.note(format_args!(
        "{}: {} rows of {}, from {} x {} tiles and the global view",
        args.out.display(),
        shape[0],
        shape[1],
        grid.rows,
        grid.cols
    ));
    Ok(())
}
