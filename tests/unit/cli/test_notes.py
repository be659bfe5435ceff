"""What is said beside a run's figures, and when."""

from __future__ import annotations

import dataclasses

from services.cli.bench.load import LoadPlan
from services.cli.bench.notes import notes_on
from services.cli.bench.sweep import Case
from services.client import GenerateOptions
from services.common.values import VerificationMethod

PLAN = LoadPlan(GenerateOptions())
CASE = Case("ngram", 4, 1.0, VerificationMethod.COUPLED)
REJECTION, THRESHOLD = (
    dataclasses.replace(CASE, verification=method)
    for method in (VerificationMethod.REJECTION, VerificationMethod.THRESHOLD)
)


def test_one_request_at_a_time_and_exact_tokens_need_no_note():
    greedy = dataclasses.replace(REJECTION, temperature=0.0)
    assert notes_on(PLAN, [CASE, greedy], with_peers=True) == ()


def test_what_verification_does_not_promise_is_said():
    (rejection,) = notes_on(PLAN, [CASE, REJECTION], with_peers=False)
    assert "need not be identical" in rejection
    (threshold,) = notes_on(PLAN, [THRESHOLD], with_peers=False)
    assert "lossy" in threshold


def test_an_open_loops_rates_and_peers_beside_concurrent_requests_are_named():
    open_loop, peers = notes_on(dataclasses.replace(PLAN, rate=2.5), [CASE], with_peers=True)
    assert open_loop.startswith("2.5 conversations a second")
    assert "one request at a time" in peers
    assert notes_on(dataclasses.replace(PLAN, concurrency=8), [CASE], with_peers=True) == (peers,)
