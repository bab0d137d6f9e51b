//! What a step holds: chunks, mixed steps, the token budget.

use super::trace::check;

#[test]
fn prefill_is_chunked_and_decode_follows() {
    check(
        "batched=8 pages=16",
        "
        add A x10 max=4
        step
        => A[0..8] | used 2 cached 0 free 14
        step
        => A[8..10]* | used 3 cached 0 free 13
        step
        => A[10..11]* | used 3 cached 0 free 13
        step
        => A[11..12]* | used 3 cached 0 free 13
        step
        => A[12..13]* | used 0 cached 3 free 13
        step
        => nothing | used 0 cached 3 free 13
        ",
    );
}

#[test]
fn decode_comes_before_prefill_chunks_in_one_step() {
    check(
        "batched=8",
        "
        add A x4 max=9
        step
        => A[0..4]* | used 1 cached 0 free 15
        add B y20 max=2
        step
        => A[4..5]* B[0..7] | used 4 cached 0 free 12
        step
        => A[5..6]* B[7..14] | used 6 cached 0 free 10
        step
        => A[6..7]* B[14..20]* | used 7 cached 0 free 9
        step
        => A[7..8]* B[20..21]* | used 2 cached 5 free 9
        step
        => A[8..9]* | used 3 cached 5 free 8
        ",
    );
}

#[test]
fn a_long_prompt_lets_short_ones_pass() {
    check(
        "batched=16 pages=64 seqs=4",
        "
        add L l100 max=2
        step
        => L[0..16] | used 4 cached 0 free 60
        add S s6 max=2
        step
        => L[16..26] S[0..6]* | used 9 cached 0 free 55
        step
        => S[6..7]* L[26..41] | used 11 cached 1 free 52
        add T t3 max=2
        add U u30 max=2
        step
        => L[41..49] T[0..3]* U[0..5] | used 16 cached 1 free 47
        ",
    );
}

#[test]
fn budget_that_nobody_takes_goes_to_the_long_prompt() {
    check(
        "batched=16 pages=64 seqs=1",
        "
        add L l40 max=2
        add S s6 max=2
        step
        => L[0..16] | used 4 cached 0 free 60
        step
        => L[16..32] | used 8 cached 0 free 56
        step
        => L[32..40]* | used 10 cached 0 free 54
        ",
    );
}

#[test]
fn no_more_sequences_run_than_decode_rows_fit() {
    check(
        "batched=2 seqs=4",
        "
        add A a1 max=9
        add B b1 max=9
        add C c1 max=2
        step
        => A[0..1]* B[0..1]* | used 2 cached 0 free 14
        step
        => A[1..2]* B[1..2]* | used 2 cached 0 free 14
        stop A
        step
        => A[2..3]* B[2..3]* | used 1 cached 0 free 15
        step
        => B[3..4]* C[0..1]* | used 2 cached 0 free 14
        ",
    );
}

#[test]
fn scoring_a_prompt_generates_nothing() {
    check(
        "batched=8",
        "
        add A x10 max=0
        step
        => A[0..8] | used 2 cached 0 free 14
        stop A
        step
        => A[8..10]* | used 0 cached 2 free 14
        step
        => nothing | used 0 cached 2 free 14
        ",
    );
}
