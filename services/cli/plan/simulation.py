"""A discrete-event simulation of drafts and targets that many sequences share.

Owns: the model of a round, and time. Must not know: files, tables, questions of capacity. Pure: a function of its
arguments, the seed among them. Times in milliseconds.

    sequence     -> draft: K steps, each shared with the others there -> target: a step, shared -> coordinator -> ...
    draft        takes all that wait for a token into a step of token_ms + token_row_ms * sequences
    target       takes all that wait into a step of step_ms + row_ms * rows, K + 1 rows a sequence; before that it may
                 hold the step for those that are due back, by the rule of services.engine.hold
    coordinator  one for each target; works overhead_ms for each round, one after the other
    network      delay_ms each way, so 4 * delay_ms a round

Without drafts the sequences stay on the target: every step takes them all, and the coordinator works meanwhile.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from services.cli.plan.hold import Away, Ready, held_until_ms

GAP_WEIGHT = 0.125
DEVIATION_WEIGHT = 0.25
MIN_SLACK = 0.125
MIN_SLACK_MS = 0.2
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Times:
    """What things take. `alphas`: conditional acceptance by position; the last one holds for deeper ones too."""

    step_ms: float
    row_ms: float = 0.0
    token_ms: float = 0.0
    token_row_ms: float = 0.0
    alphas: tuple[float, ...] = (0.7,)
    delay_ms: float = 0.2
    overhead_ms: float = 0.5

    def alpha(self, position: int) -> float:
        return self.alphas[min(position, len(self.alphas) - 1)]

    def rows_ms(self, num_rows: int) -> float:
        """A step of the target."""
        return self.step_ms + self.row_ms * num_rows


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated: sequences that never end, spread evenly over targets and drafts."""

    num_sequences: int
    num_draft_tokens: int
    num_targets: int = 1
    num_drafts: int = 1
    num_rounds: int = 60
    """Of each sequence, on average; a quarter of them before counting begins."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rates of all sequences together. `target_busy` and `draft_busy` are shares of the time, of the average worker."""

    tokens_per_s: float
    tpot_ms: float
    tokens_per_round: float
    target_busy: float
    draft_busy: float


def simulate(times: Times, setting: Setting) -> Outcome:
    """Plain decoding is computed; drafts are simulated."""
    return _Simulation(times, setting).run() if setting.num_draft_tokens else _plain(times, setting)


def _plain(times: Times, setting: Setting) -> Outcome:
    per_target = -(-setting.num_sequences // setting.num_targets)
    cycle_ms = max(times.rows_ms(per_target), times.overhead_ms * per_target)
    return Outcome(
        tokens_per_s=1e3 * setting.num_sequences / cycle_ms,
        tpot_ms=cycle_ms,
        tokens_per_round=1.0,
        target_busy=times.rows_ms(per_target) / cycle_ms,
        draft_busy=0.0,
    )


@dataclass(slots=True, eq=False)
class _Sequence:
    draft: _Server
    target: _Target
    num_missing: int = 0
    """Tokens still to be drafted for its round."""
    left_ms: float | None = None
    """When its last step ended; None while it is at the target."""
    gap_ms: float = 0.0
    """How long it is away, averaged; 0: never yet."""
    deviation_ms: float = 0.0

    @property
    def due_ms(self) -> float:
        """When it is back at the latest."""
        if self.left_ms is None or not self.gap_ms:
            return 0.0
        return self.left_ms + self.gap_ms + max(4 * self.deviation_ms, MIN_SLACK * self.gap_ms, MIN_SLACK_MS)

    @property
    def usual_ms(self) -> float:
        """When it is back in all but rare cases; it is away."""
        return (self.left_ms or 0.0) + self.gap_ms + 2 * self.deviation_ms

    def come_back(self, now_ms: float) -> None:
        if self.left_ms is None:
            return
        gap_ms, self.left_ms = now_ms - self.left_ms, None
        if not self.gap_ms:
            self.gap_ms, self.deviation_ms = gap_ms, gap_ms / 2
            return
        off_ms = gap_ms - self.gap_ms
        self.gap_ms += GAP_WEIGHT * off_ms
        self.deviation_ms += DEVIATION_WEIGHT * (abs(off_ms) - self.deviation_ms)


@dataclass(slots=True, eq=False)
class _Server:
    """A worker: who waits, and until when it works."""

    waiting: list[_Sequence] = field(default_factory=list)
    busy: bool = False
    busy_ms: float = 0.0
    woken: int = 0
    """Grows with every decision, so that the end of a hold that is over can be told."""


@dataclass(slots=True, eq=False)
class _Target(_Server):
    members: list[_Sequence] = field(default_factory=list)
    held_since_ms: float | None = None
    coordinator_free_ms: float = 0.0
    """When its coordinator is done with what it has."""


class _Simulation:
    def __init__(self, times: Times, setting: Setting) -> None:
        self._times = times
        self._setting = setting
        self._random = Random(setting.seed)  # noqa: S311  # not for secrets
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._chance = self._random.random()
        self._num_events = 0
        self._now_ms = 0.0
        self._num_tokens = 0
        self._num_rounds = 0
        self._targets = [_Target() for _ in range(setting.num_targets)]
        self._drafts = [_Server() for _ in range(setting.num_drafts)]
        for number in range(setting.num_sequences):
            target = self._targets[number % setting.num_targets]
            sequence = _Sequence(self._drafts[number % setting.num_drafts], target)
            target.members.append(sequence)
            self._at(self._random.random() * times.step_ms, partial(self._draft, sequence))

    def run(self) -> Outcome:
        total = self._setting.num_rounds * self._setting.num_sequences
        self._run_until(total // 4)
        started_ms, num_tokens, num_rounds = self._now_ms, self._num_tokens, self._num_rounds
        for server in [*self._targets, *self._drafts]:
            server.busy_ms = 0.0
        self._run_until(total)
        took_ms, num_tokens = self._now_ms - started_ms, self._num_tokens - num_tokens
        return Outcome(
            tokens_per_s=1e3 * num_tokens / took_ms,
            tpot_ms=took_ms * self._setting.num_sequences / num_tokens,
            tokens_per_round=num_tokens / (self._num_rounds - num_rounds),
            target_busy=min(1.0, sum(server.busy_ms for server in self._targets) / len(self._targets) / took_ms),
            draft_busy=min(1.0, sum(server.busy_ms for server in self._drafts) / len(self._drafts) / took_ms),
        )

    def _run_until(self, num_rounds: int) -> None:
        while self._num_rounds < num_rounds:
            self._now_ms, _, event = heapq.heappop(self._events)
            event()

    def _at(self, time_ms: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_ms, self._num_events, event))

    def _draft(self, sequence: _Sequence) -> None:
        """It asks its draft for a proposal."""
        sequence.num_missing = self._setting.num_draft_tokens
        sequence.draft.waiting.append(sequence)
        self._at(self._now_ms, partial(self._draft_step, sequence.draft))

    def _draft_step(self, draft: _Server) -> None:
        if draft.busy or not draft.waiting:
            return
        members = list(draft.waiting)
        took_ms = self._times.token_ms + self._times.token_row_ms * len(members)
        draft.busy, draft.busy_ms = True, draft.busy_ms + took_ms
        self._at(self._now_ms + took_ms, partial(self._drafted, draft, members))

    def _drafted(self, draft: _Server, members: list[_Sequence]) -> None:
        draft.busy = False
        for sequence in members:
            sequence.num_missing -= 1
            if not sequence.num_missing:
                draft.waiting.remove(sequence)
                self._at(self._now_ms + 2 * self._times.delay_ms, partial(self._verify, sequence))
        self._draft_step(draft)

    def _verify(self, sequence: _Sequence) -> None:
        """Its proposal has come to the target."""
        sequence.come_back(self._now_ms)
        sequence.target.waiting.append(sequence)
        self._at(self._now_ms, partial(self._target_step, sequence.target))

    def _target_step(self, target: _Target) -> None:
        if target.busy or not target.waiting:
            return
        target.woken += 1
        if (until_ms := self._held_until(target)) > self._now_ms:
            self._at(until_ms, partial(self._end_hold, target, target.woken))
            return
        target.held_since_ms = None
        members, target.waiting = target.waiting, []
        took_ms = self._times.rows_ms(len(members) * (self._setting.num_draft_tokens + 1))
        target.busy, target.busy_ms = True, target.busy_ms + took_ms
        self._at(self._now_ms + took_ms, partial(self._verified, target, members))

    def _end_hold(self, target: _Target, woken: int) -> None:
        if target.woken == woken:
            self._target_step(target)

    def _held_until(self, target: _Target) -> float:
        """When the step is to begin at the latest, if those who are due come back: now, where that does not pay."""
        rows = self._setting.num_draft_tokens + 1
        since_ms = self._now_ms if target.held_since_ms is None else target.held_since_ms
        away = [
            Away(s.usual_ms, s.due_ms, s.gap_ms, s.deviation_ms, rows)
            for s in target.members
            if s.due_ms > self._now_ms
        ]
        ready = Ready(since_ms, len(target.waiting), len(target.waiting) * rows)
        until_ms = held_until_ms(self._now_ms, ready, away, self._times.rows_ms)
        if until_ms > self._now_ms:
            target.held_since_ms = since_ms
        return until_ms

    def _verified(self, target: _Target, members: list[_Sequence]) -> None:
        target.busy = False
        for sequence in members:
            sequence.left_ms = self._now_ms
            self._num_tokens += self._num_accepted() + 1
            self._num_rounds += 1
            arrived_ms = self._now_ms + self._times.delay_ms
            target.coordinator_free_ms = max(target.coordinator_free_ms, arrived_ms) + self._times.overhead_ms
            asks_ms = target.coordinator_free_ms + self._times.delay_ms
            self._at(asks_ms, partial(self._draft, sequence))
        self._target_step(target)

    def _num_accepted(self) -> int:
        """Drawn by the additive recurrence of the golden ratio: few rounds come close to the distribution."""
        self._chance = (self._chance + GOLDEN) % 1.0
        survival = 1.0
        for position in range(self._setting.num_draft_tokens):
            survival *= self._times.alpha(position)
            if self._chance >= survival:
                return position
        return self._setting.num_draft_tokens
