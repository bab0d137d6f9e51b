//! The `rheostat-loadtest` binary.

/// The server's: the server that is measured without a model runs in this binary.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    rheostat_loadtest::cli::main()
}
