//! The `rheostat` binary.

/// Gives memory back to the operating system within seconds of being freed, on a thread of its own. The C library's
/// allocator keeps it: what ten thousand connections once needed would count as the server's for ever.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    rheostat::cli::main()
}
