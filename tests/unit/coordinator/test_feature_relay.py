"""Which features a draft is told, against a list of all that the target told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.common.items import Identity, Tokens
from services.common.values import MAX_FEATURE_ROWS
from services.coordinator.feature_relay import FeatureRelay

SIZE = 4


def answer(rows: list[int], num_tokens: int) -> Tokens:
    features = b"".join(row.to_bytes(SIZE) for row in rows)
    return Tokens(Identity("s", 1, 1, 0, 0), tuple(range(num_tokens)), 0, 0, True, features=features)


def numbers(features: bytes) -> list[int]:
    return [int.from_bytes(features[i : i + SIZE]) for i in range(0, len(features), SIZE)]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 20), st.integers(0, 20)),
        st.tuples(st.just("gap"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
        st.tuples(st.just("rewind"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(EVENTS)
def test_the_draft_is_told_the_newest_rows_that_it_lacks(events: list[tuple[str, int, int]]) -> None:
    relay, committed, num_told = FeatureRelay(), [], 0
    for kind, num_tokens, num_cut in events:
        if kind == "add":
            rows = [len(committed) + i for i in range(num_tokens)]
            num_committed = max(0, num_tokens - num_cut)
            relay.add(answer(rows, num_tokens), num_committed)
            committed += rows[:num_committed]
        elif kind == "gap":
            relay.add(answer([], num_tokens), num_tokens)
            committed += [None] * num_tokens
        elif kind == "rewind":
            relay.rewind()
            num_told = 0
        else:
            newest = []
            for row in reversed(committed[num_told:][-MAX_FEATURE_ROWS:]):
                if row is None:
                    break
                newest.insert(0, row)
            assert numbers(relay.take()) == newest
            num_told = len(committed)


def test_an_answer_whose_rows_are_not_one_a_token_is_a_gap() -> None:
    relay = FeatureRelay()
    relay.add(answer([1], 1), 1)
    odd = answer([2], 1)
    relay.add(Tokens(odd.identity, (5, 6, 7), 0, 0, True, features=odd.features), 3)
    assert relay.take() == b""


def test_an_interrupt_without_tokens_is_no_gap() -> None:
    relay = FeatureRelay()
    relay.add(answer([1], 1), 1)
    relay.add(answer([], 0), 0)
    assert numbers(relay.take()) == [1]
