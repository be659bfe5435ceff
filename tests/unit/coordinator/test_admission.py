from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common import wire
from services.common.errors import InvalidArgument, NotFound, OutriderError
from services.common.values import VerificationMethod
from services.coordinator import admission
from services.coordinator.admission import Limits, admit, check_session_id
from services.coordinator.chat_template import Message
from services.coordinator.request import ChatInput, Fork, GenerationRequest, TokenInput

LIMITS = Limits(models=("m",), vocab_size=100, default_num_draft_tokens=4, max_draft_tokens=16, max_prompt_bytes=1000)

UINT32 = st.integers(0, 2**32 - 1)
FLOAT = st.floats(width=32)
SAMPLING = st.builds(
    sampling_pb2.SamplingParams,
    temperature=FLOAT,
    top_k=UINT32,
    top_p=FLOAT,
    min_p=FLOAT,
    repetition_penalty=FLOAT,
    presence_penalty=FLOAT,
    frequency_penalty=FLOAT,
    logit_bias=st.dictionaries(UINT32, FLOAT, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=UINT32,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
REQUEST = st.builds(
    pb.GenerateRequest,
    session_id=st.sampled_from(["", str(uuid.UUID(int=7)), "nonsense"]),
    request_id=st.sampled_from(["", str(uuid.UUID(int=8)), "\x00"]),
    model=st.sampled_from(["", "m", "other"]),
    sampling=SAMPLING,
    max_tokens=UINT32,
    stop=st.lists(TEXT, max_size=18),
    stop_token_ids=st.lists(UINT32, max_size=3),
    verification=st.integers(0, 5),
    num_draft_tokens=UINT32,
    log_probs=st.booleans(),
    num_top_log_probs=UINT32,
    fork=st.booleans(),
    fork_len=st.none() | UINT32,
    cache_salt=st.text(st.characters(exclude_categories=["Cs"]), max_size=140),
    resume=st.builds(pb.ResumePoint, num_received_tokens=UINT32, tokens_beyond_durable=st.lists(UINT32, max_size=3)),
)


def with_input(request: pb.GenerateRequest, kind: int, text: str) -> pb.GenerateRequest:
    match kind:
        case 1:
            request.prompt = text
        case 2:
            request.chat.messages.add(role="user", content=text)
        case 3:
            request.tokens.token_ids.extend(text.encode())
    return request


def admitted_or_refused(request: pb.GenerateRequest) -> GenerationRequest | OutriderError:
    """Other exceptions are defects."""
    try:
        return admit(request, LIMITS)
    except (InvalidArgument, NotFound) as error:
        return error


@given(REQUEST, st.integers(0, 3), TEXT)
@settings(deadline=None, max_examples=300)
def test_any_request_is_admitted_within_all_limits_or_refused_with_a_field(
    request: pb.GenerateRequest, kind: int, text: str
) -> None:
    admitted = admitted_or_refused(with_input(request, kind, text))
    if isinstance(admitted, OutriderError):
        assert admitted.field
        assert admitted.field in admitted.message or admitted.reason == "UNKNOWN_MODEL"
        return
    sampling = admitted.sampling
    assert sampling.temperature == 0 or 1e-5 <= sampling.temperature <= 100
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert 0 < sampling.repetition_penalty <= 10
    assert all(math.isfinite(bias) and token_id < 100 for token_id, bias in sampling.logit_bias)
    assert admitted.max_tokens >= 1
    assert admitted.wanted_num_draft_tokens <= 16
    assert uuid.UUID(admitted.session_id)
    assert uuid.UUID(admitted.request_id)


def a_prompt(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="a", **fields)  # type: ignore[arg-type]


def sampling(**fields: object) -> pb.GenerateRequest:
    return a_prompt(sampling=sampling_pb2.SamplingParams(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(prompt=""), "prompt"),
        (pb.GenerateRequest(chat=pb.ChatInput()), "chat.messages"),
        (
            pb.GenerateRequest(chat=pb.ChatInput(messages=[pb.ChatMessage(role="robot", content="a")])),
            "chat.messages[0].role",
        ),
        (pb.GenerateRequest(tokens=pb.TokenInput()), "tokens.token_ids"),
        (pb.GenerateRequest(tokens=pb.TokenInput(token_ids=[100])), "tokens.token_ids"),
        (sampling(temperature=-0.5), "sampling.temperature"),
        (sampling(temperature=float("nan")), "sampling.temperature"),
        (sampling(temperature=float("inf")), "sampling.temperature"),
        (sampling(top_p=0.0), "sampling.top_p"),
        (sampling(top_p=1.5), "sampling.top_p"),
        (sampling(min_p=-0.1), "sampling.min_p"),
        (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (sampling(presence_penalty=3.0), "sampling.presence_penalty"),
        (sampling(frequency_penalty=-3.0), "sampling.frequency_penalty"),
        (sampling(logit_bias={100: 1.0}), "sampling.logit_bias"),
        (sampling(logit_bias={1: float("nan")}), "sampling.logit_bias[1]"),
        (sampling(min_tokens=300), "sampling.min_tokens"),
        (a_prompt(num_draft_tokens=17), "num_draft_tokens"),
        (a_prompt(max_tokens=2**31), "max_tokens"),
        (a_prompt(stop=["x"] * 17), "stop"),
        (a_prompt(stop=[""]), "stop"),
        (a_prompt(stop=["x" * 257]), "stop"),
        (a_prompt(stop_token_ids=[100]), "stop_token_ids"),
        (a_prompt(cache_salt="é" * 64 + "x"), "cache_salt"),
        (a_prompt(num_top_log_probs=21, log_probs=True), "num_top_log_probs"),
        (a_prompt(num_top_log_probs=2), "num_top_log_probs"),
        (a_prompt(verification=9), "verification"),
        (a_prompt(session_id="abc"), "session_id"),
        (a_prompt(request_id="{6a3c2f60-0000-4000-8000-000000000001}"), "request_id"),
        (a_prompt(resume=pb.ResumePoint(tokens_beyond_durable=[1])), "resume.tokens_beyond_durable"),
    ],
)
def test_each_bad_value_is_refused_by_name(request_: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        admit(request_, LIMITS)
    assert (caught.value.reason, caught.value.field) == ("INVALID_PARAMETER", field)


@pytest.mark.parametrize(
    "fill",
    [
        lambda r: setattr(r, "prompt", "é" * 501),
        lambda r: r.chat.messages.add(role="user", content="x" * 1001),
        lambda r: r.tokens.token_ids.extend([1] * 251),
    ],
)
def test_a_prompt_over_the_limit_names_the_limit(fill: Callable[[pb.GenerateRequest], object]) -> None:
    request = pb.GenerateRequest()
    fill(request)
    with pytest.raises(InvalidArgument, match="1000") as caught:
        admit(request, LIMITS)
    assert caught.value.reason == "PROMPT_TOO_LONG"
    assert caught.value.metadata["limit"] == "1000"


def test_what_is_left_out_gets_its_default() -> None:
    admitted = admit(a_prompt(), LIMITS)
    assert (admitted.model, admitted.max_tokens, admitted.wanted_num_draft_tokens) == ("m", 256, 4)
    assert (admitted.verification, admitted.seed) == (VerificationMethod.COUPLED, None)
    assert (admitted.sampling.temperature, admitted.sampling.top_p) == (1.0, 1.0)
    assert admitted.session_id != admit(a_prompt(), LIMITS).session_id


def test_zero_draft_tokens_is_not_the_default() -> None:
    assert admit(a_prompt(num_draft_tokens=0), LIMITS).wanted_num_draft_tokens == 0


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert admit(sampling(temperature=1e-30), LIMITS).sampling.greedy


def test_messages_and_token_ids_arrive_as_they_are() -> None:
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="system", content="s"), pb.ChatMessage(role="user", content="")])
    assert admit(pb.GenerateRequest(chat=chat), LIMITS).input == ChatInput(
        (Message("system", "s"), Message("user", ""))
    )
    tokens = pb.TokenInput(token_ids=[3, 3])
    assert admit(pb.GenerateRequest(tokens=tokens), LIMITS).input == TokenInput((3, 3))


def test_a_cache_salt_may_fill_its_limit_and_a_longer_one_is_told_it() -> None:
    longest = "é" * 64
    assert admit(a_prompt(cache_salt=longest), LIMITS).cache_salt == longest
    with pytest.raises(InvalidArgument, match="129 bytes exceed the limit of 128"):
        admit(a_prompt(cache_salt=longest + "x"), LIMITS)


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(NotFound, match="'x'"):
        admit(a_prompt(model="x"), LIMITS)


def test_a_fork_has_an_id_of_its_own_that_follows_from_session_and_request() -> None:
    ids = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4())}
    fork = admit(pb.GenerateRequest(fork=True, fork_len=7, **ids), LIMITS)
    assert fork.fork == Fork(ids["session_id"], 7)
    assert fork.input == TokenInput(())
    again = admit(pb.GenerateRequest(fork=True, fork_len=7, **ids), LIMITS)
    assert (again.session_id, again.digest) == (fork.session_id, fork.digest)
    sibling = admit(pb.GenerateRequest(fork=True, **{**ids, "request_id": str(uuid.uuid4())}), LIMITS)
    assert len({fork.session_id, sibling.session_id, ids["session_id"]}) == 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"fork": True}, "session_id"),
        ({"fork_len": 3}, "fork_len"),
        ({"fork": True, "session_id": str(uuid.uuid4()), "fork_len": 0}, "fork_len"),
    ],
)
def test_a_fork_names_its_source_and_a_length_needs_a_fork(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        admit(a_prompt(**fields), LIMITS)
    assert caught.value.field == field


def test_the_digest_sees_parameters_and_prompt_but_not_ids_or_resumption() -> None:
    base = admit(a_prompt(), LIMITS).digest
    resumed = a_prompt(resume=pb.ResumePoint(num_received_tokens=4), session_id=str(uuid.uuid4()))
    assert admit(resumed, LIMITS).digest == base
    assert admit(a_prompt(cache_salt="s"), LIMITS).digest == base
    assert admit(a_prompt(max_tokens=5), LIMITS).digest != base
    assert admit(pb.GenerateRequest(prompt="b"), LIMITS).digest != base
    assert admit(sampling(seed=0), LIMITS).digest != base


def test_the_digest_sees_what_was_asked_and_not_how_the_coordinator_is_configured() -> None:
    """So that a generation may be resumed at another coordinator."""
    adaptive = replace(LIMITS, default_num_draft_tokens=None)
    elsewhere = replace(LIMITS, default_num_draft_tokens=2, max_draft_tokens=8, max_prompt_bytes=500)
    requests = [admit(a_prompt(), limits) for limits in (LIMITS, adaptive, elsewhere)]
    assert [request.wanted_num_draft_tokens for request in requests] == [4, None, 2]
    assert len({request.digest for request in requests}) == 1
    assert len({request.parameters() for request in requests}) == 1
    asked = {admit(a_prompt(num_draft_tokens=4), limits).digest for limits in (LIMITS, adaptive, elsewhere)}
    assert len(asked) == 1
    assert asked != {requests[0].digest}


def test_the_parameters_are_written_without_going_through_the_prompt() -> None:
    class Untouchable(tuple[int, ...]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("a prompt may be long, and this is done on the event loop")

    request = replace(admit(a_prompt(), LIMITS), input=TokenInput(Untouchable((1, 2))))
    assert json.loads(request.parameters())["max_tokens"] == request.max_tokens


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(prompt="a", stop_token_ids=[1] * 65), "stop_token_ids"),
        (pb.GenerateRequest(prompt="a", stop=["x"] * 17), "stop"),
        (
            pb.GenerateRequest(prompt="a", resume=pb.ResumePoint(num_received_tokens=1, tokens_beyond_durable=[1, 2])),
            "resume.tokens_beyond_durable",
        ),
        (sampling(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias"),
        (pb.GenerateRequest(chat=pb.ChatInput(messages=[pb.ChatMessage()] * 1025)), "chat.messages"),
        (pb.GenerateRequest(tokens=pb.TokenInput(token_ids=[1] * 251)), "tokens.token_ids"),
    ],
)
def test_too_many_entries_are_refused_before_they_are_looked_at(
    message: pb.GenerateRequest, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr(admission, "_token_ids", lambda field, *_: looked_at.append(field) or ())
    if message.sampling.logit_bias:
        monkeypatch.setattr(wire, "sampling_from_proto", lambda _: looked_at.append("sampling"))
    with pytest.raises(InvalidArgument) as caught:
        admit(message, LIMITS)
    assert caught.value.field == field
    assert field not in looked_at
    assert "sampling" not in looked_at


def test_a_session_id_must_be_given_where_one_is_meant() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_session_id("")
    assert caught.value.field == "session_id"
