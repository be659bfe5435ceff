"""Matching of vocabularies and the translation of logits, against brute force over all pairs of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ConfigError
from services.engine.sampler import Sampler
from services.engine.translated_sampler import TranslatingSampler
from services.engine.vocabulary_pair import match_vocabularies
from tests import vocabularies
from tests.vocabularies import vocabulary

LETTERS = ["a", "b", "c", "d", "ab", "cd", "é", "<0x61>", "<0x62>", "<0xC3>", "▁a"]
SUBSETS = st.lists(st.sampled_from(LETTERS), min_size=1, unique=True)


def bytes_of(token: str) -> bytes:
    return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.encode()


@settings(deadline=None)
@given(SUBSETS, SUBSETS, st.randoms(use_true_random=False))
def test_matching_and_translation_are_those_of_all_pairs(draft_tokens, target_tokens, random) -> None:
    draft_tokens, target_tokens = ["?", *draft_tokens], ["!", *target_tokens]
    shared = {  # draft id to target id, the lowest of equal bytes
        d: min(t for t, theirs in enumerate(target_tokens) if bytes_of(mine) == bytes_of(theirs))
        for d, mine in enumerate(draft_tokens)
        if bytes_of(mine) in map(bytes_of, target_tokens)
    }
    draft, target = (vocabulary(vocabularies.characters(tokens)) for tokens in (draft_tokens, target_tokens))
    if not shared:
        with pytest.raises(ConfigError, match="min_vocab_overlap"):
            match_vocabularies(draft, target)
        return
    pair = match_vocabularies(draft, target)
    assert pair.target_id_of == shared
    assert pair.draft_share == len(shared) / len(draft_tokens)
    assert pair.target_share == len(set(shared.values())) / len(target_tokens)

    logits = [random.uniform(-5, 5) for _ in draft_tokens]
    weights = [sum(math.exp(logits[d]) for d, at in shared.items() if at == t) for t in range(len(target_tokens))]
    translated = TranslatingSampler(Sampler(), pair).translate(torch.tensor([logits]))
    expected = torch.tensor([weights]) / sum(weights)
    torch.testing.assert_close(translated.softmax(dim=1), expected, atol=1e-6, rtol=1e-5)


def test_every_target_token_with_a_twin_is_written_in_the_drafts_lowest_id() -> None:
    draft, target = (vocabulary(vocabularies.characters(t)) for t in (["?", "<0x61>", "a"], ["!", "a", "<0x61>"]))
    pair = match_vocabularies(draft, target)
    assert pair.target_id_of == {1: 1, 2: 1}
    assert pair.draft_id_of == {1: 1, 2: 1}


def test_special_tokens_match_by_content_then_by_role() -> None:
    target = vocabulary(vocabularies.byte_level("sea", 300, ["</s>", "<|im_end|>", "<pad>"]), bos="</s>", eos="</s>")
    draft = vocabulary(vocabularies.byte_level("sea", 300, ["<|end|>", "<|im_end|>"]), bos="<|end|>", eos="<|end|>")
    pair = match_vocabularies(draft, target)
    assert {i: pair.target_id_of.get(i) for i in draft.special} == {0: 0, 1: 1}
    assert pair.draft_id_of[0] == 0
    assert 2 not in pair.draft_id_of


def test_text_and_special_tokens_of_one_content_do_not_match() -> None:
    target = vocabulary(vocabularies.with_markers(vocabularies.characters(["?", "a"]), "x"))
    draft = vocabulary(vocabularies.characters(["?", "a", "x"]))
    assert match_vocabularies(draft, target).target_id_of == {0: 0, 1: 1}


def test_too_small_an_overlap_is_refused_with_both_shares() -> None:
    draft = vocabulary(vocabularies.characters([chr(0x61 + i) for i in range(20)]))
    target = vocabulary(vocabularies.characters(["!", "a", "b"]))
    assert match_vocabularies(draft, target, 0.1).overlap == 0.1
    with pytest.raises(ConfigError, match=r"min_vocab_overlap: 0.11 .* 2 of the draft's 20 .*10.0%.* 3 \(66.7%\)"):
        match_vocabularies(draft, target, 0.11)
