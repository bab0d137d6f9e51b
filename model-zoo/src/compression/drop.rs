//! LLM-Drop (arXiv 2406.15786; methods.md §3): sublayers whose output hardly turns the residual stream
//! never run. Dropped attention holds no KV.

use super::options::DropLayers;
use super::{Context, Plan, Sublayer, refuse};
use crate::Result;

/// Takes the least important sublayers out of `plan`.
///
/// # Errors
/// [`crate::ZooError::Compression`] without calibration, or when more is asked than may be dropped.
pub(super) fn apply(options: &DropLayers, context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let DropLayers { attention, ffn, joint } = *options;
    if joint > 0 && (attention > 0 || ffn > 0) {
        return refuse(
            "compression.drop: `joint` counts sublayers of both kinds; give either `joint`, or `attention` and `ffn`",
        );
    }
    if attention + ffn + joint == 0 {
        return Ok(());
    }
    let most = plan.num_layers().saturating_sub(2);
    for (name, asked, most) in
        [("attention", attention, most), ("ffn", ffn, most), ("joint", joint, 2 * most)]
    {
        if asked > most {
            return refuse(format!(
                "compression.drop.{name} is {asked}, and this model can drop {most}: its first and last layers always run"
            ));
        }
    }
    let calibration = context.calibration("drop")?;
    drop_sublayers(plan, &calibration.attention_order()[..attention], Sublayer::Attention);
    drop_sublayers(plan, &calibration.ffn_order()[..ffn], Sublayer::Ffn);
    for &(layer, sublayer) in &calibration.joint_order()[..joint] {
        plan.limit(layer, sublayer, 0);
    }
    plan.options_mut().drop = Some(*options);
    Ok(())
}

fn drop_sublayers(plan: &mut Plan, layers: &[usize], sublayer: Sublayer) {
    for &layer in layers {
        plan.limit(layer, sublayer, 0);
    }
}
