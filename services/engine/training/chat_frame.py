"""What stands around the turns of a conversation, as tokens, found by rendering a model's own chat template.

Owns: the pieces between turns and what ends a turn. Must not know: what the turns say, how they are generated.

    opening   before the first words of the user          reply   between the user's words and the assistant's
    next      between the assistant's words and the user's

A model without a chat template has no frame: it continues texts, which begin with its start-of-text token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from services.common.errors import ModelUnsupported

_MARKS = ("\u2042one\u2042", "\u2042two\u2042", "\u2042three\u2042")
"""Contents that no template contains."""


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """The pieces. `stop_ids` end a turn: end-of-sequence ids, and special tokens that `reply` and `next` begin with."""

    opening: tuple[int, ...]
    reply: tuple[int, ...]
    next: tuple[int, ...]
    stop_ids: frozenset[int]

    @property
    def has_turns(self) -> bool:
        return bool(self.reply)

    def rest(self, piece: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What is still missing of `piece` behind the token `last`: its own first token, if a turn ended with it."""
        if last in self.stop_ids and piece and last == piece[0]:
            return piece[1:]
        return piece


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer as transformers loads it, without code of its own."""
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def chat_frame(tokenizer: Any, eos_token_ids: frozenset[int]) -> ChatFrame:
    """Raises ModelUnsupported for a template that does not hold two turns and a next one, or that alters contents."""
    if not getattr(tokenizer, "chat_template", None):
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return ChatFrame((start,) if start is not None else (0,), (), (), eos_token_ids)
    opening, reply, following = _pieces(tokenizer)
    special = set(tokenizer.all_special_ids)
    firsts = {piece[0] for piece in (reply, following) if piece and piece[0] in special}
    return ChatFrame(opening, reply, following, eos_token_ids | firsts)


def _pieces(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    one, two, three = _MARKS
    messages = [
        {"role": "user", "content": one},
        {"role": "assistant", "content": two},
        {"role": "user", "content": three},
    ]
    try:
        replying = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        opening, reply = replying.split(one)
        following = whole.split(two)[1].split(three)[0]
    except (ValueError, IndexError) as error:
        raise ModelUnsupported(f"its chat template does not take the turns of a conversation: {error}") from error
    pieces = (opening, reply, following)
    return tuple(tuple(tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces)
