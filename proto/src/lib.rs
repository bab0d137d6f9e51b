//! Wire types of the gRPC services, generated from the `.proto` files beside this crate, with their
//! clients and servers. Only wire types: what they mean is the server's `grpc` module.

/// Rheostat's own services: generation, tokenization, models.
pub mod rheostat {
    /// Version 1.
    #[allow(missing_docs, clippy::all)]
    pub mod v1 {
        tonic::include_proto!("rheostat.v1");
    }
}

/// The Open Inference Protocol.
#[allow(missing_docs, clippy::all)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// Encoded `FileDescriptorSet`s of everything above with its imports, for server reflection.
pub const FILE_DESCRIPTOR_SETS: [&[u8]; 2] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/rheostat_v1.bin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/inference.bin")),
];
