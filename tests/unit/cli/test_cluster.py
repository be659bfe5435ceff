"""What a cluster's processes are started with."""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import Tokenizer, models

from services.cli.cluster import (
    Cluster,
    ClusterSpec,
    PreparedModel,
    child_environment,
    coordinator_flags,
    draft_flags,
    split_threads,
    target_flags,
)
from services.cli.failure import CommandFailed
from services.cli.vocabulary import differ
from services.common.config import load
from services.coordinator.config import CoordinatorConfig
from services.draft.config import DraftConfig
from services.target.config import TargetConfig

MODEL = PreparedModel("/models/a", "a")
SIMULATED = ClusterSpec(target="simulated", drafter="simulated", num_draft_tokens=3)


@pytest.mark.parametrize(
    ("cores", "drafter", "split"),
    [
        (1, "ngram", (1, 1)),
        (2, "ngram", (2, 1)),
        (1, "model", (1, 1)),
        (2, "model", (1, 1)),
        (16, "model", (12, 4)),
        (4, "suffix,model", (3, 1)),
        (4, "suffix", (4, 1)),
    ],
)
def test_threads_are_split_between_what_computes(cores, drafter, split):
    assert split_threads(cores, drafter) == split


def options(flags: list[str]) -> dict[str, str]:
    return {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        (target_flags(SIMULATED, PreparedModel("simulated", "simulated"), 1), TargetConfig),
        (target_flags(ClusterSpec(), MODEL, 2), TargetConfig),
        (draft_flags(SIMULATED, None, 1), DraftConfig),
        (draft_flags(ClusterSpec(drafter="model"), MODEL, 1), DraftConfig),
        (draft_flags(ClusterSpec(drafter="model"), MODEL, 1, "/models/a", "/models/b"), DraftConfig),
        (draft_flags(ClusterSpec(drafter="suffix,staged"), MODEL, 1), DraftConfig),
        (coordinator_flags(SIMULATED, "simulated", "unix:///s", "127.0.0.1:1", "127.0.0.1:2"), CoordinatorConfig),
    ],
)
def test_every_flag_is_a_setting_of_its_service_and_parses(flags, config):
    environ = {f"OUTRIDER_{name.upper()}": value for name, value in options(flags).items()}
    assert environ.keys() <= {f"OUTRIDER_{field.name.upper()}" for field in dataclasses.fields(config)}
    load(config, environ=environ)


def test_latencies_go_to_simulated_workers_only():
    assert "--simulated-step-ms" in target_flags(SIMULATED, MODEL, 1)
    assert "--simulated-step-ms" not in target_flags(ClusterSpec(), MODEL, 1)
    assert "--simulated-token-ms" not in draft_flags(ClusterSpec(), None, 1)


def test_children_see_no_settings_of_this_process(monkeypatch):
    monkeypatch.setenv("OUTRIDER_PORT", "1")
    monkeypatch.setenv("OUTRIDER_CACHE_DIR", "/cache")
    environment = child_environment(3)
    assert "OUTRIDER_PORT" not in environment
    assert environment["OUTRIDER_CACHE_DIR"] == "/cache"
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")


def test_a_draft_of_another_vocabulary_is_told_of_the_targets_unless_it_is_simulated(tmp_path):
    for name, vocab in (("a", {"x": 0, "y": 1}), ("b", {"x": 0, "z": 1}), ("c", {"x": 0, "y": 1})):
        (tmp_path / name).mkdir()
        Tokenizer(models.WordLevel(vocab, unk_token="x")).save(str(tmp_path / name / "tokenizer.json"))  # noqa: S106
    target = str(tmp_path / "a")
    assert not differ(target, str(tmp_path / "c"))
    assert differ(target, str(tmp_path / "b"))
    with pytest.raises(CommandFailed, match="the draft simulated and the target a differ in vocabulary"):
        differ(target, "simulated")
    with pytest.raises(CommandFailed, match=r"cannot read .*tokenizer\.json"):
        differ(target, str(tmp_path / "none"))


def test_a_failed_start_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("services.cli.cluster.redis_binary", lambda: "/bin/false")
    with pytest.raises(CommandFailed, match="redis ended"), Cluster(SIMULATED):
        pass
    assert list(tmp_path.iterdir()) == []
