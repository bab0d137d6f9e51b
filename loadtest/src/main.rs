//! `rheostat-loadtest`: measures the engine, and later the server.
//!
//! `engine` runs a model's steps without a server in front, so that kernels can be compared with other
//! engines' (see `compare_llama_cpp.py`). One JSON object a line: what was measured, and the best and the
//! median rate of three rounds in tokens per second.

mod engine;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prefill and batched decode of a model on this machine, in tokens per second.
    Engine {
        /// A GGUF file or a Hugging Face folder.
        #[arg(long)]
        model: PathBuf,
        /// Threads of the compute pool; all cores by default.
        #[arg(long)]
        threads: Option<std::num::NonZeroUsize>,
        /// Only measurements whose name contains this.
        #[arg(long, default_value = "")]
        only: String,
    },
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Engine { model, threads, only } => engine::measure(&model, threads, &only),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rheostat-loadtest: {error}");
            ExitCode::FAILURE
        }
    }
}
