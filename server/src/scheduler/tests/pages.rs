//! Pages: preemption, failed steps, changes between plan and commit, a changing pool.

use super::trace::check;

#[test]
fn the_last_admitted_gives_way_and_resumes_before_others_from_what_is_cached() {
    check(
        "batched=32 pages=7 seqs=2",
        "
        add A a7 max=12
        add B b7 max=9
        add C c2 max=1
        step
        => A[0..7]* B[0..7]* | used 4 cached 0 free 3
        step
        => A[7..8]* B[7..8]* | used 4 cached 0 free 3
        step
        => A[8..9]* B[8..9]* | used 6 cached 0 free 1
        step
        => A[9..10]* B[9..10]* | used 6 cached 0 free 1
        step
        => A[10..11]* B[10..11]* | used 6 cached 0 free 1
        step
        => A[11..12]* B[11..12]* | used 6 cached 0 free 1
        step
        => A[12..13]* | used 7 cached 0 free 0
        step
        => A[13..14]* | used 7 cached 0 free 0
        step
        => A[14..15]* | used 7 cached 0 free 0
        step
        => A[15..16]* | used 7 cached 0 free 0
        step
        => A[16..17]* -B | used 5 cached 2 free 0
        step
        => A[17..18]* | used 0 cached 6 free 1
        step
        => B[8..13]* C[0..2]* | used 4 cached 2 free 1
        step
        => B[13..14]* | used 4 cached 2 free 1
        step
        => B[14..15]* | used 0 cached 5 free 2
        step
        => nothing | used 0 cached 5 free 2
        stats
        => running 0 waiting 0 hits 0/16 preemptions 1
        ",
    );
}

#[test]
fn a_prefill_takes_pages_and_budget_from_a_later_decode_of_the_same_step() {
    check(
        "batched=5 pages=22",
        "
        add A a80 max=1
        add B b1 max=50
        run 16
        => 16 steps | used 20 cached 0 free 2
        step
        => B[16..17]* A[64..68] | used 22 cached 0 free 0
        step
        => A[68..73] -B | used 19 cached 3 free 0
        step
        => A[73..78] | used 20 cached 2 free 0
        ",
    );
}

#[test]
fn a_sequence_may_use_the_whole_pool() {
    check(
        "batched=4 pages=4",
        "
        add A a9 max=8
        run
        => 10 steps | used 0 cached 4 free 0
        add B b9 max=8
        add C c9 max=8
        run
        => 20 steps | used 0 cached 4 free 0
        stats
        => running 0 waiting 0 hits 0/27 preemptions 0
        ",
    );
}

#[test]
fn pages_are_counted_by_layer() {
    check(
        "batched=32 pages=30 layers=5",
        "
        add A a9 max=8
        step
        => A[0..9]* | used 15 cached 0 free 15
        abort A
        => used 0 cached 10 free 20
        ",
    );
}

#[test]
fn a_failed_step_commits_nothing() {
    check(
        "batched=8",
        "
        add A a10 max=3
        add B b3 max=3
        fail
        => A[0..5] B[0..3]* | used 3 cached 0 free 13
        fail
        => A[0..5] B[0..3]* | used 3 cached 0 free 13
        step
        => A[0..5] B[0..3]* | used 3 cached 0 free 13
        fail
        => B[3..4]* A[5..10]* | used 4 cached 0 free 12
        step
        => B[3..4]* A[5..10]* | used 4 cached 0 free 12
        abort A
        => used 1 cached 2 free 13
        abort B
        => used 0 cached 3 free 13
        ",
    );
}

#[test]
fn a_failed_step_may_be_followed_by_another_plan() {
    check(
        "batched=8",
        "
        add A a10 max=3
        add B b10 max=3
        fail
        => A[0..4] B[0..4] | used 2 cached 0 free 14
        abort A
        => used 1 cached 0 free 15
        fail
        => B[0..8] | used 2 cached 0 free 14
        add C c2 max=1
        step
        => B[0..6] C[0..2]* | used 2 cached 0 free 14
        ",
    );
}

#[test]
fn abort_between_plan_and_commit_drops_the_row() {
    check(
        "batched=16",
        "
        add A a6 max=3
        add B b6 max=3
        plan
        => A[0..6]* B[0..6]* | used 4 cached 0 free 12
        abort A
        => used 2 cached 0 free 14
        commit
        => used 2 cached 0 free 14
        add A a6 max=3
        step
        => B[6..7]* A[0..6]* | used 4 cached 0 free 12
        ",
    );
}

#[test]
fn an_aborted_ids_successor_is_not_committed_by_the_old_plan() {
    check(
        "batched=16",
        "
        add A a6 max=3
        plan
        => A[0..6]* | used 2 cached 0 free 14
        abort A
        => used 0 cached 0 free 16
        add A b6 max=3
        commit
        => used 0 cached 0 free 16
        step
        => A[0..6]* | used 2 cached 0 free 14
        ",
    );
}

#[test]
fn shrinking_evicts_then_preempts_and_never_fails_a_sequence() {
    check(
        "batched=32 pages=16",
        "
        add O o9 max=1
        step
        => O[0..9]* | used 0 cached 2 free 14
        add A a9 max=8
        add B b9 max=8
        step
        => A[0..9]* B[0..9]* | used 6 cached 2 free 8
        resize 8
        => 8 pages | used 6 cached 2 free 0
        step
        => A[9..10]* B[9..10]* | used 6 cached 2 free 0
        resize 2
        => 4 pages | used 3 cached 0 free 1
        step
        => A[10..11]* -B | used 3 cached 0 free 1
        run
        => 11 steps | used 0 cached 2 free 0
        stats
        => running 0 waiting 0 hits 0/27 preemptions 1
        ",
    );
}

#[test]
fn what_lies_beyond_a_shrunk_pool_moves_below_and_nobody_is_preempted() {
    check(
        "batched=32 pages=16",
        "
        add A a9 max=8
        add B b9 max=8
        step
        => A[0..9]* B[0..9]* | used 6 cached 0 free 10
        abort A
        => used 3 cached 2 free 11
        resize 4
        => 4 pages | used 3 cached 1 free 0
        step
        => B[9..10]* | used 3 cached 1 free 0
        run
        => 6 steps | used 0 cached 4 free 0
        stats
        => running 0 waiting 0 hits 0/18 preemptions 0
        ",
    );
}

#[test]
fn a_shrunk_pool_admits_by_its_new_size_and_grows_again() {
    check(
        "batched=32 pages=8",
        "
        resize 2
        => 2 pages | used 0 cached 0 free 2
        add A a9 max=1
        => the sequence needs 3 KV pages and there are 2
        resize 4
        => 4 pages | used 0 cached 0 free 4
        add A a9 max=1
        step
        => A[0..9]* | used 0 cached 2 free 2
        ",
    );
}

#[test]
fn shrinking_between_plan_and_commit_drops_the_rows() {
    check(
        "batched=32 pages=16",
        "
        add A a9 max=8
        add B b9 max=2
        plan
        => A[0..9]* B[0..9]* | used 6 cached 0 free 10
        resize 4
        => 4 pages | used 3 cached 0 free 1
        commit
        => used 3 cached 0 free 1
        run
        => 9 steps | used 0 cached 3 free 1
        stats
        => running 0 waiting 0 hits 0/18 preemptions 1
        ",
    );
}
