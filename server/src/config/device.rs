//! What a model runs on, as the operator says it.

use std::fmt;
use std::str::FromStr;

use model_zoo::loader::Target;

/// `cpu`, `cuda`, `cuda:1`, `auto`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub enum DeviceChoice {
    /// The CPU.
    #[default]
    Cpu,
    /// The NVIDIA GPU of this index.
    Cuda(usize),
    /// The first GPU where one can be used, else the CPU.
    Auto,
}

impl DeviceChoice {
    /// Opens it.
    ///
    /// # Errors
    /// A sentence: why there is no such GPU, and what to do.
    pub fn open(self) -> Result<Target, String> {
        match self {
            Self::Cpu => Ok(Target::Cpu),
            Self::Cuda(index) => Target::gpu(index).map_err(|e| e.to_string()),
            Self::Auto => Ok(Target::gpu(0).unwrap_or_else(|reason| {
                tracing::info!(%reason, "the model runs on the CPU");
                Target::Cpu
            })),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            "auto" => return Ok(Self::Auto),
            _ => {}
        }
        let index = text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        index.map(Self::Cuda).ok_or_else(|| format!("{text:?} is no device: it is cpu, cuda, cuda:N or auto"))
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_people_write_them() {
        for (text, choice) in
            [("cpu", DeviceChoice::Cpu), ("cuda:0", DeviceChoice::Cuda(0)), ("cuda:3", DeviceChoice::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        for wrong in ["gpu", "cuda:", "cuda:-1", ""] {
            assert!(wrong.parse::<DeviceChoice>().unwrap_err().contains("cpu, cuda, cuda:N or auto"));
        }
    }

    #[test]
    fn a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu() {
        // No machine has so many.
        let error = DeviceChoice::Cuda(4096).open().unwrap_err();
        assert!(error.contains("GPU") || error.contains("NVIDIA"), "{error}");
        if cfg!(not(feature = "cuda")) {
            assert!(error.contains("deploy/cuda/build") && error.contains("device = \"cpu\""), "{error}");
            assert!(matches!(DeviceChoice::Auto.open(), Ok(Target::Cpu)));
        }
    }
}
