"""The coordinator's settings that are more than a value."""

from __future__ import annotations

import pytest

from services.common.errors import ConfigError
from services.coordinator.config import CoordinatorConfig, DraftAddress


def config(**settings: str) -> CoordinatorConfig:
    return CoordinatorConfig(tokenizer="simulated", insecure=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "pools"),
    [
        ("", ()),
        ("a:1", (DraftAddress("default", "a:1", 1.0),)),
        ("a:1@0.5", (DraftAddress("default", "a:1", 0.5),)),
        ("big=a:1@3, ngram=b:2", (DraftAddress("big", "a:1", 3.0), DraftAddress("ngram", "b:2", 1.0))),
        ("a:1,b:2", (DraftAddress("a:1", "a:1", 1.0), DraftAddress("b:2", "b:2", 1.0))),
    ],
)
def test_draft_pools_have_names_addresses_and_weights(text: str, pools: tuple[DraftAddress, ...]) -> None:
    assert config(drafts=text).draft_addresses == pools


@pytest.mark.parametrize("text", ["a=x:1,a=y:1", "a=x:1@-1", "a=x:1@nan", "a=x:1@much", "a=", "@2"])
def test_draft_pools_that_make_no_sense_stop_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match="drafts"):
        config(drafts=text)


def test_the_draft_length_is_auto_or_a_number_within_the_limit() -> None:
    assert config().fixed_num_draft_tokens is None
    assert config(num_draft_tokens="4").fixed_num_draft_tokens == 4
    for text in ("17", "-1", "many", ""):
        with pytest.raises(ConfigError, match="num_draft_tokens"):
            config(num_draft_tokens=text)
