//! Wire types of the gRPC services, generated from the `.proto` files beside this crate, with their
//! clients and servers. Only wire types: what they mean is the server's `grpc` module.

use prost::Message;

/// Rheostat's own services: generation, tokenization, models.
pub mod rheostat {
    /// Version 1.
    #[allow(missing_docs, clippy::all, clippy::pedantic)]
    pub mod v1 {
        tonic::include_proto!("rheostat.v1");
    }
}

/// The Open Inference Protocol.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The well-known types that `rheostat.v1` uses for free-form objects.
pub mod well_known {
    pub use prost_types::value::Kind;
    pub use prost_types::{ListValue, Struct, Value};
}

/// Encoded `FileDescriptorSet`s of everything above with its imports, for server reflection.
pub const FILE_DESCRIPTOR_SETS: [&[u8]; 2] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/rheostat_v1.bin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/inference.bin")),
];

/// Paths (`/package.Service/Method`) of every call in an encoded `FileDescriptorSet`.
///
/// # Errors
/// When `encoded` is not one.
pub fn method_paths(encoded: &[u8]) -> Result<Vec<String>, prost::DecodeError> {
    let set = prost_types::FileDescriptorSet::decode(encoded)?;
    let mut paths = Vec::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                paths.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    Ok(paths)
}
