"""A head on features in training, and that it is trained for what it meets in service."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from services.common.errors import ConfigError
from services.engine.training.corpus import Batch, Corpus, collate
from services.engine.training.feature_student import LoadedTarget, known_features
from services.engine.training.student import read_draft
from tests.feature_drafts import export, feature_student
from tests.tiny_models import save_model
from tests.unit.engine.feature_cores import drafted_by, feature_core
from tests.unit.engine.training.builders import StopAfter, settings, train
from tests.unit.item_builders import open_item, propose

NUM_TOLD, NUM_DRAFTED = 12, 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), vocab_size=300, num_layers=2, peakedness=5.0)


@pytest.fixture(scope="module")
def trained(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("draft")
    assert train(settings(target, out, kind="features", train_tokens=40_000))
    return out


def batch_of(tokens: list[int], num_unanswered: int) -> Batch:
    answered = torch.arange(len(tokens)) >= num_unanswered
    nothing = torch.zeros(0)
    return Batch(torch.tensor([tokens]), nothing, nothing, nothing, nothing, nothing, len(tokens), answered[None])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral"])
@torch.no_grad()
def test_the_passes_are_what_the_engine_drafts(family: str, tmp_path: Path) -> None:
    """In pass j, behind the commits that the draft was opened with, stands the engine's j-th drafted token."""
    directory = save_model(tmp_path / "target", family, vocab_size=300, sliding_window=8)
    student = feature_student(directory, strength=0.3)
    export(student, directory, tmp_path / "draft")
    tokens = torch.randint(1, 300, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    hidden = student.target.hidden_states(torch.tensor([tokens]))[0]
    told = hidden[len(tokens) - NUM_TOLD - 1 : -1].half().numpy().tobytes()

    core = feature_core(tmp_path / "draft")
    opening = open_item(prefix=tuple(tokens), eos_token_ids=frozenset())
    asked = replace(propose("a", len(tokens), (), NUM_DRAFTED), features=told)
    drafted = drafted_by(core, opening, asked)
    assert len(drafted) == NUM_DRAFTED

    passes = student.passes(batch_of([*tokens, *drafted], len(tokens) - NUM_TOLD), NUM_DRAFTED)
    at = range(len(tokens) - 1, len(tokens) + NUM_DRAFTED - 1)
    best = [int(student.logits(each[0, p]).argmax()) for p, each in zip(at, passes, strict=True)]
    assert best == drafted
    assert [int(student.logits(passes[0][0, p]).argmax()) for p in at] != drafted, "the passes are all the same"


def test_a_trained_head_foresees_more_than_an_untrained_one(target: Path, trained: Path, tmp_path: Path) -> None:
    shards = {"self_play": str(trained / "self-play"), "kind": "features"}
    train(settings(target, tmp_path, stage="train", train_tokens=1, **shards))
    before, after = (json.loads((out / "report.json").read_text())["held_out"] for out in (tmp_path, trained))
    assert after["num_tokens"] == before["num_tokens"] > 50
    assert after["loss"] < 0.7 * before["loss"]
    assert after["warm_acceptance"] > before["warm_acceptance"] + 0.05
    assert len(after["conditional_acceptance"]) == 5


def test_the_head_ships_no_weights_of_the_target(trained: Path) -> None:
    weights = load_file(trained / "model.safetensors")
    assert weights["feature_projection"].shape == (32, 32)
    assert not [name for name in weights if "embed" in name or "lm_head" in name or "target" in name]


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    target: Path, trained: Path, tmp_path: Path
) -> None:
    shards = {"self_play": str(trained / "self-play"), "kind": "features", "stage": "train", "train_tokens": 4_000}
    whole, parts = settings(target, tmp_path / "whole", **shards), settings(target, tmp_path / "parts", **shards)
    assert train(whole)
    assert not train(parts, StopAfter(7))
    assert train(parts)
    expected, found = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_features_are_the_targets_last_hidden_states(target: Path) -> None:
    whole = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        features = LoadedTarget(target, torch.float32).hidden_states(tokens)
        torch.testing.assert_close(whole.get_output_embeddings()(features), whole(input_ids=tokens).logits)


def test_the_features_that_are_kept_are_those_computed_anew(trained: Path, target: Path) -> None:
    corpus = Corpus(sorted((trained / "self-play").glob("*.safetensors")))
    batch = collate([corpus.transcript(int(number)) for number in corpus.training[:8]])
    assert batch.features is not None
    assert batch.answered.sum() > 50
    whole = LoadedTarget(target, torch.float32)
    kept, anew = (known_features(whole, each, cut=True) for each in (batch, replace(batch, features=None)))
    torch.testing.assert_close(kept.float(), anew, rtol=1e-2, atol=2e-3)
    assert (anew != 0).any(-1).sum() > 50


def test_self_play_without_features_serves_as_well(target: Path, trained: Path, tmp_path: Path) -> None:
    shared = {"kind": "features", "self_play_tokens": 3_000, "train_tokens": 4_000, "head_tokens": 300}
    assert train(settings(target, tmp_path / "anew", keep_features=False, **shared))
    assert train(settings(target, tmp_path / "kept", **shared))
    corpora = [Corpus(sorted((tmp_path / name / "self-play").glob("*.safetensors"))) for name in ("anew", "kept")]
    features = [corpus.transcript(0).features for corpus in corpora]
    assert features[0] is None
    assert features[1] is not None
    losses = [
        json.loads((tmp_path / name / "report.json").read_text())["held_out"]["loss"] for name in ("anew", "kept")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_head_is_as_wide_as_its_target(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="width: a head on features is as wide as its target"):
        settings(target, tmp_path, kind="features", width=16)


def test_a_head_starts_as_the_draft_that_it_continues(target: Path, trained: Path, tmp_path: Path) -> None:
    shared = {"self_play": str(trained / "self-play"), "train_tokens": 8_000, "stage": "train"}
    train(settings(target, tmp_path / "model", head_tokens=150, **shared))
    start = {"kind": "features", "start": str(tmp_path / "model"), "head_tokens": 0}
    hardly = start | {"train_tokens": 1, "learning_rate": 1e-7}
    train(settings(target, tmp_path / "head", **(shared | hardly)))
    model, head = (json.loads((tmp_path / name / "report.json").read_text())["held_out"] for name in ("model", "head"))
    assert head["loss"] == pytest.approx(model["loss"], rel=0.01)
    assert load_file(tmp_path / "head" / "model.safetensors")["head_ids"].shape == (150,)
    train(settings(target, tmp_path / "wider", **(shared | hardly | {"head_tokens": 250})))
    assert load_file(tmp_path / "wider" / "model.safetensors")["head_ids"].shape == (250,)
    with pytest.raises(ConfigError, match=r"start: the draft has no .*layers\.1"):
        train(settings(target, tmp_path / "deep", layers="0,1", **(shared | start)))
    with pytest.raises(ConfigError, match=r"start: .* is no trained draft"):
        train(settings(target, tmp_path / "none", **(shared | start | {"start": str(target)})))
    with pytest.raises(ConfigError, match=r"start: .* which has other embeddings"):
        read_draft(tmp_path / "model", "another digest")
