//! Tests of the scheduler as data: text traces that show what it decides, and properties over random
//! traces. Both run on a [`simulation`] of KV content that checks every plan and every page.

mod batching;
mod demote;
mod pages;
mod prefix;
mod properties;
mod queue;
mod seal;
mod simulation;
mod trace;
