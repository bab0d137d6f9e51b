//! The `rheostat-loadtest` binary.

fn main() -> std::process::ExitCode {
    rheostat_loadtest::cli::main()
}
