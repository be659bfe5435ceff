from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.values import FinishReason, TokenOrigin, TopLogProbs
from services.coordinator.detokenizer import ByteTextStream
from services.coordinator.tokenizer import SimulatedTokenizer
from services.coordinator.trim import EndRules, Trimmed, Trimmer, log_prob_row_bytes, pack_log_probs, unpack_log_probs

EOS = 256
TARGET = TokenOrigin.TARGET


def a_trimmer(*, stop: tuple[str, ...] = (), stop_ids: tuple[int, ...] = (), max_tokens: int = 100) -> Trimmer:
    text = SimulatedTokenizer().text_stream(include_special_tokens=False, context=())
    return Trimmer(EndRules(frozenset({EOS}), frozenset(stop_ids), stop, max_tokens), text)


def text_of(*parts: Trimmed) -> str:
    return "".join(text for part in parts for text in (*part.texts, part.tail))


@pytest.mark.parametrize(
    ("trimmer", "token_ids", "kept", "reason", "text"),
    [
        (a_trimmer(), [*b"ab", EOS, *b"cd"], 3, FinishReason.EOS, "ab"),
        (a_trimmer(stop=("bc",)), [*b"abcd"], 3, FinishReason.STOP, "a"),
        (a_trimmer(stop_ids=(98,)), [*b"abcd"], 2, FinishReason.STOP, "ab"),
        (a_trimmer(max_tokens=3), [*b"abcd"], 3, FinishReason.LENGTH, "abc"),
        (a_trimmer(max_tokens=3), [*b"ab", EOS], 3, FinishReason.EOS, "ab"),
        (a_trimmer(), [*b"abcd"], 4, None, "abcd"),
        (a_trimmer(max_tokens=2), [0x61, 0xC3], 2, FinishReason.LENGTH, "a\ufffd"),
        (a_trimmer(stop=("bz",), max_tokens=2), [*b"ab"], 2, FinishReason.LENGTH, "ab"),
    ],
)
def test_tokens_are_cut_behind_the_one_that_ends_it(
    trimmer: Trimmer, token_ids: list[int], kept: int, reason: FinishReason | None, text: str
) -> None:
    trimmed = trimmer.trim(token_ids, [TARGET] * len(token_ids), [0.0] * len(token_ids))
    assert (len(trimmed.token_ids), len(trimmed.log_probs), trimmed.finish) == (kept, kept, reason)
    assert text_of(trimmed) == trimmer.text == text


def test_behind_a_stop_string_not_even_half_a_character_is_left() -> None:
    text = ByteTextStream({0: b"a", 1: b"STOP\xc3"})
    trimmer = Trimmer(EndRules(frozenset(), frozenset(), ("STOP",), 100), text)
    trimmed = trimmer.trim([0, 1, 0], [TARGET] * 3)
    assert (trimmed.texts, trimmed.tail, trimmed.finish) == (("a", ""), "", FinishReason.STOP)


@given(st.lists(st.sampled_from([*b"ab\xc3\xa9", EOS]), max_size=30), st.data())
@settings(deadline=None, max_examples=150)
def test_grouping_changes_nothing(token_ids: list[int], data: st.DataObject) -> None:
    stops = ("aba", "bb")
    whole = a_trimmer(stop=stops, max_tokens=20).trim(token_ids, [TARGET] * len(token_ids))
    trimmer, parts, at = a_trimmer(stop=stops, max_tokens=20), [], 0
    while at < len(token_ids):
        size = data.draw(st.integers(1, 5))
        group = token_ids[at : at + size]
        parts.append(trimmer.trim(group, [TARGET] * len(group)))
        at += size
    assert [i for part in parts for i in part.token_ids] == list(whole.token_ids)
    assert [t for part in parts for t in part.texts] == list(whole.texts)
    assert text_of(*parts) == text_of(whole)
    assert next((part.finish for part in parts if part.finish), None) == whole.finish


def test_nothing_is_kept_after_the_end() -> None:
    trimmer = a_trimmer(max_tokens=1)
    trimmer.trim([97], [TARGET])
    late = trimmer.trim([98], [TARGET])
    assert (late.token_ids, late.offset, late.finish) == ((), 1, FinishReason.LENGTH)


def test_a_reader_gets_only_what_it_lacks() -> None:
    trimmed = a_trimmer(max_tokens=3).trim([*b"abc"], [TARGET] * 3, [1.0, 2.0, 3.0])
    rest = trimmed.since(2)
    assert (rest.offset, rest.token_ids, rest.texts, rest.log_probs) == (2, (99,), ("c",), (3.0,))
    assert trimmed.since(9).token_ids == ()
    assert trimmed.since(0) == trimmed


def test_log_probs_survive_packing() -> None:
    tops = (TopLogProbs((5, 6), (-0.5, -1.5)), TopLogProbs((7,), (-2.0,)))
    trimmed = a_trimmer().trim([*b"ab"], [TARGET] * 2, [-0.25, -0.75], tops)
    packed = pack_log_probs(trimmed, 2)
    assert len(packed) == 2 * log_prob_row_bytes(2)
    assert unpack_log_probs(packed, 2) == ((-0.25, -0.75), tops)


def test_without_log_probs_nothing_is_packed() -> None:
    trimmed = a_trimmer().trim([*b"ab"], [TARGET] * 2)
    assert pack_log_probs(trimmed, 0) == b""
    assert unpack_log_probs(b"", 0) == ((), ())


def test_a_missing_row_reads_as_unknown() -> None:
    row = pack_log_probs(a_trimmer().trim([97], [TARGET], [math.nan]), 1)
    log_probs, tops = unpack_log_probs(row, 1)
    assert math.isnan(log_probs[0])
    assert tops == (TopLogProbs((), ()),)
