"""Prompt files: the repository's own, and foreign ones that may be wrong."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from services.cli.failure import CommandFailed
from services.cli.prompts import Conversation, load_prompts, spread


def test_own_file_has_two_prompts_of_each_category():
    counts = Counter(conversation.category for conversation in load_prompts())
    assert len(counts) == 13
    assert set(counts.values()) == {2}


def test_own_file_gives_passages_of_200_to_400_words_to_summarise_and_search():
    passages = [c.turns[0] for c in load_prompts() if c.category in ("summarization", "rag")]
    assert all(200 <= len(passage.split()) <= 420 for passage in passages)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        json.dumps({"question_id": 1, "category": "qa"}),
        json.dumps({"question_id": 1, "category": "qa", "turns": []}),
        json.dumps({"question_id": 1, "category": "qa", "turns": "text"}),
        json.dumps({"question_id": "x", "category": "qa", "turns": ["a"]}),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    good = json.dumps({"question_id": 1, "category": "qa", "turns": ["a"]})
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(CommandFailed, match=r"prompts\.jsonl:2"):
        load_prompts(path)


def test_a_missing_and_an_empty_file_are_failures(tmp_path):
    with pytest.raises(CommandFailed, match="cannot read"):
        load_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CommandFailed, match="no prompts"):
        load_prompts(tmp_path / "empty.jsonl")


def test_a_limited_selection_covers_the_categories_first():
    conversations = [Conversation(i, category, ("a",)) for i, category in enumerate("aaabbc")]
    assert [c.category for c in spread(conversations, 3)] == ["a", "b", "c"]
    assert sorted(c.question_id for c in spread(conversations, None)) == list(range(6))
