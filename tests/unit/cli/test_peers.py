"""The peers of `outrider bench`: what cannot run is refused at the start, times come to the right figures."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from rich.console import Console

from services.cli.bench import peers
from services.cli.bench.peers import Task, Timed, check_peers, failed_peers, peer_report, run_peers
from services.cli.failure import CommandFailed
from services.engine.peers import PEERS
from services.engine.peers import Task as EngineTask
from tests.unit.cli.bench_samples import plain

MS = 1_000_000
TASK = Task(
    target="/models/secret/target",
    draft="/models/secret/draft",
    peers=("transformers", "assisted"),
    prompts=((1,), (2,)),
    max_tokens=2,
    num_draft_tokens=4,
    dtype="float32",
    device="cpu",
    threads=1,
    temperature=0.0,
    seed=0,
    ignore_eos=False,
)
READY = {"event": "ready", "version": "5.0"}


def test_both_sides_agree_on_names_and_fields():
    assert peers.PEERS == PEERS
    assert [field.name for field in dataclasses.fields(Task)] == [f.name for f in dataclasses.fields(EngineTask)]


@pytest.mark.parametrize(
    ("names", "target", "own_cluster", "reason"),
    [
        (("transformers",), "sample", False, "--address"),
        (("transformers",), "simulated", True, "--simulated"),
        (("assisted",), "sample", True, "draft model"),
    ],
)
def test_what_cannot_run_is_refused(names, target, own_cluster, reason):
    with pytest.raises(CommandFailed, match=reason):
        check_peers(names, target, ("ngram",), own_cluster=own_cluster)


def test_runnable_peers_pass():
    check_peers((), "sample", ("ngram",), own_cluster=False)
    check_peers(("assisted",), "sample", ("ngram", "model"), own_cluster=True)


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


def timed(name: str, prompt: int) -> dict[str, object]:
    return {"event": "timed"} | Timed(name, prompt, (0, 1), 20 * MS, ((10 * MS, 1), (20 * MS, 2)))._asdict()


def run_saying(monkeypatch: pytest.MonkeyPatch, lines: list[str], end: str = "") -> list[peers.PeerReport]:
    """Runs the peers as a real process that writes `lines`, then does `end`."""
    script = f"import sys; sys.stdin.read(); sys.stdout.write({chr(10).join(lines)!r}); sys.stdout.flush(); {end}"
    monkeypatch.setattr(peers, "tethered", lambda _: [sys.executable, "-c", script])
    return list(run_peers(TASK, [plain(0, 2), plain(1, 3)], Console(quiet=True)))


def test_a_failed_peer_is_reported_beside_the_others(monkeypatch):
    failed = {"event": "failed", "peer": "assisted", "reason": "OSError: no weights in /models/secret/draft"}
    events = [failed, READY, timed("transformers", 0), timed("transformers", 1)]
    fine, broken = run_saying(monkeypatch, [*map(json.dumps, events), ""])
    assert (fine.failure, fine.num_requests, fine.num_identical_outputs) == (None, 2, 1)
    assert (broken.failure, broken.num_requests) == ("OSError: no weights in draft", 0)
    assert (broken.tokens_per_s, broken.num_identical_outputs) == (None, None)


def test_a_process_that_dies_fails_the_peers_that_were_not_done(monkeypatch):
    done = [READY, timed("transformers", 0), timed("assisted", 0), timed("transformers", 1)]
    lines = [*map(json.dumps, done), json.dumps(timed("assisted", 1))[:20]]
    fine, cut_off = run_saying(monkeypatch, lines, "sys.exit('out of memory')")
    assert (fine.failure, fine.num_requests) == (None, 2)
    assert cut_off.failure == "their process ended with status 1: out of memory"
    assert cut_off.num_requests == 1


def test_peers_that_cannot_start_have_reports_too():
    assert [(peer.name, peer.failure) for peer in failed_peers(("assisted",), "no prompts")] == [
        ("assisted", "no prompts")
    ]
