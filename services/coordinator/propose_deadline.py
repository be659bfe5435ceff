"""How long a proposal may take: what its round is worth, and which draft workers are too slow for that.

Owns: the estimates for one draft pool and one model, and when a slow worker is tried again. Must not know: what a
sequence does without its draft, how many tokens pay (coordinator.draft_length), the wire. Pure.

    worth(K)      step * max(1, yield * K)          the target's time for the tokens that K drafted ones bring
    slow(K)       SLACK * worth                     beyond, drafting costs more than it brings, also where the target
                                                    computes the steps of others meanwhile
    patience(K)   PATIENCE * slow                   nobody waits longer

The last two are raised to `least_s` and to what a busy machine's pauses take, and are at most `max_s`.

A worker whose slow proposals have together taken what one may be waited for is out of use. It is asked on, one proposal
at a time, while the target decodes: what comes back tells only how long it took, and one that was not slow puts the
worker to use again. The first is asked for at once, so that a pause costs little more than itself; each slow one
doubles the time to the next, and only many timely ones in earnest make up for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.coordinator.round_cost import Mean

MIN_PATIENCE_S = 0.1
"""Below this, a busy machine's pauses would pass for losses."""
SLACK = 1.5
PATIENCE = 2.0
OVERDUE = 10.0
"""Times the patience, after which a worker is left for another."""
STEP_WEIGHT, YIELD_WEIGHT = 1 / 8, 1 / 32
MAX_SLOWNESS = 10.0
HABIT = 3.0
REFUND, RECOVERY = 0.1, 0.25
"""What each timely proposal makes up for, of the patience and of the slow ones."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.02, 2.0
MAX_WORKERS = 256
"""That are remembered; they come and go."""


class DraftPace:
    """Whether one draft worker is quick enough. Told of all its proposals, of every sequence; times in seconds."""

    def __init__(self) -> None:
        self.in_use = True
        self._since_s = -math.inf
        """When it was put to use again."""
        self._spent = 0.0
        """Of the patience, while it is in use."""
        self._slowness = 0.0
        """How often it was put out of use, or slow on trial, and has not made up for it."""
        self._next_s = 0.0
        self._tried = False

    @property
    def is_habitual(self) -> bool:
        """Whether it is out of use, and was slow again and again."""
        return not self.in_use and self._slowness >= HABIT

    def timely(self) -> None:
        """A proposal that was waited for came in time."""
        self._spent = max(0.0, self._spent - REFUND)
        self._slowness = max(0.0, self._slowness - RECOVERY)

    def slow(self, now_s: float, took_s: float, spent: float = 1.0) -> None:
        """A proposal that was waited for, or has been, took so long, and with it `spent` of the patience.

        One pause may delay many at once.
        """
        if self.in_use and now_s - took_s >= self._since_s:
            self._spent += spent
            if self._spent >= 1.0:
                self.in_use = False
                self._grow_slower(now_s, took_s)
        elif not self.in_use:
            self._back_off(now_s, took_s)

    def begin_trial(self, now_s: float) -> bool:
        """Whether it is to be asked now for a proposal that nobody waits for; then `end_trial` follows."""
        if self.in_use or self._tried or now_s < self._next_s:
            return False
        self._tried = True
        return True

    def end_trial(self, now_s: float, took_s: float | None = None, *, timely: bool = False) -> None:
        """The answer came, or (None) none will."""
        self._tried = False
        if timely:
            self.in_use, self._since_s, self._spent = True, now_s, 0.0
        elif took_s is not None:
            self._grow_slower(now_s, took_s)
        else:
            self._back_off(now_s, MIN_BACKOFF_S)

    def _grow_slower(self, now_s: float, took_s: float) -> None:
        self._slowness = min(self._slowness + 1.0, MAX_SLOWNESS)
        self._back_off(now_s, took_s)

    def _back_off(self, now_s: float, took_s: float) -> None:
        """Not behind the first slow one."""
        if self._slowness > 1.0:
            backoff_s = max(took_s, MIN_BACKOFF_S) * 2.0 ** (self._slowness - 1.0)
            self._next_s = max(self._next_s, now_s + min(backoff_s, max(MAX_BACKOFF_S, took_s)))


@dataclass(frozen=True, slots=True)
class Asked:
    """A proposal under way. Nobody waits for that of a `trial`."""

    proposal_id: int
    num_draft_tokens: int
    pace: DraftPace
    since_s: float
    trial: bool


class ProposeDeadline:
    """Told of every step of the target that these sequences took part in, and what became of every proposal."""

    def __init__(self, max_s: float, least_s: float = 0.02) -> None:
        """`least_s`: what a proposal may take however little it is worth."""
        self.max_s = max_s
        """After which a draft that has not answered counts as lost; nobody waits longer."""
        self._least_s = least_s
        self._step_s = Mean()
        self._first_s = 0.0
        self._yield = Mean(1.0, 1)
        self._paces: dict[str, DraftPace] = {}

    def pace(self, instance_id: str) -> DraftPace:
        """Of one worker."""
        if instance_id not in self._paces and len(self._paces) >= MAX_WORKERS:
            del self._paces[next(iter(self._paces))]
        return self._paces.setdefault(instance_id, DraftPace())

    def stepped(self, step_ns: int, *, first: bool = False) -> None:
        """A step of the target. A `first` token's may hold its prompt."""
        if first:
            self._first_s = step_ns / 1e9
        elif step_ns:
            self._step_s.observe_time(step_ns / 1e9, STEP_WEIGHT)

    def verified(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """What came of the tokens asked for."""
        self._yield.observe(num_accepted_tokens / num_draft_tokens, YIELD_WEIGHT)

    def slow_s(self, num_draft_tokens: int) -> float:
        """What a proposal of so many tokens may take. Before the target was seen at work, `max_s`."""
        step_s = self._step_s.value or self._first_s
        if not step_s:
            return self.max_s
        worth_s = step_s * max(1.0, self._yield.value * num_draft_tokens)
        return min(self.max_s, max(self._least_s, SLACK * worth_s))

    def patience_s(self, num_draft_tokens: int) -> float:
        """How long to wait for it."""
        return min(self.max_s, max(MIN_PATIENCE_S, PATIENCE * self.slow_s(num_draft_tokens)))

    def answered(self, asked: Asked, now_s: float) -> bool:
        """The proposal has come. Whether it was timely."""
        took_s = now_s - asked.since_s
        timely = took_s <= self.slow_s(asked.num_draft_tokens)
        if asked.trial:
            asked.pace.end_trial(now_s, took_s, timely=timely)
        elif timely:
            asked.pace.timely()
        else:
            asked.pace.slow(now_s, took_s, min(1.0, took_s / self.patience_s(asked.num_draft_tokens)))
        return timely

    def is_lost(self, asked: Asked, now_s: float) -> bool:
        """Whether the proposal is not to be expected any more."""
        return now_s - asked.since_s >= self.max_s

    def is_overdue(self, asked: Asked, now_s: float) -> bool:
        """Whether it is better asked of another worker."""
        return now_s - asked.since_s >= OVERDUE * self.patience_s(asked.num_draft_tokens)
