//! The places that models run in, for checks that hold in all of them.

use std::path::Path;

use model_zoo::loader::{LoadOptions, load};
use model_zoo::models::CausalLm;

#[cfg(feature = "cuda-emulated")]
use crate::gpu::{device, error, on};

/// The relative error of a GPU's logits that rounding to bf16 makes.
pub(crate) const BF16: f64 = 2e-2;
/// The same beside a CPU's that rounds to int8.
pub(crate) const INT8: f64 = 6e-2;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    Cpu,
    /// An emulated GPU, or the machine's.
    #[cfg(feature = "cuda-emulated")]
    Gpu,
}

/// Makes tests of checks, which take a [`Place`], in every place. One that is not named is never used, which the
/// compiler tells.
macro_rules! everywhere {
    ($($check:ident),* $(,)?) => {
        mod cpu {
            $(#[test]
            fn $check() {
                super::$check(crate::place::Place::Cpu);
            })*
        }
        #[cfg(feature = "cuda-emulated")]
        mod gpu_conformance {
            $(#[test]
            fn $check() {
                super::$check(crate::place::Place::Gpu);
            })*
        }
    };
}
pub(crate) use everywhere;

impl Place {
    pub(crate) fn load(self, path: &Path) -> Box<dyn CausalLm> {
        match self {
            Self::Cpu => load(path, &LoadOptions::default()).unwrap().model,
            // Threads run in one order for folders, and in the other for artefacts.
            #[cfg(feature = "cuda-emulated")]
            Self::Gpu => on(device(usize::from(path.is_file())), path),
        }
    }

    /// Fails where logits depend on which steps computed them. On the CPU they are the same bits. On a GPU the number of
    /// a step's tokens decides which kernels run and in which order they add, and what they hand on is rounded: the
    /// logits of each token have a relative error below `most`.
    #[track_caller]
    pub(crate) fn assert_same(self, found: &[Vec<f32>], expected: &[Vec<f32>], (most, what): (f64, &str)) {
        match self {
            Self::Cpu => assert!(found == expected, "{what}: other bits; {most} is for GPUs"),
            #[cfg(feature = "cuda-emulated")]
            Self::Gpu => {
                assert_eq!(found.len(), expected.len(), "{what}");
                let apart: Vec<_> =
                    found.chunks(1).zip(expected.chunks(1)).map(|(a, b)| error(a, b)).collect();
                // NaN is wrong, too.
                let near = apart.iter().all(|&apart| apart < most);
                assert!(near, "{what}: relative errors of {apart:.4?}");
            }
        }
    }
}
