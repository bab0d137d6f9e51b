//! `rheostat bitstack info`

use std::path::PathBuf;

use model_zoo::compression::bitstack::{Artefact, LinearId, Projection};

/// `rheostat bitstack info`'s flags.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The stack
    file: PathBuf,
    /// Read every block and check it against its checksum
    #[arg(long)]
    check: bool,
}

/// Says what is in one stack.
pub(super) fn main(options: &Options) -> Result<(), String> {
    let artefact = Artefact::open(&options.file).map_err(|e| e.to_string())?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let (config, from) = (artefact.config(), artefact.provenance());
    println!("model        {} ({}, {} layers)", from.model, config.architecture, config.num_layers);
    println!("weights      {}", from.weights_sha256);
    println!("build        {}", from.settings);
    if !from.text.is_empty() {
        println!("text         {}, {} tokens, {}", from.text, from.tokens, from.text_sha256);
    }
    let bytes =
        |entries: &[model_zoo::compression::bitstack::BlockEntry]| entries.iter().map(|e| e.len).sum::<u64>();
    let (rest, base, stack) = (artefact.tensor_bytes(), bytes(artefact.base()), bytes(artefact.stack()));
    println!("rest         {:9.2} MiB, not decomposed", mib(rest));
    println!("base         {:9.2} MiB with it: the least budget as stored", mib(rest + base));
    println!("stack        {:9.2} MiB in {} blocks", mib(stack), artefact.stack().len());
    println!("all          {:9.2} MiB", mib(rest + base + stack));
    println!("rank         {}", ranks(&artefact));
    for share in 0..=8 {
        let held = artefact.stack().len() * share / 8;
        let entries = &artefact.stack()[..held];
        let levels = Projection::ALL.map(|projection| {
            let of = |entries: &[_]| {
                let of =
                    |e: &&model_zoo::compression::bitstack::BlockEntry| e.linear.projection == projection;
                entries.iter().filter(of).count()
            };
            let all = artefact.base().len() / Projection::ALL.len();
            format!("{projection:?} {:.2}", 1.0 + of(entries) as f64 / all as f64).to_lowercase()
        });
        println!("{:9.2} MiB  mean levels: {}", mib(rest + base + bytes(entries)), levels.join(", "));
    }
    if options.check {
        check(&artefact)?;
        println!("every byte is what its checksum says");
    }
    Ok(())
}

fn ranks(artefact: &Artefact) -> String {
    let mut ranks: Vec<_> =
        LinearId::all(artefact.config().num_layers).map(|linear| artefact.shape(linear).rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

fn check(artefact: &Artefact) -> Result<(), String> {
    use model_zoo::weights::WeightSource;
    let message = |e: model_zoo::ZooError| e.to_string();
    artefact.tokenizer().map_err(message)?;
    let tensors = artefact.tensors();
    for name in tensors.names() {
        tensors.tensor(name).map_err(message)?;
    }
    for entry in artefact.base().iter().chain(artefact.stack()) {
        artefact.read_block(entry).map_err(message)?;
    }
    Ok(())
}
