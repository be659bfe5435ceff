"""Which kind of targets a model's name stands for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.target_pools import GRACE_S, Member, TargetKind, differences, elect

A, B = TargetKind("a", "v", "float32", 1), TargetKind("b", "v", "float32", 1)

members = st.lists(st.builds(Member, st.sampled_from([A, B]), st.sampled_from([0.0, 1.0, GRACE_S, 60.0])), max_size=8)


def test_a_restart_keeps_the_kind_and_a_replacement_changes_it() -> None:
    assert elect(A, [Member(A, GRACE_S - 1), Member(B, GRACE_S)]) == A
    assert elect(A, [Member(A, GRACE_S), Member(B, 0.0)]) == B
    assert elect(A, [Member(B, 0.0)]) == B
    assert elect(A, []) == A
    assert elect(None, []) is None


@given(members, st.sampled_from([A, B, None]), st.randoms(use_true_random=False))
def test_all_coordinators_choose_the_same_whatever_they_saw_before_and_in_which_order(
    members, present, shuffler
) -> None:
    fresh = [member for member in members if member.down_s < GRACE_S]
    shuffled = list(members)
    shuffler.shuffle(shuffled)
    elected = elect(present, shuffled)
    if not fresh:
        assert elected == present
    else:
        assert elected == elect(None, members)
        assert sum(m.kind == elected for m in fresh) * 2 >= len(fresh)


def test_differences_are_named() -> None:
    assert differences(B, A) == "digest b instead of a"
