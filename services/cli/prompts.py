"""Prompt files: JSON Lines with question_id, category and turns, the format of Spec-Bench.

Owns: reading and checking them, and the repository's own file. Must not know: what the prompts are for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.cli.failure import CommandFailed

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""26 prompts, two for each of 13 categories."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A user's turns, in order; at least one."""

    question_id: int
    category: str
    turns: tuple[str, ...]


def load_prompts(path: Path = OWN_PROMPTS) -> tuple[Conversation, ...]:
    """The file's conversations, in its order. Raises CommandFailed naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"cannot read the prompts in {path}: {error}") from None
    conversations = tuple(_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not conversations:
        raise CommandFailed(f"{path} holds no prompts")
    return conversations


def _parse(path: Path, number: int, line: str) -> Conversation:
    try:
        entry = json.loads(line)
        question_id, category, turns = int(entry["question_id"]), str(entry["category"]), entry["turns"]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path}:{number} is no object with question_id, category and turns: {error!r}"
        raise CommandFailed(message) from None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise CommandFailed(f"{path}:{number}: turns must be a list of at least one text")
    return Conversation(question_id, category, tuple(turns))


def spread(conversations: Sequence[Conversation], limit: int | None) -> tuple[Conversation, ...]:
    """At most `limit` conversations, one of each category in turn, so that a short selection covers many of them."""
    by_category: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_category.setdefault(conversation.category, []).append(conversation)
    rounds = itertools.zip_longest(*by_category.values())
    in_turn = [conversation for one_each in rounds for conversation in one_each if conversation is not None]
    return tuple(in_turn if limit is None else in_turn[:limit])
