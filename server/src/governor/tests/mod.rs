mod trace;

use trace::check;

/// Names, loss, work, KV.
const FRONT: &str =
    "dense 0 1 1 | think 0.01 1 0.9 | drop1 0.05 0.95 0.9 | drop4 0.16 0.88 0.8 | drop8 0.6 0.8 0.7";

#[test]
fn a_late_token_moves_to_the_least_loss_that_is_enough() {
    check(
        FRONT,
        "ttft=1000 tpot=50 hold=2 calm=10",
        "0 tpot=40
         => dense
         1 tpot=48
         => drop4 | dense → drop4 for tpot at 0.96
         2 tpot=60
         => drop4
         3 tpot=49
         => drop8 | drop4 → drop8 for tpot at 0.98
         9 tpot=90
         => drop8",
    );
}

#[test]
fn what_nothing_brings_down_gets_the_cheapest_within_the_floor() {
    check(
        FRONT,
        "ttft=1000 tpot=50 floor=0.2",
        "0 tpot=200
         => drop4 | dense → drop4 for tpot at 4.00
         30 tpot=200
         => drop4",
    );
}

#[test]
fn a_queue_counts_before_its_first_tokens_come() {
    check(
        FRONT,
        "ttft=1000 tpot=50",
        "0 waiting=4 starts=10 ttft=300
         => dense
         1 waiting=10 starts=10 ttft=500
         => drop8 | dense → drop8 for queue at 1.00
         20 waiting=3 starts=0
         => drop8",
    );
    check(
        FRONT,
        "ttft=1000 tpot=50",
        "0 waiting=1 starts=0
         => drop8 | dense → drop8 for queue at inf",
    );
}

#[test]
fn scarce_kv_moves_along_kv_and_power_along_work() {
    check(
        FRONT,
        "ttft=1000 tpot=50 cap=100",
        "0 kv=0.95 watts=50
         => drop4 | dense → drop4 for kv at 1.00
         9 kv=0.5 watts=101
         => drop8 | drop4 → drop8 for power at 1.01",
    );
    check(FRONT, "ttft=1000 tpot=50", "0 watts=1000\n=> dense");
}

#[test]
fn calm_leads_back_step_by_step_and_only_where_it_is_predicted_to_stay_calm() {
    check(
        FRONT,
        "ttft=1000 tpot=50 hold=2 calm=10",
        "0 ttft=990
         => drop8 | dense → drop8 for ttft at 0.99
         1 ttft=300
         => drop8
         10 ttft=300
         => drop8
         11 ttft=300
         => drop4 | drop8 → drop4 for calm at 0.30
         12 ttft=300
         => drop4
         22 ttft=300
         => drop1 | drop4 → drop1 for calm at 0.30
         30 ttft=750
         => drop1
         33 ttft=300
         => drop1
         43 ttft=300 kv=0.66
         => think | drop1 → think for calm at 0.69
         60 kv=0.2
         => think
         70
         => dense | think → dense for calm at 0.00",
    );
}

#[test]
fn a_step_back_that_was_undone_is_tried_again_after_twice_the_time() {
    check(
        "dense 0 1 1 | half 0.1 0.5 1",
        "ttft=1000 tpot=50 hold=1 calm=10",
        "0 tpot=50
         => half | dense → half for tpot at 1.00
         1 tpot=20
         => half
         11 tpot=20
         => dense | half → dense for calm at 0.40
         13 tpot=52
         => half | dense → half for tpot at 1.04
         14 tpot=20
         => half
         24 tpot=20
         => half
         34 tpot=20
         => dense | half → dense for calm at 0.40
         90 tpot=52
         => half | dense → half for tpot at 1.04
         91 tpot=20
         => half
         101 tpot=20
         => dense | half → dense for calm at 0.40
         120 tpot=44
         => dense",
    );
}

#[test]
fn a_step_back_that_would_not_last_is_not_made() {
    check(
        "dense 0 1 1 | half 0.1 0.5 1",
        "ttft=1000 tpot=50 hold=1 calm=10",
        "0 tpot=50
         => half | dense → half for tpot at 1.00
         1 tpot=22
         => half
         60 tpot=22
         => half",
    );
}

#[test]
fn other_targets_hold_at_once_and_keep_the_choice_where_they_may() {
    use crate::governor::{Front, Governor, Observed, Point, Policy};
    use crate::telemetry::{Metrics, MetricsCompat, ServedModel};
    let point =
        |name: &str, loss, work| Point { name: name.into(), perplexity_increase: loss, work, kv: 1.0 };
    let front = |floor| Front::new(vec![point("mild", 0.05, 0.9), point("deep", 0.3, 0.5)], floor);
    let policy = |tpot_ms| Policy { ttft_ms: 1000.0, tpot_ms, cap_watts: None, hold_s: 0.0, calm_s: 1000.0 };
    let metrics = std::sync::Arc::new(Metrics::new(&ServedModel::default(), MetricsCompat::None));
    let governor = Governor::new(front(1.0), policy(50.0), None, std::sync::Arc::clone(&metrics));
    let seen = |now_s| Observed { now_s, tpot_ms: Some(90.0), ..Observed::default() };
    let state = governor.tick(&Default::default(), &seen(0.0));
    assert_eq!(governor.choose(), "deep");
    // A higher target: the choice stays until it is calm.
    governor.set(front(1.0), policy(200.0));
    assert_eq!(governor.choose(), "deep");
    // A lower floor: the point is gone.
    governor.set(front(0.1), policy(200.0));
    assert_eq!(governor.choose(), "mild");
    assert!(metrics.render().contains("rheostat_governor_profile{profile=\"deep\"} 0"));
    // A state from before does not bring it back.
    let state = governor.tick(&state, &seen(1.0));
    assert_eq!((governor.choose().as_str(), state.point), ("mild", 1));
    governor.set(front(0.0), policy(10.0));
    governor.tick(&state, &seen(2.0));
    assert_eq!(governor.choose(), "dense");
}
