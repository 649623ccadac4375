//! `phidias chat`: turn by turn, keeping the KV cache.

use super::args::{Chat, Global};
use super::console::{Stdout, describe, say};
use super::files::utf8;
use super::open::{Setup, cache_folder, generate_options};
use super::pictures::{Pictures, Room, encode};
use super::run::summary;
use super::signals;
use anyhow::{Context, Result, bail};
use phidias::Session;
use phidias::engine::generate::{Event, FinishReason, GenerateError, GenerateOptions, generate};
use phidias::engine::tensor::Buffer;
use phidias::models::image::Processed;
use phidias::models::session::{PictureMemory, Piece};
use phidias::models::text::{Conversation, Detokenizer, MAX_TEXT_BYTES, Segment, Special};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

const HELP: &str = "\
/image FILE     show a picture, or a folder of frames, with the next question
/system TEXT   set the system message (alone: take it away); begins anew
/clear         begin anew
/exit          leave (or Ctrl-D)
/help          this
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one.";

/// Talks until the user leaves.
pub fn chat(args: &Chat, global: &Global) -> Result<()> {
    let setup = Setup::to_run(global, &args.running)?;
    let model = setup.open(&setup.locate(args.model.as_deref())?, args.running.format)?;
    let text = model.text()?;
    let mut conversation = Conversation::new(text.tokenizer.clone(), text.template.clone());
    if let Some(system) = &args.system {
        conversation.system(Some(system.clone()))?;
    }
    let options = generate_options(&model, &args.sampling, setup.console)?;
    // Pictures may come in any turn, up to the largest that the model takes.
    let pictures = match model.vision() {
        Ok((_, processor)) => PictureMemory::Anytime {
            fewest: *processor.crops().start(),
            most: *processor.crops().end(),
        },
        Err(_) => PictureMemory::Without,
    };
    let session = setup.session(&model, &args.running, pictures)?;
    let mut chat = Talk {
        setup,
        session,
        conversation,
        options,
        turns: 0,
        waiting: Vec::new(),
        shown: Vec::new(),
    };
    chat.setup.console.note("/help lists the commands");
    let mut input = Input::new()?;
    while let Some(line) = input.read()? {
        let line = line.trim();
        match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
            ("", _) => {}
            ("/exit" | "/quit", _) => break,
            ("/help", _) => say(HELP),
            ("/clear", _) => chat.begin_anew(),
            ("/system", message) => {
                let message = Some(message.trim().to_owned()).filter(|m| !m.is_empty());
                match chat.conversation.system(message) {
                    Ok(()) => chat.begin_anew(),
                    Err(error) => say(error),
                }
            }
            ("/image", file) => chat.look_at(file.trim()),
            (command, _) if command.starts_with('/') => {
                say(format_args!("{command}: no such command; /help lists them"))
            }
            _ => chat.answer(line)?,
        }
    }
    Ok(())
}

/// A conversation and the session that holds its cache.
struct Talk {
    setup: Setup,
    session: Session,
    conversation: Conversation,
    options: GenerateOptions,
    turns: u64,
    /// Pictures for the next question.
    waiting: Vec<Processed>,
    /// Those of earlier ones, in order.
    shown: Vec<Shown>,
}

/// A picture in the conversation.
struct Shown {
    /// Its first position.
    start: usize,
    features: Arc<Buffer>,
}

impl Talk {
    fn begin_anew(&mut self) {
        self.conversation.clear();
        self.session.truncate(0);
        self.waiting.clear();
        self.shown.clear();
    }

    /// Takes a picture for the next question.
    fn look_at(&mut self, file: &str) {
        if file.is_empty() {
            say("/image: expected a file");
            return;
        }
        let pictures = Pictures {
            images: vec![file.into()],
            num_crops: None,
        };
        let waiting = self.waiting.iter().map(Processed::tokens);
        let taken = self.conversation.ids().len() + waiting.sum::<usize>();
        let room = Room {
            positions: self.session.context().saturating_sub(taken),
            more: "/clear begins anew, --ctx makes room",
        };
        match pictures.open(&self.setup, self.session.model(), room) {
            Err(error) => say(describe(&error)),
            Ok(pictures) => {
                let tokens: usize = pictures.iter().map(Processed::tokens).sum();
                self.waiting.extend(pictures);
                let waiting = match self.waiting.len() {
                    1 => "1 picture".to_owned(),
                    n => format!("{n} pictures"),
                };
                say(format_args!(
                    "{file}: {tokens} positions; {waiting} for the next question"
                ));
            }
        }
    }

    /// Puts a question with the waiting pictures into the conversation. When something is wrong, nothing
    /// of it stays but the pictures, for another try.
    fn ask(&mut self, question: &str) -> Result<()> {
        let tokens: Vec<_> = self.waiting.iter().map(Processed::tokens).collect();
        let mut at = self.conversation.ids().len();
        if tokens.is_empty() {
            self.conversation.user(question)?;
            return Ok(());
        }
        let segments = self.conversation.user_with_pictures(question, &tokens)?;
        let (needed, context) = (self.conversation.ids().len(), self.session.context());
        let features = match needed > context {
            true => Err(anyhow::anyhow!(
                "the context of {context} tokens is full: the conversation would take {needed}, its pictures included"
            )),
            false => encode(&self.setup, &mut self.session, &self.waiting),
        };
        let features = features.inspect_err(|_| {
            self.conversation.take_back();
        })?;
        let mut features = features.into_iter();
        for segment in segments {
            if let Segment::Image { .. } = segment {
                let features = features.next().expect("one for each picture");
                self.shown.push(Shown {
                    start: at,
                    features,
                });
            }
            at += segment.len();
        }
        self.waiting.clear();
        Ok(())
    }

    /// What the session lacks of the conversation, to be appended to it.
    fn missing(&mut self) -> Vec<Piece> {
        let held = self.session.ids().len();
        let cut = |s: &&Shown| s.start < held && held < s.start + s.features.rows();
        if let Some(picture) = self.shown.iter().find(cut) {
            // The whole of it again.
            self.session.truncate(picture.start);
        }
        let (mut at, ids) = (self.session.ids().len(), self.conversation.ids());
        let mut pieces = Vec::new();
        let first = self.shown.partition_point(|picture| picture.start < at);
        for picture in &self.shown[first..] {
            pieces.push(Piece::Text(ids[at..picture.start].to_vec()));
            pieces.push(Piece::Picture(Arc::clone(&picture.features)));
            at = picture.start + picture.features.rows();
        }
        pieces.push(Piece::Text(ids[at..].to_vec()));
        pieces
    }

    /// One question, one answer. What the user can mend is said and the conversation goes on.
    fn answer(&mut self, question: &str) -> Result<()> {
        let before = self.conversation.ids().len();
        self.setup.cancel.reset();
        if let Err(error) = self.ask(question) {
            say(describe(&error));
            return Ok(());
        }
        // The session may lack the end of the last answer: its last token is never fed, and one
        // that was stopped early has no end. Everything after what it holds is new.
        let pieces = self.missing();
        let held = self.session.ids().len();
        let prompt = self.session.attach(&pieces);
        let model = Arc::clone(self.session.model());
        let text = model.text()?;
        let mut detokenizer = Detokenizer::new(&text.tokenizer, Special::Skip);
        // Another answer to the same question when it is asked twice, the same one for one seed.
        let mut options = self.options.clone();
        options.sampling.seed = options.sampling.seed.wrapping_add(self.turns);
        self.turns += 1;
        let mut failed = None;
        let outcome = generate(
            &mut self.session,
            &prompt,
            &options,
            &mut detokenizer,
            &self.setup.cancel,
            |event| {
                let (Event::Token { text, .. } | Event::Text(text)) = event;
                match Stdout
                    .write_all(text.as_bytes())
                    .and_then(|()| Stdout.flush())
                {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        failed = Some(error);
                        ControlFlow::Break(())
                    }
                }
            },
        );
        if let Some(error) = failed {
            return Err(error.into());
        }
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                // Nothing of this turn stays, neither in the conversation nor in the cache.
                self.conversation.take_back();
                self.session.truncate(before.min(held));
                self.shown.retain(|picture| picture.start < before);
                match error {
                    GenerateError::PromptTooLong {
                        held,
                        prompt,
                        context,
                    } => say(format_args!(
                        "the context of {context} tokens is full: {held} taken, {prompt} more asked; /clear begins anew, --ctx makes room"
                    )),
                    error => say(format_args!("error: {error}")),
                }
                return Ok(());
            }
        };
        writeln!(Stdout)?;
        // Of the stop tokens only the template's own end of turn belongs to the conversation.
        let mut ids = &outcome.ids[..];
        if let FinishReason::StopToken(id) = outcome.finish
            && !text.template.stop_tokens(&text.tokenizer)?.contains(&id)
        {
            ids = &ids[..ids.len() - 1];
        }
        self.conversation.assistant(ids)?;
        let context = self.session.context();
        self.setup.console.note(format_args!(
            "[{}; context {} of {context}]",
            summary(&outcome, &options),
            // The last token of an answer may find no place any more.
            self.conversation.ids().len().min(context),
        ));
        Ok(())
    }
}

/// Lines from a terminal with editing and history, or from a pipe as they are.
enum Input {
    Terminal(Box<Editor<(), FileHistory>>, Option<PathBuf>),
    Pipe(io::StdinLock<'static>),
}

impl Input {
    fn new() -> Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe(io::stdin().lock()));
        }
        let config = Config::builder()
            .auto_add_history(true)
            .max_history_size(1000)?
            .build();
        let mut editor = Editor::with_config(config)?;
        let file = cache_folder()
            .filter(|f| std::fs::create_dir_all(f).is_ok())
            .map(|f| f.join("history.txt"));
        if let Some(file) = &file {
            // No history yet is no error.
            let _ = editor.load_history(file);
        }
        Ok(Self::Terminal(Box::new(editor), file))
    }

    /// The next line, continued ones joined; `None` at the end.
    fn read(&mut self) -> Result<Option<String>> {
        let mut text = String::new();
        loop {
            let line = match self {
                Self::Pipe(pipe) => match signals::waiting(|| line_of(pipe))? {
                    Some(line) => line,
                    None => return Ok((!text.is_empty()).then_some(text)),
                },
                Self::Terminal(editor, file) => {
                    let prompt = if text.is_empty() { "> " } else { "… " };
                    match signals::waiting(|| editor.readline(prompt)) {
                        Ok(line) => {
                            if let Some(file) = file {
                                // A history that cannot be kept is no reason to stop talking.
                                let _ = editor.append_history(file);
                            }
                            line
                        }
                        Err(ReadlineError::Interrupted) => {
                            say("(Ctrl-D or /exit leaves)");
                            text.clear();
                            continue;
                        }
                        Err(ReadlineError::Eof) => return Ok(None),
                        Err(ReadlineError::Io(e)) if e.kind() == io::ErrorKind::InvalidData => {
                            say("(what was typed is not UTF-8)");
                            text.clear();
                            continue;
                        }
                        Err(error) => return Err(error).context("terminal"),
                    }
                }
            };
            match line.strip_suffix('\\') {
                Some(start) => text = text + start + "\n",
                None => return Ok(Some(text + &line)),
            }
        }
    }
}

/// The next line without its end, `None` after the last. No longer than what can be asked at all.
fn line_of(pipe: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = Vec::new();
    pipe.take(MAX_TEXT_BYTES as u64 + 1)
        .read_until(b'\n', &mut line)
        .context("stdin")?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.len() > MAX_TEXT_BYTES {
        bail!("stdin: expected a line of at most {MAX_TEXT_BYTES} bytes, found a longer one");
    }
    if line.ends_with(b"\n") {
        line.pop();
        if line.ends_with(b"\r") {
            line.pop();
        }
    }
    utf8(line, "stdin").map(Some)
}
