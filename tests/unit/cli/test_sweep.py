"""Which cases a sweep makes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import click
import pytest
from rich.console import Console

from services.cli.bench import sweep as sweep_module
from services.cli.bench.load import LoadPlan
from services.cli.bench.options import Chains, Names
from services.cli.bench.sweep import Case, Sweep, Where, run_cases
from services.cli.cluster import ClusterSpec, PoolSpec
from services.cli.failure import CommandFailed
from services.client import GenerateOptions
from services.common.values import VerificationMethod

COUPLED, REJECTION = VerificationMethod.COUPLED, VerificationMethod.REJECTION


def test_without_a_sweep_there_is_the_one_case_of_the_options():
    options = GenerateOptions(temperature=0.5, num_draft_tokens=3, verification=REJECTION)
    assert Sweep().cases("ngram", options) == (Case("ngram", 3, 0.5, REJECTION),)


def test_all_combinations_grouped_by_drafter():
    sweep = Sweep((1, 2), ("ngram", "model"), ("greedy", "rejection"))
    cases = sweep.cases("ngram", GenerateOptions(temperature=0.0))
    assert len(cases) == 8
    assert [case.drafter for case in cases] == ["ngram"] * 4 + ["model"] * 4
    assert [(case.temperature, case.num_draft_tokens) for case in cases[:4]] == [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)]
    assert cases[2].verification is REJECTION


def test_draft_pools_are_cases_of_one_cluster_and_their_requests_name_them():
    pools = (PoolSpec("copy", "suffix", "sample"), PoolSpec("big", "model", "other"))
    cases = Sweep((1, 2)).cases("ngram", GenerateOptions(), pools)
    assert [(case.draft, case.drafter, case.num_draft_tokens) for case in cases] == [
        ("copy", "suffix", 1),
        ("copy", "suffix", 2),
        ("big", "model", 1),
        ("big", "model", 2),
    ]
    assert len({case.cluster for case in cases}) == 1
    assert cases[2].options(GenerateOptions()).draft == "big"
    assert cases[2].label.startswith("big=model K=1")


def test_a_sampling_has_the_temperature_given():
    (case,) = Sweep(samplings=("coupled",)).cases("ngram", GenerateOptions(temperature=0.7))
    assert (case.temperature, case.verification) == (0.7, COUPLED)
    assert case.label == "ngram, coupled at 0.7"


def test_case_options_keep_the_rest():
    base = GenerateOptions(max_tokens=7, temperature=0.0)
    options = Case("ngram", 2, 1.0, REJECTION).options(base)
    assert (options.max_tokens, options.num_draft_tokens, options.temperature) == (7, 2, 1.0)


def test_lists_name_what_is_unknown_and_drop_repetitions():
    kind = Names(("a", "b"))
    assert kind.convert("b, a,b", None, None) == ("b", "a")
    with pytest.raises(click.BadParameter, match="'c' is not one of a, b"):
        kind.convert("a,c", None, None)


def test_drafters_of_a_sweep_may_be_chains():
    assert Chains().convert("ngram,suffix+model,ngram", None, None) == ("ngram", "suffix,model")
    with pytest.raises(click.BadParameter, match="nothing can stand behind it"):
        Chains().convert("ngram,model+suffix", None, None)


class Clusters(Where):
    """Of which those of `broken` drafters don't start."""

    broken: tuple[str, ...] = ()

    @contextlib.contextmanager
    def running(self, console: Console, drafter: str) -> Iterator[tuple[str, int | None]]:
        if drafter in self.broken:
            raise CommandFailed("the draft ended before it was ready", detail="its log")
        yield "nowhere:1", None


class Counting(Clusters):
    """Of which the starts are counted."""

    started: list[str]

    @contextlib.contextmanager
    def running(self, console: Console, drafter: str) -> Iterator[tuple[str, int | None]]:
        self.started.append(drafter)
        yield "nowhere:1", None


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Console:
    async def run_load(*args: Any, title: str, **others: Any) -> str:
        return title

    monkeypatch.setattr(sweep_module, "run_load", run_load)
    return Console(file=io.StringIO(), width=200)


def cases_of(*drafters: str) -> tuple[Case, ...]:
    return tuple(Case(drafter, k, 0.0, COUPLED) for drafter in drafters for k in (1, 2))


def run(clusters: Clusters, cases: tuple[Case, ...], console: Console) -> sweep_module.Swept:
    plan = LoadPlan(GenerateOptions())
    return run_cases(clusters, cases, (), plan, console)


def test_what_is_measured_stays_when_a_later_cluster_does_not_start(shown: Console) -> None:
    clusters = Clusters(None, ClusterSpec())
    clusters.broken = ("model",)
    swept = run(clusters, cases_of("ngram", "model", "suffix"), shown)
    assert [found.case.drafter for found in swept.outcomes] == ["ngram", "ngram", "suffix", "suffix"]
    assert swept.failures == ("model: the draft ended before it was ready",)
    assert "its log" in shown.file.getvalue()


def test_a_sweep_of_which_nothing_runs_fails_as_its_first_cluster(shown: Console) -> None:
    clusters = Clusters(None, ClusterSpec())
    clusters.broken = ("ngram", "model")
    with pytest.raises(CommandFailed, match="before it was ready") as raised:
        run(clusters, cases_of("ngram", "model"), shown)
    assert raised.value.detail == "its log"


def test_all_draft_pools_are_measured_in_one_cluster(shown: Console) -> None:
    clusters = Counting(None, ClusterSpec())
    clusters.started = []
    cases = Sweep().cases("", GenerateOptions(), (PoolSpec("a", "ngram", ""), PoolSpec("b", "suffix", "")))
    assert [found.case.draft for found in run(clusters, cases, shown).outcomes] == ["a", "b"]
    assert len(clusters.started) == 1
