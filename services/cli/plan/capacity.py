"""What is needed for a load: the best draft length at a number of sequences, and how many workers.

Owns: the search. Must not know: how a round is simulated, how answers are shown. Pure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.cli.plan.setting import Outcome, Request, Setting, Times
from services.cli.plan.simulation import simulate
from services.common.values import MAX_DRAFT_TOKENS

LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, MAX_DRAFT_TOKENS)
MAX_TARGETS_A_DRAFT = 8
MIN_ROUNDS = 40
MIN_SAMPLES = 800
"""Rounds of all sequences together: so many make the mean of what is accepted steady."""
MIN_REQUESTS_EACH, MIN_REQUESTS = 2, 12
"""Requests of each place, and of all together."""
LOSS = 0.02
"""What the rate may lose by sharing drafts."""


@dataclass(frozen=True, slots=True)
class Point:
    """One draft length at one number of sequences."""

    num_sequences: int
    num_draft_tokens: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the service. `utilisation`: the share of what the targets could do that it may take."""

    tokens_per_s: float
    request: Request | None = None
    """Each of them; without one, sequences never end."""
    max_sequences: int = 64
    """At once, on a target."""
    max_tpot_ms: float | None = None
    max_ttft_ms: float | None = None
    utilisation: float = 0.8

    def allows(self, outcome: Outcome) -> bool:
        """Whether its mean times are short enough."""
        is_fast = self.max_tpot_ms is None or outcome.tpot_ms <= self.max_tpot_ms
        return is_fast and (self.max_ttft_ms is None or (outcome.ttft_ms or 0.0) <= self.max_ttft_ms)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers that serve a load. `num_sequences` run at once on each target."""

    num_targets: int
    num_drafts: int
    num_sequences: int
    num_draft_tokens: int
    tpot_ms: float
    tokens_per_s: float
    """Of the whole fleet at that number of sequences."""
    ttft_ms: float | None = None


def sweep(
    times: Times, num_sequences: int, lengths: Iterable[int] = LENGTHS, request: Request | None = None
) -> tuple[Point, ...]:
    """Every draft length, on one target with one draft."""
    settings = [_setting(num_sequences, k, request) for k in lengths]
    return tuple(Point(num_sequences, s.num_draft_tokens, simulate(times, s)) for s in settings)


def _setting(num_sequences: int, num_draft_tokens: int, request: Request | None, num_targets: int = 1) -> Setting:
    """Simulated for so long that the means are steady."""
    return Setting(
        num_sequences * num_targets,
        num_draft_tokens,
        num_targets,
        request=request,
        num_rounds=max(MIN_ROUNDS, MIN_SAMPLES // num_sequences),
        num_requests=1 + max(MIN_REQUESTS_EACH, -(-MIN_REQUESTS // num_sequences)),
    )


def best(points: Iterable[Point]) -> Point:
    """The highest rate; among equals the shortest."""
    return max(points, key=lambda point: (point.outcome.tokens_per_s, -point.num_draft_tokens))


def fleet_for(
    times: Times, load: Load, lengths: Iterable[int] = LENGTHS, on_point: Callable[[], None] = lambda: None
) -> Fleet | None:
    """The fewest targets, then the fewest drafts; None where no target is fast enough. `on_point`: a size done."""
    lengths = tuple(lengths)
    points = []
    for size in sizes(load.max_sequences):
        points.append(best(sweep(times, size, lengths, load.request)))
        on_point()
    allowed = [point for point in points if load.allows(point.outcome)]
    if not allowed:
        return None
    most = max(point.outcome.tokens_per_s for point in allowed)
    num_targets = max(1, math.ceil(load.tokens_per_s / (load.utilisation * most)))
    share = load.tokens_per_s / num_targets / load.utilisation
    point = next(p for p in allowed if p.outcome.tokens_per_s >= share * (1 - 1e-9))
    num_drafts, outcome = _drafts_for(times, point, num_targets, share, load.request)
    return Fleet(
        num_targets,
        num_drafts,
        point.num_sequences,
        point.num_draft_tokens,
        outcome.tpot_ms,
        outcome.tokens_per_s * num_targets,
        outcome.ttft_ms,
    )


def sizes(max_sequences: int) -> tuple[int, ...]:
    """Numbers of sequences to try: about half as many again each time, and the largest."""
    found = [1]
    while found[-1] < max_sequences:
        found.append(min(max_sequences, max(found[-1] + 1, found[-1] * 3 // 2)))
    return tuple(found)


def _drafts_for(
    times: Times, point: Point, num_targets: int, share: float, request: Request | None
) -> tuple[int, Outcome]:
    """How few drafts do, and one target's outcome with them."""
    if not point.num_draft_tokens:
        return 0, point.outcome
    enough = max(share, (1 - LOSS) * point.outcome.tokens_per_s)
    for group in range(min(num_targets, MAX_TARGETS_A_DRAFT), 1, -1):
        outcome = simulate(times, _setting(point.num_sequences, point.num_draft_tokens, request, group))
        if outcome.tokens_per_s / group >= enough:
            return math.ceil(num_targets / group), _of_one(outcome, group)
    return num_targets, point.outcome


def _of_one(outcome: Outcome, num_targets: int) -> Outcome:
    return dataclasses.replace(outcome, tokens_per_s=outcome.tokens_per_s / num_targets)
