"""What a draft worker's settings build, with tiny and simulated models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.common.errors import ConfigError, ModelUnsupported
from services.common.failure import Failure
from services.common.items import Proposed
from services.draft import server
from services.draft.config import DraftConfig
from services.draft.core import DraftCore
from tests.tiny_models import save_model
from tests.unit.item_builders import open_item, propose


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_chain_of_a_lookup_and_a_model_is_limited_as_the_model_is(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_len=128)
    config = DraftConfig(drafter="suffix,model", model=str(model), num_blocks=16, block_size=4, threads=1)
    built = server._drafter(config, Failure())
    assert built.drafter.kind == "suffix,model"
    assert built.drafter.info.vocab_size == 320
    assert built.max_sequence_len == 64
    built.close()


def test_a_staged_drafter_has_two_models_and_is_limited_by_the_shorter(tmp_path: Path) -> None:
    large, small = save_model(tmp_path / "large", max_len=128), save_model(tmp_path / "small", max_len=64, num_layers=1)
    config = DraftConfig(
        drafter="staged", staged_drafter="model", model=str(large), staged_model=str(small), num_blocks=64, threads=1
    )
    built = server._drafter(config, Failure())
    assert (built.drafter.kind, built.drafter.info.name, built.max_sequence_len) == ("staged", "large", 64)
    assert len(built.drafter.pools([])) == 2
    built.close()


def test_stages_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    config = DraftConfig(drafter="staged", staged_drafter="simulated", model=str(model), num_blocks=64, threads=1)
    with pytest.raises(ConfigError, match="vocabulary"):
        server._drafter(config, Failure())


def test_a_smaller_drafter_is_closed_where_the_model_cannot_be_loaded(tmp_path: Path, monkeypatch) -> None:
    closed: list[str] = []
    single = server._single
    monkeypatch.setattr(
        server, "_single", lambda *args, **kind: single(*args, **kind)._replace(close=lambda: closed.append("smaller"))
    )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((ConfigError, ModelUnsupported)):
        server._staged_drafter(DraftConfig(drafter="staged", model=str(tmp_path)), Failure())
    assert closed == ["smaller"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_draft_prob": 0.3}, "min_draft_prob: only for model, features and mtp"),
        ({"min_draft_prob": 0.3, "drafter": "model", "target_tokenizer": "x"}, "min_draft_prob: only for model"),
        ({"min_draft_prob": 1.5, "drafter": "model"}, r"min_draft_prob: 1\.5 is not between 0 and 1"),
    ],
)
def test_a_least_probability_is_for_a_model_of_the_targets_vocabulary(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DraftConfig(**changes)


def test_a_least_probability_shortens_proposals(tmp_path: Path) -> None:
    config = DraftConfig(drafter="model", model=str(save_model(tmp_path / "model")), num_blocks=16, threads=1)
    lengths = []
    for least in (0.0, 1.0):
        built = server._drafter(replace(config, min_draft_prob=least), Failure())
        core = DraftCore(built.drafter, max_sequences=1, max_sequence_len=64, max_draft_tokens=4)
        core.handle(1, [open_item(prefix=(1, 2, 3)), propose("a", 3, (), 4)])
        proposed = [result for _ in range(6) for _, result in core.step() if isinstance(result, Proposed)]
        lengths.append([len(result.proposal.token_ids) for result in proposed])
        built.close()
    assert lengths == [[4], [0]]
