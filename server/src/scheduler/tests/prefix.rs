//! Sharing of equal prefixes.

use super::trace::check;

#[test]
fn a_finished_prompt_is_reused_but_for_its_last_token() {
    check(
        "batched=32",
        "
        add A x10 max=1
        step
        => A[0..10]* | used 0 cached 2 free 14
        add B x10y5 max=1
        step
        => B[8..15]* | used 0 cached 3 free 13
        add C x8 max=1
        step
        => C[4..8]* | used 0 cached 3 free 13
        stats
        => running 0 waiting 0 hits 12/33 preemptions 0
        ",
    );
}

#[test]
fn output_is_shared_as_prompt_is() {
    check(
        "batched=32",
        "
        add A x3 max=9
        step
        => A[0..3]* | used 1 cached 0 free 15
        step
        => A[3..4]* | used 1 cached 0 free 15
        step
        => A[4..5]* | used 2 cached 0 free 14
        step
        => A[5..6]* | used 2 cached 0 free 14
        step
        => A[6..7]* | used 2 cached 0 free 14
        step
        => A[7..8]* | used 2 cached 0 free 14
        add B @A max=1
        step
        => A[8..9]* B[8..9]* | used 3 cached 0 free 13
        stats
        => running 1 waiting 0 hits 8/12 preemptions 0
        ",
    );
}

#[test]
fn a_running_sequence_shares_what_is_committed() {
    check(
        "batched=8 pages=32",
        "
        add A x8 max=9
        step
        => A[0..8]* | used 2 cached 0 free 30
        add B x8y2 max=9
        step
        => A[8..9]* B[8..10]* | used 4 cached 0 free 28
        abort A
        => used 3 cached 0 free 29
        step
        => B[10..11]* | used 3 cached 0 free 29
        ",
    );
}

#[test]
fn choices_wait_for_their_common_prompt() {
    check(
        "batched=8 pages=32",
        "
        add A1 x14 max=2 group=A
        add A2 x14 max=2 group=A
        add A3 x14 max=2 group=A
        add B b4 max=1
        step
        => A1[0..4] B[0..4]* | used 1 cached 1 free 30
        step
        => A1[4..12] | used 3 cached 1 free 28
        step
        => A1[12..14]* A2[12..14]* A3[12..14]* | used 6 cached 1 free 25
        step
        => A1[14..15]* A2[14..15]* A3[14..15]* | used 0 cached 4 free 28
        stats
        => running 0 waiting 0 hits 24/46 preemptions 0
        ",
    );
}

#[test]
fn choices_of_a_request_with_prompt_logprobs_share_the_one_that_computes_all() {
    check(
        "batched=16 pages=32",
        "
        add O x10 max=1
        step
        => O[0..10]* | used 0 cached 2 free 30
        add A1 x10 max=1 group=A bypass
        add A2 x10 max=1 group=A
        step
        => A1[0..10]* A2[8..10]* | used 0 cached 2 free 30
        stats
        => running 0 waiting 0 hits 8/20 preemptions 0
        ",
    );
}

#[test]
fn another_salt_or_plan_shares_nothing() {
    check(
        "batched=32 pages=32",
        "
        add A x10 max=1
        step
        => A[0..10]* | used 0 cached 2 free 30
        add B x10 max=1 salt=7
        add C x10 max=1 plan=1
        step
        => B[0..10]* C[0..10]* | used 0 cached 6 free 26
        add D x10 max=1 salt=7
        step
        => D[8..10]* | used 0 cached 6 free 26
        stats
        => running 0 waiting 0 hits 8/40 preemptions 0
        ",
    );
}

#[test]
fn the_end_of_the_least_recently_used_prefix_is_evicted_first() {
    check(
        "batched=32 pages=6",
        "
        add A a9 max=1
        step
        => A[0..9]* | used 0 cached 2 free 4
        add B b9 max=1
        step
        => B[0..9]* | used 0 cached 4 free 2
        add C c9 max=1
        step
        => C[0..9]* | used 0 cached 5 free 1
        add D a9 max=1
        step
        => D[4..9]* | used 0 cached 5 free 1
        stats
        => running 0 waiting 0 hits 4/36 preemptions 0
        ",
    );
}

#[test]
fn equal_blocks_computed_side_by_side_become_one() {
    check(
        "batched=32 pages=32",
        "
        add A x10 max=3 bypass
        add B x10 max=3 bypass
        step
        => A[0..10]* B[0..10]* | used 4 cached 0 free 28
        step
        => A[10..11]* B[10..11]* | used 4 cached 0 free 28
        ",
    );
}

#[test]
fn without_prefix_caching_nothing_stays() {
    check(
        "batched=32 cache=0",
        "
        add A x10 max=2
        add B x10 max=2
        step
        => A[0..10]* B[0..10]* | used 6 cached 0 free 10
        step
        => A[10..11]* B[10..11]* | used 0 cached 0 free 16
        stats
        => running 0 waiting 0 hits 0/0 preemptions 0
        ",
    );
}
