"""A coordinator's metrics.

Owns: their names and meanings. Must not know: how generations run, HTTP. Names and definitions are vLLM's where it has
the metric (docs/metrics.md has the table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.common.metrics import Families, Family
from services.common.tally import CallKind, Histogram
from services.coordinator.placement import Placement
from services.coordinator.tally import CoordinatorTally, GenerationTally

BY_KIND = ("model_name", "draft")


class _Counter(NamedTuple):
    family: Family
    value: Callable[[GenerationTally], float]


class _Histogram(NamedTuple):
    family: Family
    value: Callable[[GenerationTally], Histogram]


COUNTERS = (
    _Counter(
        Family("prompt_tokens", "Tokens of prompts, those cached included.", BY_KIND), lambda t: t.num_prompt_tokens
    ),
    _Counter(Family("generation_tokens", "Tokens emitted.", BY_KIND), lambda t: t.num_generated_tokens),
    _Counter(Family("spec_decode_num_drafts", "Verify steps that had a draft.", BY_KIND), lambda t: t.num_drafts),
    _Counter(
        Family("spec_decode_num_draft_tokens", "Draft tokens that the target checked.", BY_KIND),
        lambda t: t.num_draft_tokens,
    ),
    _Counter(
        Family("spec_decode_num_accepted_tokens", "Draft tokens that the target accepted.", BY_KIND),
        lambda t: t.num_accepted_tokens,
    ),
    _Counter(
        Family("round_draft_seconds", "Time of rounds in the draft worker, in seconds, its queue included.", BY_KIND),
        lambda t: t.draft_ns / 1e9,
    ),
    _Counter(
        Family("round_verify_seconds", "Time of rounds in the target worker, in seconds, its queue included.", BY_KIND),
        lambda t: t.verify_ns / 1e9,
    ),
)
HISTOGRAMS = (
    _Histogram(
        Family("time_to_first_token_seconds", "From a request's arrival to its first token, in seconds.", BY_KIND),
        lambda t: t.ttft_s,
    ),
    _Histogram(
        Family("inter_token_latency_seconds", "Between two messages with tokens of a stream, in seconds.", BY_KIND),
        lambda t: t.itl_s,
    ),
    _Histogram(
        Family(
            "time_per_output_token_seconds",
            "Of each finished request: from its first message with tokens to its last, over the tokens after the first "
            "message, in seconds.",
            BY_KIND,
        ),
        lambda t: t.tpot_s,
    ),
    _Histogram(
        Family("e2e_request_latency_seconds", "Of each finished request, from its arrival, in seconds.", BY_KIND),
        lambda t: t.e2e_s,
    ),
    _Histogram(
        Family("round_overhead_seconds", "A round's time less what its workers reported, in seconds.", BY_KIND),
        lambda t: t.overhead_s,
    ),
)
ROUNDS = Family("rounds", "Rounds with a proposal, and tokens decoded plainly.", (*BY_KIND, "type"))
ACCEPTED_PER_POS = Family(
    "spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted at a position, from 0.", (*BY_KIND, "position")
)
VERIFIED_PER_POS = Family(
    "spec_decode_num_verified_tokens_per_pos",
    "Draft tokens checked at a position with everything before it accepted, from 0.",
    (*BY_KIND, "position"),
)
FINISHED = Family("request_success", "Generations that finished, by reason.", (*BY_KIND, "finished_reason"))
RUNNING = Family("num_requests_running", "Generations that run here and have emitted a token.")
WAITING = Family("num_requests_waiting", "Requests admitted here that have no token yet.")
DRAINING = Family("coordinator_draining", "1 while this coordinator takes no new generations, else 0.")
WORKER_UP = Family(
    "worker_up", "1 while this coordinator is connected to the worker, else 0.", ("worker_role", "pool", "address")
)
WORKERS_UP = Family("workers_up", "Workers that this coordinator is connected to.", ("worker_role",))
WORKERS = Family("workers", "Workers that this coordinator knows of.", ("worker_role",))
POOL_READY = Family(
    "draft_pool_ready", "1 while a draft worker of the pool is connected and fits the target, else 0.", ("draft",)
)
EXPECTED_CALLS = (
    CallKind("Generate", "OK", ""),
    CallKind("Generate", "INTERNAL", "DEFECT"),
    CallKind("Generate", "RESOURCE_EXHAUSTED", "QUEUE_FULL"),
    CallKind("Generate", "UNAVAILABLE", "NO_TARGET"),
    CallKind("Generate", "UNAVAILABLE", "STORE_UNAVAILABLE"),
)
"""What alerts look at."""
ROLES = ("draft", "target")


class Requests(Protocol):
    """What the collector reads of services.coordinator.coordinator.Coordinator, from any thread."""

    @property
    def num_streaming(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def draining(self) -> bool: ...


class CoordinatorCollector(Collector):
    """Reads a coordinator when it is asked."""

    def __init__(self, tally: CoordinatorTally, requests: Requests, placement: Placement) -> None:
        self._tally = tally
        self._requests = requests
        self._placement = placement
        self._families = Families({"role": "coordinator"})

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families, kinds = self._families, self._tally.kinds
        for counter in COUNTERS:
            yield families.counter(counter.family, [(kind, counter.value(tally)) for kind, tally in kinds])
        for histogram in HISTOGRAMS:
            yield families.histogram(histogram.family, [(kind, histogram.value(tally)) for kind, tally in kinds])
        yield from self._by_further_label()
        yield from self._gauges()

    def _by_further_label(self) -> Iterable[Metric]:
        families, kinds = self._families, self._tally.kinds
        rounds = [((*kind, "speculative"), tally.num_rounds) for kind, tally in kinds]
        rounds += [((*kind, "plain"), tally.num_plain_rounds) for kind, tally in kinds]
        yield families.counter(ROUNDS, rounds)
        reasons = [((*kind, reason.value), n) for kind, tally in kinds for reason, n in list(tally.finished.items())]
        yield families.counter(FINISHED, reasons)
        accepted, verified = [], []
        for kind, tally in kinds:
            by_position = zip(tally.accepted_per_pos, tally.verified_per_pos, strict=True)
            for position, (num_accepted, num_verified) in enumerate(by_position):
                if num_verified:
                    accepted.append(((*kind, str(position)), num_accepted))
                    verified.append(((*kind, str(position)), num_verified))
        yield families.counter(ACCEPTED_PER_POS, accepted)
        yield families.counter(VERIFIED_PER_POS, verified)

    def _gauges(self) -> Iterable[Metric]:
        families, workers = self._families, self._placement.workers
        yield families.gauge(RUNNING, [((), self._requests.num_streaming)])
        yield families.gauge(WAITING, [((), self._requests.num_waiting)])
        yield families.gauge(DRAINING, [((), float(self._requests.draining))])
        samples = [((worker.role, worker.pool, worker.address), float(worker.up)) for worker in workers]
        yield families.gauge(WORKER_UP, samples)
        pools = self._placement.ready_drafts.items()
        yield families.gauge(POOL_READY, [((name,), float(ready)) for name, ready in pools])
        for family, counted in ((WORKERS, workers), (WORKERS_UP, [worker for worker in workers if worker.up])):
            roles = [worker.role for worker in counted]
            yield families.gauge(family, [((role,), roles.count(role)) for role in ROLES])
