//! `rheostat bitstack build`

use std::path::PathBuf;

use clap::ValueEnum;
use model_zoo::compression::bitstack::artefact::{EXTENSION, Provenance};
use model_zoo::compression::bitstack::build::{self, Method, Settings};
use model_zoo::compression::bitstack::order;
use model_zoo::compression::bitstack::source::Source;
use model_zoo::eval::Windows;
use model_zoo::loader::{LoadOptions, weights_sha256};
use model_zoo::tokenizer::Tokenizer;
use sha2::{Digest, Sha256};

use crate::cli::calibrate::{Bar, read_text};
use crate::cli::model::ModelFlags;
use crate::telemetry::logs::{self, LogFormat};

/// Tokens of a window on which inputs are measured.
const WINDOW: usize = 512;
/// Tokens of a window on which the order is measured.
const ORDER_WINDOW: usize = 128;
/// Windows on which the order is measured: from the end of the text.
const ORDER_WINDOWS: usize = 2;

/// `rheostat bitstack build`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    model: ModelFlags,
    /// UTF-8 text like that which the model is to serve
    #[arg(long)]
    text: PathBuf,
    /// Where the stack goes [default: beside the weights]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Levels of every matrix: each takes about one bit a weight
    #[arg(long, default_value_t = 6)]
    levels: usize,
    /// Rank of a level's magnitudes; small models want a low one
    #[arg(long, default_value_t = 2)]
    rank: usize,
    /// How matrices are decomposed
    #[arg(long, value_enum, default_value = "fitted")]
    method: MethodFlag,
    /// First levels that are chosen together, 1 to 4 [with --method fitted]
    #[arg(long, default_value_t = 3)]
    together: usize,
    /// How the blocks are sorted
    #[arg(long, value_enum, default_value = "sensitivity")]
    order: OrderFlag,
    /// Windows of 512 tokens on which the inputs of the matrices are measured
    #[arg(long, default_value_t = 32)]
    windows: usize,
    /// Hold an unquantized embedding in Q8_0
    #[arg(long)]
    embedding_q8: bool,
    /// Level of log lines
    #[arg(long, env = "RHEOSTAT_LOG", default_value = "info")]
    log: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MethodFlag {
    /// Signs and factors fitted to what the matrix is applied to
    Fitted,
    /// As the paper does it
    Published,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OrderFlag {
    /// By error times how much the model minds it, a byte; one measurement a matrix
    Sensitivity,
    /// By relative error of the outputs, a byte; no measurements
    Error,
    /// As published: by perplexity, level by level; one measurement a block
    Perplexity,
    /// The same a byte
    PerplexityPerByte,
}

impl From<OrderFlag> for order::Order {
    fn from(flag: OrderFlag) -> Self {
        match flag {
            OrderFlag::Sensitivity => Self::Sensitivity,
            OrderFlag::Error => Self::Error,
            OrderFlag::Perplexity => Self::Perplexity,
            OrderFlag::PerplexityPerByte => Self::PerplexityPerByte,
        }
    }
}

/// Builds one stack and says where it is.
pub(super) fn main(options: &Options) -> Result<(), String> {
    logs::init(&options.log, LogFormat::Text)?;
    let text = read_text(&options.text)?;
    let found = options.model.find()?;
    let source = Source::open(&found.path).map_err(|e| e.to_string())?;
    let tokenizer = Tokenizer::load(&source.tokenizer, None).map_err(|e| e.to_string())?;
    let tokens = tokenizer.encode(&text, false).map_err(|e| e.to_string())?;
    let needed = options.windows * WINDOW + ORDER_WINDOWS * ORDER_WINDOW;
    if options.windows == 0 || tokens.len() < needed {
        return Err(format!(
            "{} windows need a text of {needed} tokens, this one has {}: give a longer one, or fewer windows",
            options.windows,
            tokens.len()
        ));
    }
    let (front, back) = tokens.split_at(tokens.len() - ORDER_WINDOWS * ORDER_WINDOW);
    let bos = tokenizer.special().bos;
    let inputs: Vec<_> =
        Windows { tokens: front, len: WINDOW, prompt: 0, max: options.windows, bos }.iter().collect();
    let order: Vec<_> =
        Windows { tokens: back, len: ORDER_WINDOW, prompt: 0, max: ORDER_WINDOWS, bos }.iter().collect();
    let settings = Settings {
        levels: options.levels,
        rank: options.rank,
        method: match options.method {
            MethodFlag::Fitted => Method::Fitted,
            MethodFlag::Published => Method::Published,
        },
        group: options.together,
        order: options.order.into(),
        eight_bit: options.embedding_q8,
        threads: options.model.threads.unwrap_or(LoadOptions::default().threads).get(),
    };
    let provenance = Provenance {
        model: found.name.clone(),
        weights_sha256: weights_sha256(&found.path).map_err(|e| e.to_string())?,
        text: options.text.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        text_sha256: Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect(),
        tokens: options.windows * WINDOW,
        settings: String::new(),
    };
    let out = options.out.clone().unwrap_or_else(|| found.path.with_extension(EXTENSION));
    let mut bar = Bar::default();
    let windows = build::Windows { inputs: &inputs, order: &order };
    build::build(&source, (&settings, provenance), windows, (&out, &mut |progress| bar.show(progress)))
        .map_err(|e| e.to_string())?;
    println!("{}", out.display());
    Ok(())
}
