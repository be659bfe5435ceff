from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import DataLoss, InvalidArgument
from services.common.session_record import SessionRecord
from services.common.values import FinishReason, SamplingParams, VerificationMethod
from services.coordinator.chat_template import Message
from services.coordinator.request import ChatInput, Fork, GenerationRequest, ResumePoint, TextInput, TokenInput
from services.coordinator.tokenizer import SimulatedTokenizer
from services.coordinator.turns import (
    adopted_tokens,
    check_prompt_len,
    check_same_prompt,
    common_prefix_len,
    forked,
    next_turn,
)

TOKENIZER = SimulatedTokenizer()
HELLO = (Message("user", "hello"),)


def a_request(what: TextInput | ChatInput | TokenInput) -> GenerationRequest:
    return GenerationRequest(
        session_id="s",
        request_id="r",
        model="m",
        input=what,
        sampling=SamplingParams(),
        seed=None,
        max_tokens=8,
        stop=(),
        stop_token_ids=(),
        verification=VerificationMethod.COUPLED,
        num_draft_tokens=4,
        draft="",
        log_probs=False,
        num_top_log_probs=0,
        ignore_eos=False,
        include_special_tokens=False,
        resume=None,
    )


def a_record(token_ids: list[int], prompt_len: int, *, messages: str = "", reply: str = "") -> SessionRecord:
    return SessionRecord(
        session_id="s",
        token_ids=tuple(token_ids),
        origins=b"",
        log_probs=b"",
        owner_id="o",
        lease_epoch=1,
        running=False,
        request_id="r0",
        request_digest="",
        owner_key="anonymous",
        model="m",
        target_digest="",
        target_numerics="",
        draft_digest="",
        seed=0,
        prompt_len=prompt_len,
        parameters="",
        messages=messages,
        reply=reply,
        finish_reason=FinishReason.EOS if reply else None,
        statistics="",
        target_handle=None,
        draft_handle=None,
        expires_in_s=1,
    )


def test_a_first_chat_is_rendered_and_its_messages_are_kept() -> None:
    turn = next_turn(a_request(ChatInput(HELLO)), None, TOKENIZER)
    assert turn.token_ids == tuple(TOKENIZER.encode_chat(HELLO))
    assert (turn.num_kept_tokens, json.loads(turn.messages)) == (0, [["user", "hello"]])


def test_a_next_chat_turn_renders_the_whole_conversation_and_keeps_the_common_prefix() -> None:
    prompt = TOKENIZER.encode_chat(HELLO)
    record = a_record([*prompt, *b"hi", 256], len(prompt), messages='[["user", "hello"]]', reply="hi")
    turn = next_turn(a_request(ChatInput((Message("user", "bye"),))), record, TOKENIZER)
    conversation = [*HELLO, Message("assistant", "hi"), Message("user", "bye")]
    assert turn.token_ids == tuple(TOKENIZER.encode_chat(conversation))
    assert turn.num_kept_tokens == len(record.token_ids)
    assert len(json.loads(turn.messages)) == 3


def test_a_rendering_that_rewrites_the_reply_keeps_less() -> None:
    prompt = TOKENIZER.encode_chat(HELLO)
    record = a_record([*prompt, *b"hi STOP"], len(prompt), messages='[["user", "hello"]]', reply="hi")
    turn = next_turn(a_request(ChatInput((Message("user", "bye"),))), record, TOKENIZER)
    assert turn.num_kept_tokens == len(prompt) + 2


def test_the_reply_of_a_generation_that_was_cut_off_is_what_there_is() -> None:
    prompt = TOKENIZER.encode_chat(HELLO)
    record = a_record([*prompt, *b"par"], len(prompt), messages='[["user", "hello"]]')
    turn = next_turn(a_request(ChatInput((Message("user", "go on"),))), record, TOKENIZER)
    assert json.loads(turn.messages)[1] == ["assistant", "par"]


@pytest.mark.parametrize(("end", "reply"), [((256,), "hi<eos>"), (tuple(b"STOP"), "hi")])
def test_special_tokens_that_the_client_saw_are_no_part_of_the_reply(end: tuple[int, ...], reply: str) -> None:
    prompt = TOKENIZER.encode_chat(HELLO)
    record = a_record([*prompt, *b"hi", *end], len(prompt), messages='[["user", "hello"]]', reply=reply)
    record = replace(record, parameters='{"include_special_tokens": true, "stop": ["STOP"]}')
    turn = next_turn(a_request(ChatInput((Message("user", "bye"),))), record, TOKENIZER)
    assert json.loads(turn.messages)[1] == ["assistant", "hi"]


@pytest.mark.parametrize("what", [TextInput("ab"), TokenInput((97, 98))])
def test_plain_turns_append_and_end_the_rendering(what: TextInput | TokenInput) -> None:
    record = a_record([1, 2, 3], 2, messages='[["user", "hello"]]')
    assert next_turn(a_request(what), record, TOKENIZER) == ((1, 2, 3, 97, 98), 3, "")


def test_a_chat_behind_plain_turns_is_appended() -> None:
    turn = next_turn(a_request(ChatInput(HELLO)), a_record([1, 2, 3], 2), TOKENIZER)
    assert turn == ((1, 2, 3, *TOKENIZER.encode_chat(HELLO)), 3, "")


def test_a_prompt_must_leave_room_for_a_token() -> None:
    request = a_request(TextInput("abcd"))
    turn = next_turn(request, None, TOKENIZER)
    check_prompt_len(request, len(turn.token_ids), 5)
    with pytest.raises(InvalidArgument, match="limit of 3") as caught:
        check_prompt_len(request, len(turn.token_ids), 4)
    assert (caught.value.reason, caught.value.field) == ("PROMPT_TOO_LONG", "prompt")


@pytest.mark.parametrize(
    ("received", "beyond", "adopted"),
    [(0, (), ()), (2, (), ()), (3, (), ()), (3, (7,), ()), (5, (7, 8, 9), (8, 9)), (5, (8, 9), (8, 9))],
)
def test_tokens_beyond_the_record_are_adopted(received: int, beyond: tuple[int, ...], adopted: tuple[int, ...]) -> None:
    assert adopted_tokens((5, 6, 7), ResumePoint(received, beyond)) == adopted


@pytest.mark.parametrize(("received", "beyond"), [(4, ()), (5, (9,))])
def test_a_gap_between_record_and_client_is_data_loss(received: int, beyond: tuple[int, ...]) -> None:
    with pytest.raises(DataLoss):
        adopted_tokens((5, 6, 7), ResumePoint(received, beyond))


def test_tokens_that_contradict_the_record_are_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        adopted_tokens((5, 6, 7), ResumePoint(4, (8, 9)))
    assert caught.value.reason == "REQUEST_MISMATCH"


@given(st.lists(st.integers(0, 1), max_size=8), st.lists(st.integers(0, 1), max_size=8))
@settings(deadline=None, max_examples=100)
def test_the_common_prefix_is_common_and_longest(one: list[int], other: list[int]) -> None:
    length = common_prefix_len(one, other)
    assert one[:length] == other[:length]
    assert one[: length + 1] != other[: length + 1] or length == len(one) == len(other)


def test_a_fork_begins_with_all_of_its_source_or_with_its_first_tokens() -> None:
    source = replace(a_record([1, 2, 3, 4], 2, messages='[["user", "x"]]', reply="y"), origins=b"\0\0\1\2")
    request = a_request(TokenInput((9,)))
    whole = forked(replace(request, fork=Fork("s", None)), source)
    assert whole == source
    part = forked(replace(request, fork=Fork("s", 3)), source)
    assert (part.token_ids, part.origins, part.messages) == ((1, 2, 3), b"\0\0\1", "")
    assert next_turn(request, part, TOKENIZER).token_ids == (1, 2, 3, 9)
    with pytest.raises(InvalidArgument, match="has 4 tokens, not 5"):
        forked(replace(request, fork=Fork("s", 5)), source)


def test_a_resumed_generation_that_continued_other_tokens_is_data_loss() -> None:
    request = a_request(TextInput("x"))
    for told in (0, 7):
        check_same_prompt(replace(request, resume=ResumePoint(1, (), told)), 7)
    check_same_prompt(request, 7)
    with pytest.raises(DataLoss):
        check_same_prompt(replace(request, resume=ResumePoint(1, (), 8)), 7)
