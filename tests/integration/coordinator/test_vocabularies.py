"""Draft models with a vocabulary of their own through the whole system: coordinator, workers, real tiny models."""

from __future__ import annotations

import string
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common.errors import ConfigError, FailedPrecondition
from services.draft.config import DraftConfig
from services.draft.server import build
from services.engine.vocabulary_pair import match_vocabularies
from services.target.config import TargetConfig
from tests.integration.coordinator.conftest import UNHURRIED_MS, Cluster, StartCluster
from tests.tiny_models import build_model
from tests.vocabularies import byte_level, characters, save_with, twin, vocabulary

COUPLED = sampling_pb2.SamplingParams(temperature=0.8, seed=7)
GREEDY = sampling_pb2.SamplingParams(temperature=0.0)
REJECTION = sampling_pb2.VERIFICATION_METHOD_REJECTION
LETTERS = ["<eos>", "?", *string.ascii_lowercase, " "]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target whose tokens are letters, and the same model with these in another order beside one other."""
    directory = tmp_path_factory.mktemp("letters")
    mine, theirs = characters([*reversed(LETTERS), "!"]), characters(LETTERS)
    target = build_model("llama", vocab_size=len(LETTERS), seed=1, peakedness=2.0)
    draft = twin(target, match_vocabularies(vocabulary(mine), vocabulary(theirs)), len(LETTERS) + 1)
    return save_with(directory / "target", target, theirs, "<eos>"), save_with(
        directory / "draft", draft, mine, "<eos>"
    )


@pytest.fixture(scope="module")
def textbook(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An OPT and a GPT-2, each with its own byte-level BPE."""
    directory = tmp_path_factory.mktemp("textbook")
    opt, gpt2 = build_model("opt", vocab_size=300, seed=1), build_model("gpt2", vocab_size=330, seed=2)
    target = save_with(directory / "opt", opt, byte_level("sea", 300, ["</s>"]), "</s>")
    return target, save_with(directory / "gpt2", gpt2, byte_level("code", 330), "<eos>")


def running(
    start: StartCluster, pair: tuple[Path, Path], target_tokenizer: str | None = None
) -> AbstractAsyncContextManager[Cluster]:
    target, draft = map(str, pair)
    return start(
        TargetConfig(port=0, model=target, num_blocks=128, threads=1),
        DraftConfig(
            port=0,
            drafter="model",
            model=draft,
            target_tokenizer=target if target_tokenizer is None else target_tokenizer,
            num_blocks=128,
            threads=1,
        ),
        tokenizer=target,
        min_propose_ms=UNHURRIED_MS,
    )


@pytest.mark.parametrize("name", ["letters", "textbook"])
async def test_tokens_do_not_depend_on_the_drafts_vocabulary(
    start_cluster: StartCluster, name: str, request: pytest.FixtureRequest
) -> None:
    async with running(start_cluster, request.getfixturevalue(name)) as cluster:
        for sampling in (GREEDY, COUPLED):
            fields = {"prompt": "the sailors sing", "max_tokens": 24, "sampling": sampling, "ignore_eos": True}
            plain = await cluster.generate(num_draft_tokens=0, **fields)
            speculative = await cluster.generate(num_draft_tokens=4, **fields)
            assert speculative.tokens == plain.tokens
            statistics = speculative.finished.statistics
            assert statistics.num_draft_tokens > 0
            if name == "letters":
                assert statistics.num_accepted_tokens > 0.5 * statistics.num_draft_tokens


async def test_rejection_takes_rows_of_a_foreign_draft(start_cluster: StartCluster, letters: tuple[Path, Path]) -> None:
    async with running(start_cluster, letters) as cluster:
        result: pb.GenerationFinished = (
            await cluster.generate(
                prompt="the sea",
                max_tokens=24,
                sampling=COUPLED,
                verification=REJECTION,
                num_draft_tokens=4,
                ignore_eos=True,
            )
        ).finished
    assert result.statistics.num_accepted_tokens > 0.5 * result.statistics.num_draft_tokens > 0


async def test_without_the_targets_tokenizer_the_pair_is_refused(
    start_cluster: StartCluster, textbook: tuple[Path, Path]
) -> None:
    async with running(start_cluster, textbook, target_tokenizer="") as cluster:
        with pytest.raises(FailedPrecondition, match="--target-tokenizer") as caught:
            await cluster.generate(prompt="the sea", max_tokens=4)
    assert caught.value.reason == "VOCAB_MISMATCH"


def test_a_draft_starts_only_with_enough_overlap(textbook: tuple[Path, Path], capsys) -> None:
    target, draft = map(str, textbook)
    config = {"drafter": "model", "model": draft, "target_tokenizer": target, "num_blocks": 8, "threads": 1}
    with pytest.raises(ConfigError, match=r"min_vocab_overlap: 0\.95 is not reached: \d+ of the draft's 310 tokens"):
        build(DraftConfig(**config, min_vocab_overlap=0.95))
    worker = build(DraftConfig(**config))
    try:
        assert worker.info.model.vocab_size == 300
        assert "of the draft's 310 tokens" in capsys.readouterr().err
    finally:
        worker.close()
