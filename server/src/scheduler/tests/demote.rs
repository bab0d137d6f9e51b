//! Demoted sequences give way, and still end.

use super::trace::check;

#[test]
fn a_demoted_sequence_decodes_in_every_fourth_step_while_others_run() {
    check(
        "batched=8 pages=32",
        "
        add A x4 max=9
        add B y4 max=9
        step
        => A[0..4]* B[0..4]* | used 2 cached 0 free 30
        demote A
        step
        => B[4..5]* | used 3 cached 0 free 29
        step
        => B[5..6]* | used 3 cached 0 free 29
        step
        => B[6..7]* | used 3 cached 0 free 29
        step
        => B[7..8]* A[4..5]* | used 4 cached 0 free 28
        step
        => B[8..9]* | used 5 cached 0 free 27
        abort B
        => used 2 cached 2 free 28
        step
        => A[5..6]* | used 2 cached 2 free 28
        step
        => A[6..7]* | used 2 cached 2 free 28
        ",
    );
}

#[test]
fn a_demoted_sequence_is_the_first_to_lose_its_pages_though_it_came_first() {
    check(
        "batched=16 pages=5 seqs=4",
        "
        add A x7 max=9
        demote A
        step
        => A[0..7]* | used 2 cached 0 free 3
        add B y7 max=9
        step
        => B[0..7]* | used 4 cached 0 free 1
        step
        => B[7..8]* | used 4 cached 0 free 1
        step
        => B[8..9]* | used 5 cached 0 free 0
        step
        => B[9..10]* A[7..8]* | used 5 cached 0 free 0
        step
        => B[10..11]* | used 5 cached 0 free 0
        step
        => B[11..12]* | used 5 cached 0 free 0
        step
        => B[12..13]* -A | used 4 cached 1 free 0
        ",
    );
}
