"""Detokenizer and stop search: the text is a function of the tokens alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.detokenizer import ByteTextStream, TextStream, WindowTextStream
from services.coordinator.stop_search import StopSearch

BYTES = {byte: bytes([byte]) for byte in range(256)}
PIECES = ["▁", "▁a", "b", "ab", "▁the", "é", "…"]


def sentencepiece_like(token_ids: list[int]) -> str:
    """Pieces, then single bytes from 100 on, a row of which is all U+FFFD where it is not UTF-8.

    The first space is stripped, as SentencePiece decoders do.
    """
    parts = []
    for is_byte, group in itertools.groupby(token_ids, lambda token_id: token_id >= 100):
        if is_byte:
            data = bytes(token_id - 100 for token_id in group)
            try:
                parts.append(data.decode())
            except UnicodeDecodeError:
                parts.append("\ufffd" * len(data))
        else:
            parts += [PIECES[token_id] for token_id in group]
    return "".join(parts).replace("▁", " ").removeprefix(" ")


def as_bytes(text: str) -> list[int]:
    return [100 + byte for byte in text.encode()]


def read(stream: TextStream, token_ids: list[int]) -> str:
    return "".join(stream.push(token_id) for token_id in token_ids) + stream.flush()


@given(st.binary(max_size=40))
@settings(deadline=None, max_examples=200)
def test_byte_tokens_read_as_utf8_with_replacements(data: bytes) -> None:
    assert read(ByteTextStream(BYTES), list(data)) == data.decode("utf-8", errors="replace")


def test_an_incomplete_character_is_held_back_until_it_is_complete() -> None:
    stream = ByteTextStream(BYTES)
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    stream = ByteTextStream(BYTES)
    assert (stream.push(0xC3), stream.flush()) == ("", "\ufffd")


def test_hidden_tokens_add_nothing() -> None:
    assert read(ByteTextStream(BYTES), [0xC3, 999, 0xA9]) == "é"


TOKENS_OF_CHARACTERS = st.lists(
    st.one_of(st.integers(0, len(PIECES) - 1).map(lambda piece: [piece]), st.sampled_from("é你好😀").map(as_bytes)),
    max_size=20,
)


@given(TOKENS_OF_CHARACTERS, TOKENS_OF_CHARACTERS)
@settings(deadline=None, max_examples=200)
def test_a_window_reads_like_the_whole(prompt: list[list[int]], characters: list[list[int]]) -> None:
    context, token_ids = list(itertools.chain(*prompt)), list(itertools.chain(*characters))
    text = read(WindowTextStream(sentencepiece_like, frozenset(), context), token_ids)
    assert sentencepiece_like(context) + text == sentencepiece_like(context + token_ids)


def test_the_leading_space_behind_a_prompt_survives() -> None:
    stream = WindowTextStream(sentencepiece_like, frozenset(), [2, 3])
    assert stream.push(4) == " the"


def test_a_token_without_text_takes_no_space_from_the_next_one() -> None:
    assert (
        read(WindowTextStream(lambda ids: sentencepiece_like([i for i in ids if i != 99]), frozenset(), ()), [2, 99, 4])
        == "b the"
    )


def test_a_window_holds_back_bytes_of_an_incomplete_character() -> None:
    stream = WindowTextStream(sentencepiece_like, frozenset(), [2])
    assert [stream.push(100 + byte) for byte in "é".encode()] == ["", "é"]


def test_a_window_does_not_hold_back_invalid_bytes_forever() -> None:
    stream = WindowTextStream(sentencepiece_like, frozenset(), [2])
    pushed = [stream.push(100 + 0xFF) for _ in range(8)]
    assert any(pushed)
    assert "".join(pushed) + stream.flush() == "\ufffd" * 8


def brute_force(text: str, stops: list[str]) -> str:
    """Cut where the first-ending occurrence begins; of those ending together, the longest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@st.composite
def chunked(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(st.text("ab", max_size=30))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    bounds = [0, *cuts, len(text)]
    return text, [text[a:b] for a, b in itertools.pairwise(bounds)]


@given(chunked(), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(deadline=None, max_examples=300)
def test_stops_are_found_as_by_brute_force_however_the_text_is_cut(
    case: tuple[str, list[str]], stops: list[str]
) -> None:
    text, chunks = case
    search, out, stopped = StopSearch(stops), "", False
    for chunk in chunks:
        found = search.push(chunk)
        out += found.text
        if found.stopped:
            stopped = True
            break
    if not stopped:
        out += search.flush()
    assert out == brute_force(text, stops)
    assert stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize(("stop", "pushed"), [("abc", ["a", "b"]), ("aab", ["a", "a", "a"])])
def test_a_possible_stop_is_held_back(stop: str, pushed: list[str]) -> None:
    search = StopSearch([stop])
    out = "".join(search.push(text).text for text in pushed)
    assert len(out) == max(0, len(pushed) - len(stop) + 1)
    assert out + search.flush() == "".join(pushed)
