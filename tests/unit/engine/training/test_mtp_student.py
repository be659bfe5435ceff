"""Heads on features in training, that they are trained for what they meet in service, and what they are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.common.errors import ConfigError, ModelUnsupported
from services.draft.core import DraftCore
from services.engine.digest import directory_vocab_digest
from services.engine.drafters.mtp import MtpDrafter
from services.engine.models import load_config
from services.engine.mtp_draft import MtpOptions, load_mtp
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.engine.sampler import Sampler
from services.engine.trained_draft import Manifest, read_ends
from services.engine.training.corpus import Batch
from services.engine.training.feature_student import LoadedTarget
from services.engine.training.mtp_student import MtpStudent
from services.engine.training.student import student_config
from tests.tiny_models import save_model
from tests.unit.engine.feature_cores import drafted_by
from tests.unit.engine.training.builders import StopAfter, settings, train
from tests.unit.item_builders import open_item, propose

NUM_HEADS = 3
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), vocab_size=300, num_layers=2, peakedness=5.0)


@pytest.fixture(scope="module")
def trained(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("draft")
    assert train(settings(target, out, kind="mtp", heads=NUM_HEADS, train_tokens=150_000, learning_rate=1e-2))
    return out


def mtp_core(draft: Path, target: Path) -> DraftCore:
    drafter = MtpDrafter(load_mtp(MtpOptions(str(draft), draft, str(target)), Sampler(), QUIET))
    return DraftCore(drafter, max_sequences=4, max_sequence_len=64, max_draft_tokens=8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_the_passes_are_what_the_heads_draft(family: str, tmp_path: Path) -> None:
    """In pass j, j tokens behind the last committed one, stands the j-th drafted token; there are as many as heads."""
    directory = save_model(tmp_path / "target", family, vocab_size=300)
    ends = read_ends(directory)
    head_ids = torch.arange(len(ends.embedding))
    config = student_config(load_config(directory), (0,), 0)
    student = MtpStudent(config, ends, head_ids, LoadedTarget(directory, torch.float32), NUM_HEADS)
    student.mtp_up.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(3))
    vocab_digest = directory_vocab_digest(directory)
    student.export(
        tmp_path / "draft",
        Manifest(str(directory), ends.digest, vocab_digest, len(ends.embedding), "mtp"),
        torch.float32,
    )
    tokens = torch.randint(1, 300, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    hidden = student.target.hidden_states(torch.tensor([tokens]))[0]

    opening = open_item(prefix=tuple(tokens[:-2]), eos_token_ids=frozenset())
    told = hidden[len(tokens) - 3 : -1].half().numpy().tobytes()
    asked = replace(propose("a", len(tokens), tuple(tokens[-2:]), 5), features=told)
    drafted = drafted_by(mtp_core(tmp_path / "draft", directory), opening, asked)
    assert len(drafted) == NUM_HEADS

    whole = torch.tensor([[*tokens, *drafted]])
    nothing = torch.zeros(0)
    batch = Batch(whole, nothing, nothing, nothing, nothing, nothing, whole.numel(), torch.ones_like(whole).bool())
    passes = student.passes(batch, 5)
    assert len(passes) == NUM_HEADS
    best = [int(student.logits(each[0, len(tokens) - 1 + j]).argmax()) for j, each in enumerate(passes)]
    assert best == drafted
    without = drafted_by(mtp_core(tmp_path / "draft", directory), opening, replace(asked, features=b""))
    assert without != drafted, "features count for nothing"


def test_trained_heads_foresee_more_than_untrained_ones(target: Path, trained: Path, tmp_path: Path) -> None:
    shards = {"self_play": str(trained / "self-play"), "kind": "mtp", "heads": NUM_HEADS}
    train(settings(target, tmp_path, stage="train", train_tokens=1, **shards))
    before, after = (json.loads((out / "report.json").read_text())["held_out"] for out in (tmp_path, trained))
    assert after["num_tokens"] == before["num_tokens"] > 50
    assert after["loss"] < 0.7 * before["loss"]
    assert after["warm_acceptance"] > before["warm_acceptance"] + 0.04
    assert len(after["conditional_acceptance"]) == NUM_HEADS


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    target: Path, trained: Path, tmp_path: Path
) -> None:
    shards = {"self_play": str(trained / "self-play"), "kind": "mtp", "stage": "train", "train_tokens": 4_000}
    whole, parts = settings(target, tmp_path / "whole", **shards), settings(target, tmp_path / "parts", **shards)
    assert train(whole)
    assert not train(parts, StopAfter(5))
    assert train(parts)
    expected, found = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_heads_are_refused_where_something_else_is_wanted(target: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="holds heads for the drafter mtp"):
        load_engine(EngineOptions(str(trained), trained, num_blocks=4), QUIET)
    with pytest.raises(ConfigError, match="holds no heads; outrider train-draft --kind mtp"):
        load_mtp(MtpOptions(str(target), target), Sampler(), QUIET)
    other = save_model(tmp_path / "other", vocab_size=300, seed=9)
    with pytest.raises(ModelUnsupported, match="was trained for another target than other"):
        load_mtp(MtpOptions(str(trained), trained, str(other)), Sampler(), QUIET)
    with pytest.raises(ConfigError, match="kind: heads have no layers"):
        settings(target, tmp_path, kind="mtp", layers="0,1")
