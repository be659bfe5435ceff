"""Which pairs of workers are served."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from services.common.errors import FailedPrecondition
from services.common.values import ModelInfo, WorkerInfo, WorkerLoad
from services.coordinator.placement import DraftPool, Placement


@dataclass
class Link:
    info: WorkerInfo
    up: bool = True
    load: WorkerLoad = field(default_factory=WorkerLoad)


def link(role: str, vocab: str) -> Any:
    model = ModelInfo(f"a {role}", "digest", vocab, 8, "float32", "cpu")
    return Link(WorkerInfo(role, role, model, "model" if role == "draft" else "", 16, 8, 64))


@pytest.mark.parametrize("vocab", ["same", ""])
def test_a_pair_with_one_vocabulary_is_ready(vocab):
    placement = Placement(link("target", "same"), [DraftPool("d", 1.0, link("draft", vocab))], "same")
    assert placement.served[0].ready
    assert placement.choose(4).draft is not None


def test_a_draft_of_another_vocabulary_is_refused_and_the_pair_is_not_ready():
    placement = Placement(link("target", "same"), [DraftPool("d", 1.0, link("draft", "other"))], "same")
    assert not placement.served[0].ready
    with pytest.raises(FailedPrecondition, match="a draft and the target model a target differ in vocabulary"):
        placement.choose(4)
    assert placement.choose(0).draft is None
