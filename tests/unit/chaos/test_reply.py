"""What a client received is held against what its tokens stand for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.client import Chunk, GenerateOptions, OutriderClient, Result, SessionRecord, Statistics, Token
from services.common.values import FinishReason, TokenOrigin, VerificationMethod
from services.coordinator.tokenizer import SimulatedTokenizer
from tests.chaos.load import Load
from tests.chaos.replies import Request
from tests.chaos.reply import Reply
from tests.chaos.text import text_of_tokens
from tests.chaos.watch import Watch

PROMPT = (32, 33)
TEXT = "the sea, and ships"
REJECTION = Request(PROMPT, GenerateOptions(max_tokens=len(TEXT), verification=VerificationMethod.REJECTION))


def tokens_of(text: str) -> tuple[Token, ...]:
    return tuple(Token(ord(letter), TokenOrigin.TARGET, letter) for letter in text)


def chunk(text: str, offset: int, *, shown: str | None = None) -> Chunk:
    """`shown`: the text that comes with the tokens of `text`, if it is another."""
    return Chunk(text if shown is None else shown, tokens_of(text), offset, offset + len(text))


class Client:
    """That knows what is stored."""

    def __init__(self, stored: str) -> None:
        self._stored = stored

    async def get_session(self, session_id: str) -> SessionRecord:
        ids = (*PROMPT, *self._stored.encode())
        return SessionRecord(session_id, "r", "m", ids, len(PROMPT), False, FinishReason.LENGTH, 1, 3600)

    async def close_session(self, session_id: str) -> None:
        pass


def judged(calls: Sequence[Sequence[Chunk]], *, text: str = TEXT, stored: str = TEXT) -> tuple[int, int, int]:
    """Lost, doubled and wrong, where the last of `calls` came to its end with the result `text`."""
    reply = Reply(REJECTION)
    for chunks in calls:
        reply.call_began()
        for received in chunks:
            reply.take(received)
    result = Result(
        text, tokens_of(TEXT), PROMPT, FinishReason.LENGTH, Statistics(), reply.session_id, "r", "m", 1, False
    )
    load = Load((), [REJECTION], cast(Watch, None), 1.0, text_of_tokens("simulated"))
    load._judge(reply, result, None)
    asyncio.run(load._judge_record(reply, result, cast(OutriderClient, Client(stored))))
    return load.tally.num_lost, load.tally.num_doubled, load.tally.num_wrong


def test_a_reply_that_was_resumed_and_called_again_is_right() -> None:
    whole = [chunk(TEXT[:7], 0), chunk(TEXT[7:], 7)]
    assert judged([whole]) == (0, 0, 0)
    assert judged([[chunk(TEXT[:3], 0)], [], [chunk(TEXT[:9], 0)], whole]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("shown", "text", "num_wrong"),
    [
        ("and ships", TEXT, 1),  # in the chunks alone
        (None, TEXT[:9] + "and " + TEXT[9:], 1),  # in the result alone
        ("and and ships", TEXT[:9] + "and " + TEXT[9:], 2),
        ("", TEXT[:9], 2),
    ],
)
def test_text_that_is_doubled_or_lost_around_a_resumption_is_wrong_though_the_tokens_are_right(
    shown: str | None, text: str, num_wrong: int
) -> None:
    resumed = [chunk(TEXT[:9], 0), chunk(TEXT[9:], 9, shown=TEXT[5:] if shown == "and ships" else shown)]
    assert judged([resumed], text=text) == (0, 0, num_wrong)


def test_text_of_a_call_that_broke_off_counts_as_well() -> None:
    assert judged([[chunk(TEXT[:4], 0, shown="the the ")], [chunk(TEXT, 0)]]) == (0, 0, 1)


@given(st.lists(st.integers(0, 256), max_size=60))
def test_the_coordinator_finds_the_same_text_token_by_token(token_ids: list[int]) -> None:
    stream = SimulatedTokenizer().text_stream(include_special_tokens=False, context=())
    text = "".join(stream.push(token_id) for token_id in token_ids) + stream.flush()
    assert text == text_of_tokens("simulated")(token_ids)
