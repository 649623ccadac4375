//! One file a command; text goes to stdout, everything else to stderr.

pub mod args;
mod bench;
mod chat;
pub mod console;
mod device;
mod eval;
mod files;
mod inspect;
mod logits;
mod open;
mod pictures;
mod quantize;
mod run;
mod signals;
mod stats;
mod synth;

use anyhow::Result;
use args::{Arguments, Command};

/// Runs one command.
pub fn run(arguments: Arguments) -> Result<()> {
    let Arguments { command, global } = arguments;
    match command {
        Command::Run(args) => run::run(&args, &global),
        Command::Chat(args) => chat::chat(&args, &global),
        Command::Quantize(args) => quantize::quantize(&args, &global),
        Command::Inspect(args) => inspect::inspect(&args, &global),
        Command::Logits(args) => logits::logits(&args, &global),
        Command::Synth(args) => synth::synth(&args, &global),
        Command::Eval(args) => eval::eval(&args, &global),
        Command::Embed(args) => pictures::embed(&args, &global),
        Command::Bench(args) => bench::bench(&args, &global),
    }
}
