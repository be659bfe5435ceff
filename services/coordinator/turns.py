"""What a request continues: the tokens of a first or next turn, and where a resumed generation stands.

Owns: how a turn extends a record, and which tokens of a client's are adopted. Must not know: Redis, workers, streams.
Pure functions of the request, the record and the tokenizer; encoding may take long, so call them off the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from services.common.errors import DataLoss, InvalidArgument
from services.common.session_record import SessionRecord
from services.coordinator.chat_template import Message
from services.coordinator.request import ChatInput, GenerationRequest, ResumePoint, TextInput, TokenInput
from services.coordinator.stop_search import StopSearch
from services.coordinator.tokenizer import Tokenizer


class Turn(NamedTuple):
    """The prompt of a generation: all tokens before it. The first `num_kept_tokens` are the record's own."""

    token_ids: tuple[int, ...]
    num_kept_tokens: int
    messages: str
    """The conversation up to here as JSON; empty where it was not all of chat turns."""


def next_turn(request: GenerationRequest, record: SessionRecord | None, tokenizer: Tokenizer) -> Turn:
    """Extends what is recorded.

    A chat whose record holds chat turns only is rendered anew as a whole: of the recorded tokens the longest common
    prefix is kept. Anything else is appended. Raises InvalidArgument or FailedPrecondition where the template refuses.
    """
    recorded = record.token_ids if record else ()
    match request.input:
        case ChatInput(messages) if not recorded:
            return Turn(tuple(tokenizer.encode_chat(messages)), 0, _encode(messages))
        case ChatInput(messages) if record and record.messages:
            conversation = [*_decode(record.messages), Message("assistant", _reply(record, tokenizer)), *messages]
            token_ids = tuple(tokenizer.encode_chat(conversation))
            return Turn(token_ids, common_prefix_len(recorded, token_ids), _encode(conversation))
        case ChatInput(messages):
            new = tokenizer.encode_chat(messages)
        case TextInput(text):
            new = tokenizer.encode(text, continues=bool(recorded))
        case TokenInput(token_ids):
            new = list(token_ids)
    return Turn((*recorded, *new), len(recorded), "")


def check_prompt_len(request: GenerationRequest, prompt_len: int, max_sequence_len: int) -> None:
    """Raises InvalidArgument unless there is a prompt that leaves room for a token."""
    field = {ChatInput: "chat.messages", TextInput: "prompt", TokenInput: "tokens.token_ids"}[type(request.input)]
    if not prompt_len:
        raise InvalidArgument("INVALID_PARAMETER", f"{field}: has no tokens", field=field)
    if prompt_len >= max_sequence_len:
        raise InvalidArgument(
            "PROMPT_TOO_LONG",
            f"{field}: {prompt_len} tokens exceed the limit of {max_sequence_len - 1}",
            field=field,
            metadata={"limit": str(max_sequence_len - 1)},
        )


def check_same_prompt(request: GenerationRequest, prompt_len: int) -> None:
    """Raises DataLoss TOKENS_LOST where a resuming client's generation continued other tokens than there are now."""
    told = request.resume.num_prompt_tokens if request.resume else 0
    if told and told != prompt_len:
        raise DataLoss(
            "TOKENS_LOST",
            f"the generation continued {told} tokens; without the session's lost record it has {prompt_len}",
        )


def forked(request: GenerationRequest, source: SessionRecord) -> SessionRecord:
    """What a fork begins with: the source's record, or its first tokens. Raises InvalidArgument where it has fewer."""
    length = request.fork.length if request.fork else None
    if length is None:
        return source
    if length > len(source.token_ids):
        message = f"fork_len: the session has {len(source.token_ids)} tokens, not {length}"
        raise InvalidArgument("INVALID_PARAMETER", message, field="fork_len")
    return replace(source, token_ids=source.token_ids[:length], origins=source.origins[:length], messages="", reply="")


def adopted_tokens(generated: Sequence[int], resume: ResumePoint | None) -> tuple[int, ...]:
    """Tokens that the resuming client has beyond the record's generated ones, to be recorded, never generated again.

        generated      0 ................ len(generated)
        client         0 .......... [ tokens_beyond_durable ) num_received_tokens

    Raises DataLoss TOKENS_LOST where the client has received tokens that neither the record nor it can name, and
    InvalidArgument where the two contradict each other.
    """
    if resume is None:
        return ()
    start = resume.num_received_tokens - len(resume.tokens_beyond_durable)
    if resume.num_received_tokens > len(generated) and start > len(generated):
        raise DataLoss(
            "TOKENS_LOST",
            f"the record holds {len(generated)} generated tokens, the client received {resume.num_received_tokens}",
        )
    known = generated[start : resume.num_received_tokens]
    if tuple(known) != resume.tokens_beyond_durable[: len(known)]:
        raise InvalidArgument(
            "REQUEST_MISMATCH",
            "resume.tokens_beyond_durable: differ from the session's record",
            field="resume.tokens_beyond_durable",
        )
    return resume.tokens_beyond_durable[len(known) :]


def common_prefix_len(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    if tuple(one[:length]) == tuple(other[:length]):
        return length
    return next(i for i in range(length) if one[i] != other[i])


def _reply(record: SessionRecord, tokenizer: Tokenizer) -> str:
    """The assistant's last reply as text, without special tokens; of a generation that was cut off, what there is."""
    parameters = json.loads(record.parameters or "{}")
    if (record.reply or record.finish_reason) and not parameters.get("include_special_tokens"):
        return record.reply
    text = tokenizer.text_stream(include_special_tokens=False, context=record.token_ids[: record.prompt_len])
    whole = "".join(text.push(token_id) for token_id in record.token_ids[record.prompt_len :]) + text.flush()
    search = StopSearch(parameters.get("stop", ()))
    found = search.push(whole)
    return found.text if found.stopped else found.text + search.flush()


def _encode(messages: Sequence[Message]) -> str:
    return json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)


def _decode(text: str) -> list[Message]:
    return [Message(role, content) for role, content in json.loads(text)]
