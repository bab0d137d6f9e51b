//! Compiles the GPU's kernels where a feature asks for them: by `nvcc` for GPUs, by the C++ compiler for the emulated
//! device. Without such a feature it does nothing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNELS: &str = "src/kernels/cuda";

/// Compute capabilities that are compiled for where `RHEOSTAT_CUDA_ARCHS` names no others: Hopper's.
const ARCHS: &str = "90";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for name in ["CUDA_HOME", "CUDA_PATH", "RHEOSTAT_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let asked = |feature: &str| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if asked("CUDA") || asked("CUDA_EMULATED") {
        println!("cargo:rerun-if-changed={KERNELS}");
    }
    #[cfg(feature = "cuda-emulated")]
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .warnings(true)
        .flag_if_supported("-Wno-unknown-pragmas")
        .file(format!("{KERNELS}/emulate/emulate.cpp"))
        .compile("rheostat_emulate");
    if asked("CUDA")
        && let Err(reason) = compile()
    {
        eprintln!("the GPU's kernels cannot be compiled: {reason}");
        std::process::exit(1);
    }
}

/// Machine code for each architecture and, for later ones, the last one's PTX, in one file.
fn compile() -> Result<(), String> {
    let nvcc = nvcc()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("kernels.fatbin");
    let archs = env::var("RHEOSTAT_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let archs: Vec<&str> = archs.split(',').map(str::trim).collect();
    let last = archs.last().copied().unwrap_or(ARCHS);
    let mut command = Command::new(&nvcc);
    command
        .args(["-std=c++17", "-O3", "--split-compile=0", "-fatbin", "-o"])
        .arg(&out)
        .arg(format!("{KERNELS}/kernels.cu"));
    for arch in &archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    let status = command.status().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if status.success() { Ok(()) } else { Err(format!("{} failed", nvcc.display())) }
}

/// The compiler of `CUDA_HOME`, of the folder that `deploy/cuda/toolchain` makes, of the usual place, or of the path.
fn nvcc() -> Result<PathBuf, String> {
    let root = env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?;
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let usual = [Path::new(&root).join("../target/cuda-toolchain"), PathBuf::from("/usr/local/cuda")];
    let path = env::var_os("PATH").unwrap_or_default();
    let candidates = homes.chain(usual).map(|home| home.join("bin/nvcc"));
    let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    candidates.chain(on_path).find(|nvcc| nvcc.is_file()).ok_or_else(|| {
        "there is no nvcc; run deploy/cuda/toolchain, or set CUDA_HOME to a CUDA toolkit of version 13".into()
    })
}
