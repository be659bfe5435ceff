"""The whole of training on a tiny target: self-play, teaching, resuming, serving."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.common.errors import ConfigError, ModelUnsupported
from services.engine.models import load_model
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.training.shards import read_info
from tests.tiny_models import save_model
from tests.unit.engine.training.builders import QUIET, StopAfter, settings, train

RANDOM_ACCEPTANCE = 1 / 200
"""Of a guess among the 200 tokens of the output vocabulary."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), vocab_size=300, num_layers=2, peakedness=5.0)


@pytest.fixture(scope="module")
def trained(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("draft")
    assert train(settings(target, out))
    return out


def test_a_trained_draft_foresees_more_than_chance(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    assert report["held_out"]["num_tokens"] > 50
    assert report["held_out"]["greedy_acceptance"] > 20 * RANDOM_ACCEPTANCE
    assert report["curve"][-1]["loss"] < report["curve"][0]["loss"]
    assert report["trained_tokens"] >= 60_000
    assert str(trained.parent) not in json.dumps(report)


def test_a_trained_draft_ships_neither_embedding_nor_head(trained: Path) -> None:
    weights = load_file(trained / "model.safetensors")
    assert not [name for name in weights if "embed" in name or "lm_head" in name]
    assert weights["head_ids"].shape == (200,)
    assert weights["input_projection"].shape == (32, 32)


def test_the_engine_serves_it_in_the_ids_of_the_target(trained: Path, target: Path, tmp_path: Path) -> None:
    draft = load_engine(EngineOptions(str(trained), tmp_path, num_blocks=8), QUIET)
    served = load_engine(EngineOptions(str(target), tmp_path, num_blocks=8), QUIET)
    assert draft.info.vocab_digest == served.info.vocab_digest
    assert draft.info.vocab_size == served.info.vocab_size
    assert draft.info.digest != served.info.digest
    model = draft.runner.model.module
    head_ids = load_file(trained / "model.safetensors")["head_ids"].long()
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    logits = model.get_output_embeddings()(hidden)
    assert logits.shape == (3, 300)
    kept = torch.zeros(300, dtype=torch.bool).index_fill(0, head_ids, True)
    assert (logits[:, ~kept].amax(dim=1) < logits[:, kept].amin(dim=1) - 24).all()


def test_another_target_is_refused(trained: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", vocab_size=300, seed=1)
    options = EngineOptions(str(trained), tmp_path, num_blocks=8, draft_target=str(other))
    with pytest.raises(ModelUnsupported, match="other embeddings"):
        load_engine(options, QUIET)
    smaller = save_model(tmp_path / "smaller", vocab_size=299)
    with pytest.raises(ModelUnsupported, match="another vocabulary"):
        load_engine(replace(options, draft_target=str(smaller)), QUIET)


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    target: Path, trained: Path, tmp_path: Path
) -> None:
    config = settings(target, tmp_path, self_play=str(trained / "self-play"), stage="train")
    for num_asked in (7, 1, 40):
        assert not train(config, StopAfter(num_asked))
    assert train(config)
    whole = load_file(trained / "checkpoint.safetensors")
    resumed = load_file(tmp_path / "checkpoint.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_interrupted_self_play_keeps_what_was_written(target: Path, tmp_path: Path) -> None:
    config = settings(target, tmp_path, stage="self-play")
    assert not train(config, StopAfter(30))
    (first,) = (tmp_path / "self-play").glob("*.safetensors")
    before = read_info(first)
    assert before.num_rows >= 20 * 16
    assert train(config)
    infos = [read_info(path) for path in sorted((tmp_path / "self-play").glob("*.safetensors"))]
    assert infos[0] == before
    assert sum(info.num_tokens for info in infos) >= config.self_play_tokens
    assert [info.next_number for info in infos] == sorted({info.next_number for info in infos})


def test_self_play_depends_on_the_seed_alone(target: Path, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> torch.Tensor:
        train(settings(target, tmp_path / name, stage="self-play", seed=seed, self_play_tokens=1500))
        paths = sorted((tmp_path / name / "self-play").glob("*.safetensors"))
        return torch.cat([load_file(path)["tokens"] for path in paths])

    one = written("one", 3)
    assert torch.equal(one, written("two", 3))
    assert not torch.equal(one[:200], written("three", 4)[:200])


def test_a_resumed_run_refuses_another_student(target: Path, trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers: .* was begun with '0', not '1'"):
        train(settings(target, trained, layers="1", stage="train"))


def test_self_play_of_another_target_is_refused(trained: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", vocab_size=300, seed=1)
    with pytest.raises(ConfigError, match="written by another target"):
        train(settings(other, tmp_path / "out", self_play=str(trained / "self-play")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "2"}, "layers: 2 is not among the 2 of the target"),
        ({"layers": "1,0"}, "layers: '1,0' are not distinct"),
        ({"width": 20}, "width: 20 is no multiple of a head's 8"),
        ({"head_tokens": 3}, "head_tokens: 3 is not between 16"),
        ({"layers": "first"}, "layers: 'first' is no list"),
    ],
)
def test_bad_settings_name_themselves(
    changes: dict[str, object], message: str, target: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(settings(target, tmp_path, self_play=str(trained / "self-play"), stage="train", **changes))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "qwen3", "mistral", "gpt_neox", "phi3"])
def test_other_families_are_distilled_and_served(family: str, tmp_path: Path) -> None:
    target = save_model(tmp_path / "target", family, vocab_size=300)
    config = settings(target, tmp_path / "draft", self_play_tokens=3_000, train_tokens=2_000, loss="tv")
    assert train(config)
    assert load_engine(EngineOptions(str(tmp_path / "draft"), tmp_path, num_blocks=8), QUIET).info.vocab_size == 300


def test_an_early_exit_ships_what_follows_the_targets_layers(target: Path, trained: Path, tmp_path: Path) -> None:
    changes = {"kind": "early_exit", "self_play": str(trained / "self-play"), "stage": "train"}
    config = settings(target, tmp_path, **changes)
    assert not train(config, StopAfter(60))
    assert train(config)
    weights = load_file(tmp_path / "model.safetensors")
    assert sorted(weights) == ["head_ids", "model.norm.weight", "output_projection"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["held_out"]["greedy_acceptance"] > 20 * RANDOM_ACCEPTANCE
    module = load_model(tmp_path, torch.float32, torch.device("cpu"), QUIET, target=target).module
    first = load_file(target / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(module.model.layers[0].mlp.up_proj.weight, first)


def test_a_narrower_student_is_served_at_its_width(target: Path, trained: Path, tmp_path: Path) -> None:
    config = settings(
        target,
        tmp_path,
        self_play=str(trained / "self-play"),
        stage="train",
        width=16,
        layers="0,1",
        train_tokens=2_000,
    )
    assert train(config)
    engine = load_engine(EngineOptions(str(tmp_path), tmp_path, num_blocks=8), QUIET)
    assert engine.runner.model.module.config.hidden_size == 16
    assert engine.info.vocab_size == 300
