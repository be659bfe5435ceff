"""The peers of `outrider bench`: what cannot run is refused at the start, times come to the right figures."""

from __future__ import annotations

import dataclasses

import pytest

from services.cli.bench import peers
from services.cli.bench.peers import Task, Timed, check_peers, peer_report
from services.cli.cluster import ClusterSpec
from services.cli.failure import CommandFailed
from services.engine.peers import PEERS
from services.engine.peers import Task as EngineTask

MS = 1_000_000


def test_both_sides_agree_on_names_and_fields():
    assert peers.PEERS == PEERS
    assert [field.name for field in dataclasses.fields(Task)] == [f.name for f in dataclasses.fields(EngineTask)]


@pytest.mark.parametrize(
    ("names", "spec", "own_cluster", "reason"),
    [
        (("transformers",), ClusterSpec(), False, "--address"),
        (("transformers",), ClusterSpec(target="simulated"), True, "--simulated"),
        (("assisted",), ClusterSpec(drafter="ngram"), True, "draft model"),
    ],
)
def test_what_cannot_run_is_refused(names, spec, own_cluster, reason):
    with pytest.raises(CommandFailed, match=reason):
        check_peers(names, spec, own_cluster=own_cluster)


def test_runnable_peers_pass():
    check_peers((), ClusterSpec(), own_cluster=False)
    check_peers(("assisted",), ClusterSpec(drafter="model"), own_cluster=True)


def test_a_peers_figures():
    first = Timed("assisted", 0, (1, 2, 3, 4), 400 * MS, ((100 * MS, 1), (300 * MS, 4)))
    second = Timed("assisted", 1, (5, 6), 100 * MS, ((100 * MS, 2),))
    report = peer_report("assisted", "5.0", [first, second], [(1, 2, 3, 4), (5, 7)])
    assert (report.num_requests, report.num_tokens, report.num_identical_outputs) == (2, 6, 1)
    assert report.tokens_per_s == 12.0
    assert report.decode_ms_per_token == pytest.approx(200 / 3, abs=1e-4)
    assert report.mean_acceptance_length == 2.0
    assert report.ttft_ms.p50 == 100.0
    assert peer_report("assisted", "5.0", [first], None).num_identical_outputs is None
