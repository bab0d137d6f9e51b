//! The list of compression methods, in the order in which they are applied, and their compilation.

use super::Plan;
use crate::Result;

/// A request's compression options as parsed from the wire, before compilation.
///
/// A method adds one optional field here; `None` everywhere compiles to the dense plan.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CompressionOptions {
    /// A named preset of the model.
    pub profile: Option<String>,
}

/// Compiles `options` for a model of `num_layers` decoder layers.
///
/// # Errors
/// [`crate::ZooError::Compression`] when the profile is unknown or an option does not fit the model.
pub fn compile(options: &CompressionOptions, num_layers: usize) -> Result<Plan> {
    match options.profile.as_deref() {
        None | Some("dense") => Ok(Plan::dense(num_layers)),
        Some(other) => Err(crate::ZooError::Compression(format!(
            "compression.profile {other:?} is not a profile of this model; use \"dense\""
        ))),
    }
}
