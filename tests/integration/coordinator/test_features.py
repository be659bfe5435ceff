"""A draft that is fed with the target's features, through the whole system: coordinator, workers, real tiny models."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from outrider.v1 import sampling_pb2

from services.common.errors import ConfigError
from services.draft.config import DraftConfig
from services.draft.server import build
from services.engine.feature_draft import FeatureDraftModel
from services.engine.sequence import Sequence
from services.target.config import TargetConfig
from tests.feature_drafts import export, feature_student
from tests.integration.coordinator.conftest import UNHURRIED_MS, Cluster, StartCluster
from tests.tiny_models import HIDDEN_SIZE, save_model

COUPLED = sampling_pb2.SamplingParams(temperature=0.8, seed=7)
GREEDY = sampling_pb2.SamplingParams(temperature=0.0)
REJECTION = sampling_pb2.VERIFICATION_METHOD_REJECTION


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("pair")
    target = save_model(directory / "target", seed=3)
    return target, export(feature_student(target, strength=0.003), target, directory / "draft")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens' features each commit told the draft."""
    found: list[int] = []
    take = FeatureDraftModel.take

    def noting(self: FeatureDraftModel, sequence: Sequence, num_kept: int, features: bytes) -> int:
        found.append(len(features) // (2 * HIDDEN_SIZE))
        return take(self, sequence, num_kept, features)

    monkeypatch.setattr(FeatureDraftModel, "take", noting)
    return found


def running(
    start: StartCluster, pair: tuple[Path, Path], drafter: str = "features"
) -> AbstractAsyncContextManager[Cluster]:
    target, draft = map(str, pair)
    return start(
        TargetConfig(port=0, model=target, num_blocks=128, threads=1),
        DraftConfig(port=0, drafter=drafter, model=draft, num_blocks=128, threads=1),
        tokenizer=target,
        min_propose_ms=UNHURRIED_MS,
    )


@pytest.mark.parametrize("drafter", ["features", "suffix,features"])
async def test_tokens_are_those_of_plain_decoding(
    start_cluster: StartCluster, pair: tuple[Path, Path], drafter: str, told: list[int]
) -> None:
    async with running(start_cluster, pair, drafter) as cluster:
        for sampling in (GREEDY, COUPLED):
            for num_draft_tokens in (1, 4):
                fields = {"prompt": "the sailors sing", "max_tokens": 24, "sampling": sampling, "ignore_eos": True}
                plain = await cluster.generate(num_draft_tokens=0, **fields)
                speculative = await cluster.generate(num_draft_tokens=num_draft_tokens, **fields)
                assert speculative.tokens == plain.tokens
                statistics = speculative.finished.statistics
                assert 0 < statistics.num_accepted_tokens <= statistics.num_draft_tokens
    assert sum(told) > 24
    assert max(told) <= 24


async def test_rejection_takes_its_rows(start_cluster: StartCluster, pair: tuple[Path, Path], told: list[int]) -> None:
    async with running(start_cluster, pair) as cluster:
        result = await cluster.generate(
            prompt="the sea", max_tokens=24, sampling=COUPLED, verification=REJECTION, ignore_eos=True
        )
    statistics = result.finished.statistics
    assert 0 < statistics.num_accepted_tokens <= statistics.num_draft_tokens
    assert sum(told) > 8


async def test_a_draft_without_use_for_features_is_told_none(
    start_cluster: StartCluster, pair: tuple[Path, Path], told: list[int]
) -> None:
    async with running(start_cluster, pair, "suffix") as cluster:
        result = await cluster.generate(prompt="the sea the sea the sea", max_tokens=16, sampling=GREEDY)
    assert result.tokens
    assert told == []


def test_a_head_on_features_is_no_draft_by_itself(pair: tuple[Path, Path]) -> None:
    target, draft = map(str, pair)
    config = {"port": 0, "num_blocks": 16, "threads": 1}
    with pytest.raises(ConfigError, match="drafter: draft was trained for the drafter features, not model"):
        build(DraftConfig(drafter="model", model=draft, **config))
    with pytest.raises(ConfigError, match="drafter: target takes no features"):
        build(DraftConfig(drafter="features", model=target, **config))
