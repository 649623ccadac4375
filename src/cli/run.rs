//! `phidias run`: one prompt, one answer.

use super::args::{Global, Run};
use super::console::{Stdout, count, say};
use super::files;
use super::open::{Setup, generate_options};
use super::pictures::{self, Room};
use super::signals;
use super::stats::{self, routing};
use anyhow::Result;
use phidias::engine::generate::{Event, FinishReason, GenerateOptions, Outcome, generate};
use phidias::engine::memory::Size;
use phidias::models::Text;
use phidias::models::session::PictureMemory;
use phidias::models::text::{Detokenizer, Special};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::ops::ControlFlow;

/// Answers one prompt.
pub fn run(args: &Run, global: &Global) -> Result<()> {
    let setup = Setup::to_run(global, &args.running)?;
    let prompt = prompt(args)?;
    args.pictures.files()?;
    let model = setup.open(&setup.locate(model(args))?, args.running.format)?;
    stats::check(
        args.statistics.stats,
        model.config(),
        model.path().display(),
    )?;
    let pictures = args
        .pictures
        .open(&setup, &model, Room::of(&model, &args.running))?;
    let segments = pictures::segments(&model, &prompt, args.raw, &pictures)?;
    let mut options = generate_options(&model, &args.sampling, setup.console)?;
    options.sampling.logprobs = args.logprobs;
    let mut session = setup.session(&model, &args.running, PictureMemory::of(&pictures))?;
    let ids = pictures::attach(&setup, &mut session, segments, pictures)?;
    let mut detokenizer = detokenizer(model.text()?, &ids, args.raw)?;
    let mut out = Output {
        json: args.json,
        text: String::new(),
        tokens: Vec::new(),
        started: false,
        failed: None,
    };
    let outcome = generate(
        &mut session,
        &ids,
        &options,
        &mut detokenizer,
        &setup.cancel,
        |event| out.event(event),
    );
    out.end(outcome.is_ok())?;
    let outcome = outcome?;
    let routing = match args.statistics.stats {
        Some(_) => Some(routing(&session.take_routing()?)),
        None => None,
    };
    if args.json {
        let mut object = out.object(&outcome, &options.stop_strings);
        object["kv_bytes"] = json!(session.cache().bytes());
        object["kv_dropped_bytes"] = json!(session.cache().dropped_bytes());
        if let Some(routing) = routing {
            object["routing"] = routing;
        }
        writeln!(Stdout, "{object}")?;
    } else if let Some(routing) = routing {
        say(routing);
    }
    setup.console.note(summary(&outcome, &options));
    if args.running.drop_hidden_keys {
        let [held, dropped] = [session.cache().bytes(), session.cache().dropped_bytes()].map(Size);
        setup
            .console
            .note(format_args!("KV cache: {held} held, {dropped} dropped"));
    }
    if model.config().moe.is_some() {
        setup.tell_residency(&model);
    }
    Ok(())
}

/// `[MODEL] [-]`
fn positional(words: &[String]) -> Result<(Option<&str>, bool), String> {
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Ok((None, false)),
        ["-"] => Ok((None, true)),
        [model] | ["-", model] => Ok((Some(model), words.len() == 2)),
        [model, "-"] => Ok((Some(model), true)),
        _ => Err(format!(
            "'{}' after the model: expected -, or -p TEXT, or -f FILE",
            words[1]
        )),
    }
}

/// The model of checked arguments, where one is named.
pub fn model(args: &Run) -> Option<&str> {
    positional(&args.model).ok().and_then(|(model, _)| model)
}

/// Whether there is one prompt.
pub fn check(args: &Run) -> Result<(), String> {
    let (_, from_stdin) = positional(&args.model)?;
    match (from_stdin, args.prompt.is_some() || args.file.is_some()) {
        (true, true) => {
            Err("- reads the prompt from stdin; it cannot stand beside -p or -f".into())
        }
        (false, false) => Err("no prompt: give -p TEXT, -f FILE, or - for stdin".into()),
        _ => Ok(()),
    }
}

/// The prompt of checked arguments.
fn prompt(args: &Run) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(prompt), _) => Ok(prompt.clone()),
        (_, Some(file)) => files::open_text(file),
        _ => signals::waiting(|| files::read_text(io::stdin(), "stdin")),
    }
}

/// A chat answer is a text of its own; a raw one continues the prompt.
fn detokenizer(text: &Text, prompt: &[u32], raw: bool) -> Result<Detokenizer> {
    Ok(match raw {
        true => Detokenizer::after(&text.tokenizer, prompt, Special::Skip)?,
        false => Detokenizer::new(&text.tokenizer, Special::Skip),
    })
}

/// The answer on its way to stdout.
struct Output {
    json: bool,
    text: String,
    tokens: Vec<Value>,
    started: bool,
    failed: Option<io::Error>,
}

impl Output {
    fn event(&mut self, event: Event) -> ControlFlow<()> {
        let text = match event {
            Event::Token {
                id,
                logprob,
                top,
                text,
            } => {
                if let Some(logprob) = logprob {
                    let top: Vec<_> = top
                        .iter()
                        .map(|(id, p)| json!({ "id": id, "logprob": p }))
                        .collect();
                    self.tokens
                        .push(json!({ "id": id, "logprob": logprob, "top": top }));
                }
                text
            }
            Event::Text(text) => text,
        };
        if self.json {
            self.text += &text;
            return ControlFlow::Continue(());
        }
        self.started |= !text.is_empty();
        match Stdout
            .write_all(text.as_bytes())
            .and_then(|()| Stdout.flush())
        {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failed = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    /// The last line's end, or what went wrong with stdout. An answer that failed before its first
    /// word leaves stdout empty.
    fn end(&mut self, answered: bool) -> Result<()> {
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        if !self.json && (answered || self.started) {
            writeln!(Stdout)?;
        }
        Ok(())
    }

    fn object(&self, outcome: &Outcome, stop_strings: &[String]) -> Value {
        let mut object = json!({
            "text": self.text,
            "ids": outcome.ids,
            "finish": finish_name(outcome.finish),
            "prompt_tokens": outcome.prompt_tokens,
            "generated_tokens": outcome.ids.len(),
            "prompt_tok_s": outcome.prefill_rate(),
            "tok_s": outcome.decode_rate(),
            "passes": outcome.lookup.passes,
            "proposed": outcome.lookup.proposed,
            "accepted": outcome.lookup.accepted,
            "tokens_per_pass": outcome.lookup.tokens_per_pass(),
        });
        if let FinishReason::StopString(index) = outcome.finish {
            object["stop_string"] = json!(stop_strings.get(index));
        }
        if !self.tokens.is_empty() {
            object["logprobs"] = json!(self.tokens);
        }
        object
    }
}

fn finish_name(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::StopToken(_) => "stop_token",
        FinishReason::StopString(_) => "stop_string",
        FinishReason::Length => "length",
        FinishReason::ContextFull => "context_full",
        FinishReason::Cancelled => "cancelled",
    }
}

/// One line: tokens, rates, what lookup gave if it was asked for, and why it ended when that is not the model's own end.
pub fn summary(outcome: &Outcome, options: &GenerateOptions) -> String {
    let rate = |rate: Option<f64>| rate.map_or(String::new(), |r| format!(" ({r:.1} tokens/s)"));
    let end = match outcome.finish {
        FinishReason::StopToken(_) | FinishReason::StopString(_) => "",
        FinishReason::Length => "; ended at -n",
        FinishReason::ContextFull => "; the context is full (--ctx)",
        FinishReason::Cancelled => "; stopped",
    };
    let stats = outcome.lookup;
    let lookup = match stats.tokens_per_pass() {
        Some(rate) if options.lookup > 0 => format!(
            "; lookup: {rate:.2} tokens a pass, {} passes, {} of {} guesses right",
            stats.passes, stats.accepted, stats.proposed
        ),
        _ => String::new(),
    };
    format!(
        "prompt: {}{}; answer: {}{}{lookup}{end}",
        count(outcome.prompt_tokens, "token"),
        rate(outcome.prefill_rate()),
        count(outcome.ids.len(), "token"),
        rate(outcome.decode_rate()),
    )
}
