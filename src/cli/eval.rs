//! `phidias eval`: perplexity, and the distance to another model or format.

use super::args::{Eval, Global};
use super::console::{Stdout, Unit, say};
use super::device;
use super::files;
use super::open::Setup;
use super::signals;
use super::stats::{self, routing};
use anyhow::{Result, bail};
use phidias::Session;
use phidias::eval::{Encoded, Figures, evaluate};
use phidias::models::session::default_context;
use serde_json::{Value, json};
use std::io::Write;
use std::sync::Arc;

/// Windows of at most this many tokens when no context is asked: figures of different models are
/// then comparable, and a long text takes time in proportion to its length.
const WINDOW: usize = 512;

/// Measures a model on a text.
pub fn eval(args: &Eval, global: &Global) -> Result<()> {
    let setup = Setup::to_run(global, &args.running)?;
    let text = files::open_text(&args.text)?;
    if text.is_empty() {
        bail!("{}: the file is empty", args.text.display());
    }
    let origin = setup.locate(args.model.as_deref())?;
    let model = setup.open(&origin, args.running.format)?;
    stats::check(
        args.statistics.stats,
        model.config(),
        model.path().display(),
    )?;
    let context = args
        .running
        .ctx
        .unwrap_or_else(|| default_context(model.config()).min(WINDOW));
    let start = |model: Arc<phidias::Model>| {
        let mut options = phidias::SessionOptions {
            context: Some(context),
            ..setup.session_options(&args.running)
        };
        let plan = Session::plan(&model, &options).map_err(device::or_cpu)?;
        options.check_memory = setup.admit(&model, &plan, &args.running)?;
        let mut session = Session::new(model, &options).map_err(device::or_cpu)?;
        session.set_cancel(setup.cancel.clone());
        anyhow::Ok(session)
    };
    let other = match (&args.against, args.against_format) {
        (Some(other), _) => Some(setup.open(&setup.locate(Some(other))?, None)?),
        (None, Some(format)) => Some(setup.open(&origin, Some(format))?),
        (None, None) => None,
    };
    if let Some(other) = &other
        && other.config().vocab_size != model.config().vocab_size
    {
        bail!(
            "the models cannot be compared: {} has a vocabulary of {}, {} one of {}",
            model.path().display(),
            model.config().vocab_size,
            other.path().display(),
            other.config().vocab_size
        );
    }
    setup.console.note(format_args!(
        "{}: {} weights, windows of {context} tokens",
        model.path().display(),
        model.format()
    ));
    let mut session = start(model.clone())?;
    let mut against = other.as_ref().map(|m| start(m.clone())).transpose()?;
    let mut bar = setup.console.bar("evaluating", Unit::Tokens);
    let text = signals::waiting(|| Encoded::of(&text, &model))?;
    let figures = evaluate(&mut session, against.as_mut(), &text, |done, total| {
        bar.set(done as u64, Some(total as u64))
    })?;
    drop(bar);
    let routing = match args.statistics.stats {
        Some(_) => Some(routing(&session.take_routing()?)),
        None => None,
    };
    print(&figures, routing, args.json)
}

fn print(figures: &Figures, routing: Option<Value>, as_json: bool) -> Result<()> {
    let mut out = Stdout;
    if as_json {
        let mut object = json!({
            "tokens": figures.tokens,
            "bytes": figures.bytes,
            "nll": figures.nll,
            "perplexity": figures.perplexity(),
            "bits_per_byte": figures.bits_per_byte(),
        });
        if let Some(against) = figures.against {
            object["kl_mean"] = json!(against.kl_mean);
            object["kl_p99"] = json!(against.kl_p99);
            object["top1_agreement"] = json!(against.top1_agreement);
        }
        if let Some(routing) = routing {
            object["routing"] = routing;
        }
        writeln!(out, "{object}")?;
        return Ok(());
    }
    if let Some(routing) = routing {
        say(routing);
    }
    writeln!(out, "tokens          {}", figures.tokens)?;
    writeln!(out, "bytes           {}", figures.bytes)?;
    writeln!(out, "nll             {:.5} nats a token", figures.nll)?;
    let perplexity = figures.perplexity();
    match perplexity < 1e6 {
        true => writeln!(out, "perplexity      {perplexity:.4}")?,
        // Random weights, or another language than the model's.
        false => writeln!(out, "perplexity      {perplexity:.4e}")?,
    }
    writeln!(out, "bits per byte   {:.5}", figures.bits_per_byte())?;
    if let Some(against) = figures.against {
        writeln!(
            out,
            "KL divergence   {:.6} mean, {:.6} at 99 % of the tokens",
            against.kl_mean, against.kl_p99
        )?;
        writeln!(
            out,
            "same top token  {:.2} %",
            against.top1_agreement * 100.0
        )?;
    }
    Ok(())
}
