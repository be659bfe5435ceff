"""What a cluster's processes are started with."""

from __future__ import annotations

import dataclasses

import click
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models

from services.cli.cluster import (
    Cluster,
    ClusterSpec,
    PoolSpec,
    PreparedModel,
    child_environment,
    coordinator_flags,
    draft_flags,
    pool_addresses,
    prepare_pool,
    split_threads,
    target_flags,
    worker_names,
)
from services.cli.draft_pool_option import DraftPool
from services.cli.failure import CommandFailed
from services.cli.options import cluster_options
from services.cli.up import up
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
        (2, "model", (2, 1)),
        (16, "model", (16, 4)),
        (4, "suffix,model", (4, 1)),
        (4, "suffix", (4, 1)),
    ],
)
def test_threads_are_split_between_what_computes(cores, drafter, split):
    assert split_threads(cores, drafter) == split


def test_several_workers_share_the_threads_and_take_free_ports():
    assert split_threads(16, "model", num_targets=3, num_drafts=2) == (5, 2)
    assert split_threads(2, "ngram", num_targets=3, num_drafts=3) == (1, 1)
    spec = dataclasses.replace(SIMULATED, num_targets=3, num_drafts=2, target_port=50053, draft_port=50052)
    assert spec.target_ports == (50053, 0, 0)
    assert spec.draft_ports == (50052, 0)
    assert worker_names("target", 3) == ["target", "target-2", "target-3"]


def test_named_pools_of_drafts_are_told_to_the_coordinator_by_name():
    spec = dataclasses.replace(SIMULATED, num_drafts=2, draft_port=50052)
    assert pool_addresses(spec, ["127.0.0.1:1", "127.0.0.1:2"]) == "127.0.0.1:1,127.0.0.1:2"
    pools = (PoolSpec("fast", "suffix", ""), PoolSpec("big", "simulated", "simulated"))
    named = dataclasses.replace(spec, named_pools=pools)
    assert named.draft_ports == (50052, 0, 0, 0)
    drafts = pool_addresses(named, ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4"])
    told = CoordinatorConfig(drafts=drafts, tokenizer="simulated").draft_pools
    assert [(pool.name, len(pool.sources)) for pool in told] == [("fast", 2), ("big", 2)]


@pytest.mark.parametrize(
    ("text", "pool"),
    [
        ("fast=suffix", PoolSpec("fast", "suffix", "")),
        ("big-1=suffix,model:/models/a:b", PoolSpec("big-1", "suffix,model", "/models/a:b")),
    ],
)
def test_a_pool_is_named_with_what_it_drafts_by(text, pool):
    assert DraftPool().convert(text, None, None) == pool


@pytest.mark.parametrize(
    ("text", "message"), [("suffix", "is no pool such as"), ("a b=suffix", "is no pool"), ("a=magic", "'magic' is not")]
)
def test_other_pools_are_refused_with_the_reason(text, message):
    with pytest.raises(click.BadParameter, match=message):
        DraftPool().convert(text, None, None)


def test_pools_of_one_name_are_refused():
    done = CliRunner().invoke(up, ["--simulated", "--draft-pool", "a=suffix", "--draft-pool", "a=ngram"])
    assert done.exit_code == 2
    assert "two pools have the same name" in done.output


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("sample", "suffix,features", "sample-head")),
        (["--draft", "sample-draft"], ("sample", "suffix,model", "sample-draft")),
        (["--drafter", "features"], ("sample", "features", "sample-head")),
        (["--simulated"], ("simulated", "simulated", "simulated")),
        (["--target", "other"], ("other", "ngram", "")),
        (["--target", "other", "--draft", "small"], ("other", "suffix,model", "small")),
        (["--drafter", "ngram"], ("sample", "ngram", "sample-draft")),
    ],
)
def test_the_default_draft_is_what_is_at_hand_for_the_target(arguments, expected):
    @click.command()
    @cluster_options
    def command(spec):
        click.echo(repr((spec.target, spec.drafter, spec.draft)))

    assert CliRunner().invoke(command, arguments).output.strip() == repr(expected)


def test_a_drafter_with_a_model_needs_one_named():
    with pytest.raises(CommandFailed, match="the drafter suffix,model needs a draft model: name one with --draft"):
        prepare_pool(PoolSpec("", "suffix,model", ""), MODEL)


def test_a_failed_start_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("services.cli.cluster.redis_binary", lambda: "/bin/false")
    with pytest.raises(CommandFailed, match="redis ended"), Cluster(SIMULATED):
        pass
    assert list(tmp_path.iterdir()) == []
