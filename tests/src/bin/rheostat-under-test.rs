//! The real binary, where cargo tells the integration tests of it.

fn main() -> std::process::ExitCode {
    rheostat::cli::main()
}
