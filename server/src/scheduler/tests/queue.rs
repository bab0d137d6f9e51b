//! Who is admitted next.

use super::trace::check;

#[test]
fn requests_are_served_in_order_of_arrival() {
    check(
        "batched=16 seqs=2",
        "
        add A a4 max=2
        add B b4 max=3
        add C c4 max=1
        step
        => A[0..4]* B[0..4]* | used 2 cached 0 free 14
        step
        => A[4..5]* B[4..5]* | used 2 cached 1 free 13
        step
        => B[5..6]* C[0..4]* | used 0 cached 3 free 13
        ",
    );
}

#[test]
fn the_choices_of_one_request_do_not_push_out_others() {
    check(
        "batched=32 seqs=2 cache=0",
        "
        add A1 a3 max=2 group=A
        add A2 a3 max=2 group=A
        add A3 a3 max=2 group=A
        add B b3 max=2
        add C c3 max=2
        step
        => A1[0..3]* B[0..3]* | used 2 cached 0 free 14
        step
        => A1[3..4]* B[3..4]* | used 0 cached 0 free 16
        step
        => C[0..3]* A2[0..3]* | used 2 cached 0 free 14
        step
        => C[3..4]* A2[3..4]* | used 0 cached 0 free 16
        step
        => A3[0..3]* | used 1 cached 0 free 15
        step
        => A3[3..4]* | used 0 cached 0 free 16
        ",
    );
}

#[test]
fn one_that_does_not_fit_is_waited_for() {
    check(
        "batched=32 pages=8",
        "
        add A a12 max=9
        add B b20 max=2
        add C c2 max=2
        step
        => A[0..12]* | used 3 cached 0 free 5
        stop A
        step
        => A[12..13]* | used 0 cached 3 free 5
        step
        => B[0..20]* C[0..2]* | used 6 cached 2 free 0
        ",
    );
}

#[test]
fn what_can_never_run_is_refused() {
    check(
        "pages=4",
        "
        add A a17 max=1
        => the sequence needs 5 KV pages and there are 4
        add B b10 max=8
        => the sequence needs 5 KV pages and there are 4
        add C c10 max=7
        add C c10 max=7
        => a live sequence has this id
        add D d0 max=1
        => the prompt has no tokens
        run
        => 8 steps | used 0 cached 4 free 0
        stats
        => running 0 waiting 0 hits 0/10 preemptions 0
        ",
    );
}

#[test]
fn abort_works_in_queue_prefill_and_decode() {
    check(
        "seqs=2",
        "
        add A a6 max=9
        add B b20 max=9
        add C c4 max=9
        step
        => A[0..4] B[0..4] | used 2 cached 0 free 14
        step
        => A[4..6]* B[4..10] | used 5 cached 0 free 11
        abort C
        => used 5 cached 0 free 11
        abort B
        => used 2 cached 2 free 12
        abort A
        => used 0 cached 3 free 13
        abort A
        => used 0 cached 3 free 13
        step
        => nothing | used 0 cached 3 free 13
        stats
        => running 0 waiting 0 hits 0/26 preemptions 0
        ",
    );
}
