//! `rheostat key`

use crate::auth::{KeyHash, random_key};

/// Makes an API key.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// What logs and metrics are to call its clients
    #[arg(default_value = "client")]
    name: String,
    /// The key may use the operators' endpoints
    #[arg(long)]
    admin: bool,
}

/// Prints the key, for the client, and the lines of the configuration that let it in.
pub(super) fn main(options: &Options) -> Result<(), String> {
    let key = random_key();
    let hash = KeyHash::of(key.as_bytes());
    println!("# Give this key to the client; it is not kept anywhere:\n# {key}");
    println!("[[keys]]\nname = {:?}\nsha256 = \"{hash}\"", options.name);
    if options.admin {
        println!("admin = true");
    }
    Ok(())
}
