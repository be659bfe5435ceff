"""Which chains of drafters there are, and what is said of others."""

from __future__ import annotations

import pytest

from services.common.drafters import DRAFTERS, needs_model, parse_chain
from services.common.errors import ConfigError
from services.draft.config import DraftConfig


@pytest.mark.parametrize(
    ("text", "chain", "uses_model"),
    [
        *((name, (name,), name in ("model", "features", "mtp", "staged")) for name in DRAFTERS),
        ("suffix,model", ("suffix", "model"), True),
        ("suffix, ngram ,staged", ("suffix", "ngram", "staged"), True),
        ("ngram,suffix", ("ngram", "suffix"), False),
    ],
)
def test_chains_are_lookups_and_then_anything(text, chain, uses_model) -> None:
    assert parse_chain(text) == chain
    assert needs_model(chain) is uses_model


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "'' is not one of"),
        ("suffix,", "'' is not one of"),
        ("sufix", "'sufix' is not one of"),
        ("model,suffix", "nothing can stand behind it"),
        ("suffix,suffix", "stands twice"),
    ],
)
def test_other_chains_are_refused_with_the_reason(text, named) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_chain(text)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"drafter": "model,ngram"}, "drafter"),
        ({"drafter": "ngram", "ngram_min": 5}, "ngram_min"),
        ({"drafter": "ngram,model", "ngram_max": 2}, "chain_min_match"),
        ({"chain_min_match": 16}, "chain_min_match"),
        ({"suffix_min_match": 0}, "suffix_min_match"),
        ({"suffix_max_len_factor": 0.0}, "suffix_max_len_factor"),
        ({"suffix_min_prob": 1.5}, "suffix_min_prob"),
        ({"suffix_memory_mb": 0}, "suffix_memory_mb"),
        ({"staged_draft_tokens": 17}, "staged_draft_tokens"),
        ({"drafter": "staged", "staged_drafter": "model"}, "staged_model"),
        ({"drafter": "staged", "staged_model": "sample"}, "staged_model"),
        ({"drafter": "suffix,staged", "tensor_parallel_size": 2}, "tensor_parallel_size"),
    ],
)
def test_settings_that_do_not_fit_stop_the_start_by_name(settings, named) -> None:
    with pytest.raises(ConfigError, match=named):
        DraftConfig(**settings)
