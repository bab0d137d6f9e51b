//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{compare, compression, connections, engine, gpu, overhead, run};

/// Measures engines and servers.
#[derive(Debug, Parser)]
#[command(name = "rheostat-loadtest", version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Send load to a server and report latency, goodput, throughput and energy
    Run(Box<run::Options>),
    /// Send the same load to two servers in turn and print ratios
    Compare(Box<compare::Options>),
    /// Prefill and batched decode of a model on this machine, in tokens per second
    Engine {
        /// A GGUF file or a Hugging Face folder
        #[arg(long)]
        model: PathBuf,
        /// Threads of the compute pool; all cores by default
        #[arg(long)]
        threads: Option<std::num::NonZeroUsize>,
        /// Only measurements whose name contains this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Decode and prefill of random weights at known shapes on a GPU, beside what must be reached
    Gpu(gpu::Options),
    /// Decode under compression plans, alone and mixed, beside what the plans' closed forms promise
    Compression {
        /// The GGUF file of smollm2-135m
        #[arg(long)]
        model: PathBuf,
        /// Threads of the compute pool; all cores by default
        #[arg(long)]
        threads: Option<std::num::NonZeroUsize>,
        /// Rounds, in each of which every batch has a turn
        #[arg(long, default_value_t = 15)]
        rounds: usize,
    },
    /// What the server adds to a model: time of a request and of a token with a model that does nothing
    Overhead(overhead::Options),
    /// What idle connections and clients that never read cost: memory, and the times of others
    Connections(connections::Options),
    /// The server that `overhead` measures; ends with its standard input
    #[command(hide = true)]
    StubServer(Box<overhead::stub::Options>),
}

/// Runs the command line and returns the process's exit status.
pub fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Run(options) => run::main(&options),
        Command::Compare(options) => compare::main(&options),
        Command::Engine { model, threads, only } => {
            engine::measure(&model, threads, &only).map_err(|e| e.to_string())
        }
        Command::Gpu(options) => gpu::main(&options),
        Command::Compression { model, threads, rounds } => {
            compression::measure(&model, threads, rounds).map_err(|e| e.to_string())
        }
        Command::Overhead(options) => overhead::main(&options),
        Command::Connections(options) => connections::main(&options),
        Command::StubServer(options) => overhead::stub::main(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rheostat-loadtest: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_command_has_flags_that_fit_together() {
        Args::command().debug_assert();
    }
}
