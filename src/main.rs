//! The command line of Phidias.
#![forbid(unsafe_code)]
// `println!` and `eprintln!` panic where nothing can be written: `console::say`, `writeln!` with its error.
#![warn(clippy::print_stderr, clippy::print_stdout)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !phidias::models::foreign::panics_are_caught() {
            report(panic);
        }
    }));
    let arguments = cli::args::Arguments::read();
    match cli::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if cli::console::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            cli::console::say(format_args!("error: {}", cli::console::describe(&error)));
            ExitCode::FAILURE
        }
    }
}
