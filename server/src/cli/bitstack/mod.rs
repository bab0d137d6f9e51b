//! `rheostat bitstack`

mod build;
mod import;
mod info;
mod measure;

use clap::Subcommand;

/// Makes and looks into stacks: one file of weights for any memory budget.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build a stack from a model's weights; an interrupted build goes on where it was
    Build(build::Options),
    /// Make a stack of a checkpoint in the layout of the paper's authors
    Import(import::Options),
    /// Say what is in a stack
    Info(info::Options),
    /// Measure perplexity at many budgets, beside GGUF's quantizations of the same weights
    Measure(measure::Options),
}

/// Runs a subcommand.
pub(super) fn main(options: &Options) -> Result<(), String> {
    match &options.command {
        Command::Build(options) => build::main(options),
        Command::Import(options) => import::main(options),
        Command::Info(options) => info::main(options),
        Command::Measure(options) => measure::main(options),
    }
}
