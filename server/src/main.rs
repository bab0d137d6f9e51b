//! The `rheostat` binary.

fn main() -> std::process::ExitCode {
    rheostat::cli::main()
}
