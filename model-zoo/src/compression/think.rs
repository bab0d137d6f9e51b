//! ThinK (arXiv 2407.21018; methods.md §2): key channels that the prompt's last queries hardly look at
//! are left out of the cache once the prompt is computed.

use super::options::Think;
use super::{Context, Plan, refuse};
use crate::Result;

/// # Errors
/// Always: the cache has no pruned pages yet.
pub(super) fn apply(_options: &Think, _context: &Context<'_>, _plan: &mut Plan) -> Result<()> {
    refuse("compression.think is not served yet")
}
