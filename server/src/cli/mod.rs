//! The command line: one file a subcommand.

mod bitstack;
mod calibrate;
mod eval;
mod eval_vision;
mod key;
mod model;
pub(crate) mod offer;
mod plans;
mod pull;
mod serve;

pub use model::open_model;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::options::Options;

/// An inference server in which every request says how much of the model it wants.
#[derive(Debug, Parser)]
#[command(name = "rheostat", version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over HTTP and gRPC, pulling it first if it is not there
    Serve(Box<Options>),
    /// Fetch a model of the catalogue, or do nothing when it is there
    Pull(pull::Options),
    /// Measure a model on a text, once, for the compression methods that need it
    Calibrate(calibrate::Options),
    /// Build stacks of weights that fit any memory budget
    Bitstack(bitstack::Options),
    /// Make an API key and the lines of the configuration that let it in
    Key(key::Options),
    /// Measure quality, speed and memory of compression plans
    Eval(eval::Options),
    /// Measure what dropping image tokens costs and gains, on questions about images
    EvalVision(eval_vision::Options),
}

/// Runs the command line and returns the process's exit status: 0 when all went well, 1 when it could not
/// be done, 2 when the command line is wrong.
pub fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Serve(options) => serve::main(*options),
        Command::Pull(options) => pull::main(&options),
        Command::Calibrate(options) => calibrate::main(&options),
        Command::Bitstack(options) => bitstack::main(&options),
        Command::Key(options) => key::main(&options),
        Command::Eval(options) => eval::main(&options),
        Command::EvalVision(options) => eval_vision::main(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("rheostat: {message}");
            ExitCode::FAILURE
        }
    }
}
