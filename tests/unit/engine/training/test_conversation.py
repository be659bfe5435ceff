"""Chat frames and the course of conversations, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from services.engine.training.chat_frame import ChatFrame, chat_frame, load_tokenizer
from services.engine.training.conversation import Conversation, Lengths, Library, Origin, Written
from tests.tiny_models import save_model

END = 9
FRAME = ChatFrame(opening=(1, 2), reply=(END, 3), next=(END, 4), stop_ids=frozenset({END}))


def _start(number: int, library: Library | None = None, frame: ChatFrame = FRAME, max_len: int = 400) -> Conversation:
    def encode(text: str) -> list[int]:
        return [10 + ord(letter) % 50 for letter in text]

    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(97 + (i - 10) % 26) for i in ids)

    conversation = Conversation(number, 0, frame, Lengths(max_len), encode, decode, library or Library())
    conversation.begin()
    return conversation


def _say(conversation: Conversation, tokens: Sequence[int]) -> None:
    for token in tokens:
        if not conversation.ended:
            conversation.add(token)


def test_turns_are_joined_by_the_templates_pieces_without_a_second_end() -> None:
    conversation = next(c for c in map(_start, range(50)) if c.tokens == [1, 2])
    _say(conversation, [20, 21, END])
    assert conversation.tokens == [1, 2, 20, 21, END, 3]
    given = [i for i, origin in enumerate(conversation.origins) if origin is Origin.GIVEN]
    assert given == [0, 1, 5]
    assert conversation.origin in (Origin.GREEDY, Origin.COOL, Origin.WARM)


def test_an_instruction_that_does_not_end_is_cut_and_closed() -> None:
    conversation = next(c for c in map(_start, range(50)) if c.tokens == [1, 2])
    _say(conversation, range(100, 200))
    assert conversation.tokens[102:104] == [END, 3]


def test_shares_of_answers_are_as_stated() -> None:
    origins = []
    for number in range(800):
        conversation = _start(number)
        _say(conversation, [20, END])
        origins.append(conversation.origin)
    cool = sum(origin in (Origin.GREEDY, Origin.COOL) for origin in origins) / len(origins)
    assert cool == pytest.approx(0.8, abs=0.06)


def test_an_answer_that_repeats_itself_ends_the_conversation() -> None:
    conversation = _start(3)
    _say(conversation, [20, END])
    _say(conversation, [30, 31, 32] * 60)
    assert conversation.ended
    assert len(conversation.tokens) < 100


def test_earlier_output_is_worked_on() -> None:
    library = Library()
    for i in range(8):
        library.add(Written(f"q{i}", "a" * 60))
    quoting = [c for c in (_start(number, library) for number in range(100)) if len(c.tokens) > 60]
    assert 15 < len(quoting) < 50
    assert all(c.tokens[-2:] == [END, 3] for c in quoting if not c.ended)


def test_no_conversation_outgrows_its_limit() -> None:
    rng = np.random.default_rng(0)
    for number in range(100):
        conversation = _start(number, max_len=64)
        while not conversation.ended:
            conversation.add(int(rng.integers(5, 40)))
        assert len(conversation.tokens) <= 64
        assert len(conversation.tokens) == len(conversation.origins)


def test_a_frame_comes_from_the_models_own_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_model(tmp_path, vocab_size=300))
    frame = chat_frame(tokenizer, frozenset({0}))
    assert tokenizer.decode(list(frame.opening)) == "user: "
    assert tokenizer.decode(list(frame.reply)) == "\nassistant: "
    assert tokenizer.decode(list(frame.next)) == "\nuser: "
    assert frame.stop_ids == {0}


def test_a_model_without_a_template_continues_texts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_model(tmp_path, vocab_size=300))
    tokenizer.chat_template = None
    frame = chat_frame(tokenizer, frozenset({0}))
    assert not frame.has_turns
    conversation = _start(0, frame=frame)
    assert conversation.tokens == [0]
    assert conversation.origin is not Origin.INSTRUCTION
