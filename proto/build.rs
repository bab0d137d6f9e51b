//! Compiles the protos without a system `protoc`.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use prost::Message;

const SETS: [(&str, &[&str]); 2] = [
    (
        "rheostat_v1",
        &[
            "rheostat/v1/admin.proto",
            "rheostat/v1/generation.proto",
            "rheostat/v1/models.proto",
            "rheostat/v1/tokenization.proto",
        ],
    ),
    ("inference", &["inference/grpc_predict_v2.proto"]),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=rheostat");
    println!("cargo:rerun-if-changed=inference");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (name, files) in SETS {
        let descriptors = protox::compile(files, ["."])?;
        fs::write(out.join(name).with_extension("bin"), descriptors.encode_to_vec())?;
        tonic_prost_build::configure().compile_fds(descriptors)?;
    }
    Ok(())
}
