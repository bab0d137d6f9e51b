//! `rheostat-loadtest`: measures the engine, and later the server.
//!
//! `engine` runs a model's steps without a server in front, so that kernels can be compared with other
//! engines' (see `compare_llama_cpp.py`). One JSON object a line: what was measured, and the best and the
//! median rate of three rounds in tokens per second. `compression` does the same for compression plans.

mod compression;
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
    /// Decode under compression plans, alone and mixed, beside what the plans' closed forms promise.
    Compression {
        /// The GGUF file of smollm2-135m.
        #[arg(long)]
        model: PathBuf,
        /// Threads of the compute pool; all cores by default.
        #[arg(long)]
        threads: Option<std::num::NonZeroUsize>,
        /// Rounds, in each of which every batch has a turn.
        #[arg(long, default_value_t = 15)]
        rounds: usize,
    },
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Engine { model, threads, only } => engine::measure(&model, threads, &only),
        Command::Compression { model, threads, rounds } => compression::measure(&model, threads, rounds),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rheostat-loadtest: {error}");
            ExitCode::FAILURE
        }
    }
}
