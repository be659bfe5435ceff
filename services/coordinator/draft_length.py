"""How many tokens to draft: for each sequence, in each round.

Owns: the choice, and the probes that keep it informed while nothing is drafted. Must not know: streams, the wire, how
rounds are run. Pure but for what it is told; one event loop. Any choice leaves the output exact: it is made before the
tokens are drafted, from rounds that are over.

With S_ik the probability that the first k drafted tokens of sequence i are accepted (coordinator.acceptance_estimate),
its round with K_i tokens brings E_i = 1 + sum of S_ik over k <= K_i, and the pool's rate is

    sum of E_i / round(max K_i, rows)      or, where all decode alone,      N / plain        (coordinator.round_cost)

A token is worth verifying while S_ik exceeds its price, rate * row: what all would gain in the time that its row takes,
in one of the groups that the sequences form; so each number of groups has its price, and the best is taken.
The time to draft is the same for all, that of the longest; so `depth`, the most tokens of any sequence, is found by
trying each, with the tokens that are worth their price, and the price anew from the best rate (Dinkelbach 1967, "On
nonlinear fractional programming"). Depth 0: all decode alone. A sequence that would clearly be faster alone than beside
the others decodes alone too, and forgets why as it goes on.

Where many draft, each has one of few lengths: those that end together travel in one message, and every further message
costs all three services time that no worker reports.

Probes: while all decode alone, one sequence at a time drafts PROBE_LEN tokens a round until a round accepts nothing.
The next probe waits 1 / PROBE_SHARE of the time that this one took, of all sequences' decoding; twice as long after
each that changed nothing, up to MAX_BACKOFF times.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from services.common.items import Proposed, Tokens
from services.common.values import MAX_DRAFT_TOKENS
from services.coordinator.acceptance_estimate import PoolAcceptance, SequenceAcceptance
from services.coordinator.round_cost import MAX_GROUPS, Mean, RoundCost

PROBE_LEN = 2
PROBE_SHARE = 0.01
MAX_BACKOFF = 8
MAX_PROBE_ROUNDS = 8
MAX_OLD_EVIDENCE = 16.0
"""Observations that a probe's news stand against."""
ENTER = 1.02
"""Drafting must be expected to be so much faster than not drafting before all begin to draft."""
MAX_PATIENCE = 0.2
PATIENCE_ROUNDS = 2.0
OPT_OUT = 1.1
"""A sequence decodes alone where that is expected to be so much faster than drafting beside the others."""
FADE = 1.0 - 1.0 / 256.0
"""What is left of a sequence's evidence for each token that it decodes alone."""
MAX_GROWTH = 2
"""Tokens that rounds may become longer at a time: deep positions are judged by shallow ones until they are reached."""
MANY = 16
"""Sequences of a pool from which on lengths are brought together."""
STOPS = (1 / 3, 2 / 3, 1.0)
"""Where they are: shares of the depth."""
FILL_WEIGHT = 0.02
NUM_PASSES = 3


class DraftLength(Protocol):
    """The choice for one sequence. Told of every round and token of it, in order; `close` is the last call."""

    def choose(self, limit: int) -> int:
        """Tokens to draft in the next round, at most `limit`; 0: decode without a draft. Cheap; may be asked again."""
        ...

    def round(self, num_asked: int, proposed: Proposed, verified: Tokens, wall_ns: int) -> None:
        """A round is over, for which `num_asked` tokens were asked, `wall_ns` after the last one or the last token."""
        ...

    def decoded(self, tokens: Tokens, wall_ns: int) -> None:
        """A token was decoded without a draft, `wall_ns` after the one before."""
        ...

    def close(self) -> None: ...


class FixedLength:
    """Always as many."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens

    def choose(self, limit: int) -> int:
        return max(0, min(self._num_draft_tokens, limit))

    def round(self, num_asked: int, proposed: Proposed, verified: Tokens, wall_ns: int) -> None:
        """Nothing is learned of it."""

    def decoded(self, tokens: Tokens, wall_ns: int) -> None:
        """Nothing is learned of it."""

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What holds for all sequences of a pool until it is chosen anew."""

    depth: int
    """Most tokens of a round; 0: all decode alone."""
    price: float = 0.0
    """What S_ik must exceed."""
    num_rows: float = 0.0
    """Of a round of all."""
    slowdown: float = 1.0
    """A round's time over that of a token decoded alone."""


class _Column(NamedTuple):
    """All sequences' probabilities for one position, in order, and the sums of the least ones."""

    values: list[float]
    sums: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Self:
        return cls(values, list(itertools.accumulate(values, initial=0.0)))

    def above(self, price: float) -> tuple[int, float]:
        """How many are higher, and their sum."""
        first = bisect.bisect_right(self.values, price)
        return len(self.values) - first, self.sums[-1] - self.sums[first]


def best_choice(
    survivals: list[list[float]],
    cost: RoundCost,
    num_sequences: int,
    *,
    fill: float = 1.0,
    margin: float = 1.0,
    max_depth: int = MAX_DRAFT_TOKENS,
) -> Choice:
    """The lengths of the highest rate, if it is `margin` times that of decoding alone.

    `survivals` may be those of more or fewer than the `num_sequences`, for which they stand. `fill` is the share of the
    tokens asked for that are proposed.
    """
    scale = num_sequences / len(survivals)
    plain_ns = cost.plain_ns(num_sequences)
    best_rate, best = margin * num_sequences / plain_ns, Choice(0)
    columns = [_Column.of(sorted(column)) for column in itertools.islice(zip(*survivals, strict=True), max_depth)]
    for _ in range(NUM_PASSES):
        rate = best_rate
        for num_groups in range(1, min(num_sequences, MAX_GROUPS) + 1):
            price = rate * cost.target.row_ns / num_groups * fill
            num_tokens, num_rows = float(num_sequences), float(num_sequences)
            for depth, column in enumerate(columns, start=1):
                num_worthy, survival = column.above(price)
                if not num_worthy:
                    break
                num_tokens += scale * survival
                num_rows += scale * fill * num_worthy
                round_ns = cost.round_ns(num_sequences, num_rows, depth)
                if num_tokens / round_ns > best_rate:
                    best_rate = num_tokens / round_ns
                    best = Choice(depth, price, num_rows, round_ns / plain_ns)
        if best_rate <= rate:
            break
    return best


class LengthPolicy:
    """Of all sequences that one draft pool drafts for and the targets of one model verify, spread evenly over them."""

    def __init__(
        self, num_target_sequences: Callable[[], int] = lambda: 0, num_targets: Callable[[], int] = lambda: 1
    ) -> None:
        """`num_target_sequences`: on a target, other coordinators' included."""
        self.acceptance = PoolAcceptance()
        self.cost = RoundCost()
        self.probes = Probes()
        self._num_target_sequences = num_target_sequences
        self._num_targets = num_targets
        self._fill = Mean(1.0, 1)
        self._sequences: dict[int, AdaptiveLength] = {}
        self._choice = Choice(PROBE_LEN)
        self._num_news = 0

    @property
    def num_sequences(self) -> int:
        """On a target."""
        own = math.ceil(len(self._sequences) / max(1, self._num_targets()))
        return max(1, own, self._num_target_sequences())

    @property
    def choice(self) -> Choice:
        """Chosen anew once every sequence may have brought news, after a probe, or where their number has changed."""
        enough = len(self._sequences) if self._choice.depth else 1
        if self._sequences and self._num_news >= enough and self.cost.known:
            self._num_news = 0
            self._choice = best_choice(
                [sequence.survivals for sequence in self._sequences.values()],
                self.cost,
                self.num_sequences,
                fill=self._fill.value,
                margin=self.patience if self._choice.depth else ENTER,
                max_depth=min(MAX_DRAFT_TOKENS, self._choice.depth + MAX_GROWTH),
            )
            if self._choice.depth:
                self.probes.succeeded()
        return self._choice

    def gathered(self, num_tokens: int) -> int:
        """A sequence's length, where there are many the nearest of few; the longer of two as near."""
        if len(self._sequences) < MANY or not num_tokens:
            return num_tokens
        stops = (round(share * self._choice.depth) or 1 for share in STOPS)
        return min(stops, key=lambda stop: (abs(stop - num_tokens), -stop))

    @property
    def patience(self) -> float:
        """Drafting goes on down to this rate, relative to decoding alone: a few rounds may mislead."""
        return 1.0 - min(MAX_PATIENCE, PATIENCE_ROUNDS / max(1.0, self.acceptance.num_reached))

    def join(self, sequence: AdaptiveLength) -> None:
        self._sequences[id(sequence)] = sequence
        self._num_news = len(self._sequences)

    def leave(self, sequence: AdaptiveLength) -> None:
        self._sequences.pop(id(sequence), None)
        self.probes.release(sequence)
        self._num_news = len(self._sequences)

    def observe_round(self, num_asked: int, proposed: Proposed, verified: Tokens) -> None:
        """The workers' own times, and how much of what was asked for was proposed."""
        self._num_news += 1
        num_proposed = len(proposed.proposal.token_ids)
        self._fill.observe(min(1.0, num_proposed / num_asked), FILL_WEIGHT)
        self.cost.observe_step(verified.step_rows, verified.step_ns)
        self.cost.observe_draft(num_proposed, proposed.timings.forward_ns)

    def observe_token(self, tokens: Tokens) -> None:
        """Where others draft, it may be that all have come to decode alone."""
        self._num_news += self._choice.depth > 0
        self.cost.observe_step(tokens.step_rows, tokens.step_ns)

    def observe_wall(self, num_asked: int, wall_ns: int) -> None:
        """A round's whole time. Those of probes say nothing of rounds that all take part in, unless it is alone."""
        choice, num_sequences = self._choice, self.num_sequences
        if not choice.depth:
            self.cost.doubt(num_sequences)
        if choice.depth and choice.num_rows:
            self.cost.observe_round(num_sequences, choice.num_rows, choice.depth, wall_ns)
        elif num_sequences == 1:
            self.cost.observe_round(1, 1 + self._fill.value * num_asked, num_asked, wall_ns)


class Probes:
    """Who may draft while all others decode alone, and when. Times are sums over all sequences."""

    def __init__(self) -> None:
        self._holder: AdaptiveLength | None = None
        self._num_rounds = 0
        self._took_ns = 0
        self._wait_ns = 0.0
        self._backoff = 1

    def grant(self, sequence: AdaptiveLength) -> bool:
        """Whether `sequence` is the one that probes now."""
        if self._holder is None and self._wait_ns <= 0:
            self._holder, self._num_rounds, self._took_ns = sequence, 0, 0
            return True
        return self._holder is sequence

    def decoded(self, wall_ns: int) -> None:
        self._wait_ns -= wall_ns

    def round(self, sequence: AdaptiveLength, num_accepted: int, wall_ns: int) -> None:
        """A round of the sequence that probes."""
        if self._holder is not sequence:
            return
        self._num_rounds += 1
        self._took_ns += wall_ns
        if not num_accepted or self._num_rounds >= MAX_PROBE_ROUNDS:
            self.release(sequence)

    def release(self, sequence: AdaptiveLength) -> None:
        """The probe is over, and changed nothing."""
        if self._holder is sequence:
            self._holder = None
            self._wait_ns = self._backoff * self._took_ns / PROBE_SHARE
            self._backoff = min(2 * self._backoff, MAX_BACKOFF)

    def succeeded(self) -> None:
        """All draft now."""
        self._holder, self._wait_ns, self._backoff = None, 0.0, 1


class AdaptiveLength:
    """The choice for one sequence of a pool (DraftLength)."""

    def __init__(self, policy: LengthPolicy, max_draft_tokens: int) -> None:
        self._policy = policy
        self._max_draft_tokens = max_draft_tokens
        self._acceptance = SequenceAcceptance(policy.acceptance)
        self._survivals: list[float] | None = None
        self._decode = -1
        """The round of the present Decode; -1 where there is none."""
        self._in_rounds = False
        """Whether the last one was a round, so that the next one's time is that of a round."""
        self._joined = False

    @property
    def survivals(self) -> list[float]:
        if self._survivals is None:
            self._survivals = self._acceptance.survivals
        return self._survivals

    def choose(self, limit: int) -> int:
        limit = min(limit, self._max_draft_tokens)
        if limit <= 0:
            return 0
        if not self._joined:
            self._joined = True
            self._policy.join(self)
        choice = self._policy.choice
        if not choice.depth:
            return min(PROBE_LEN, limit) if self._policy.probes.grant(self) else 0
        worthy = [s for s in self.survivals[: choice.depth] if s > choice.price]
        if 1.0 + sum(worthy) < choice.slowdown * self._policy.patience / OPT_OUT:
            return 0
        return min(limit, self._policy.gathered(len(worthy)))

    def round(self, num_asked: int, proposed: Proposed, verified: Tokens, wall_ns: int) -> None:
        num_accepted = min(verified.num_accepted_tokens, num_asked)
        if not self._policy.choice.depth:
            self._policy.acceptance.discount(MAX_OLD_EVIDENCE)
        self._acceptance.observe(num_accepted, min(num_accepted + 1, num_asked))
        self._survivals = None
        self._policy.observe_round(num_asked, proposed, verified)
        if self._in_rounds:
            self._policy.observe_wall(num_asked, wall_ns)
        self._decode, self._in_rounds = -1, True
        self._policy.probes.round(self, num_accepted, wall_ns)

    def decoded(self, tokens: Tokens, wall_ns: int) -> None:
        if self._decode != tokens.identity.round:  # its time holds the way there, and perhaps a prefill
            self._decode, self._in_rounds = tokens.identity.round, False
            return
        policy, self._in_rounds = self._policy, False
        policy.observe_token(tokens)
        if not policy.choice.depth:
            policy.cost.observe_plain(policy.num_sequences, wall_ns)
            policy.probes.decoded(wall_ns)
        self._acceptance.fade(FADE)
        self._survivals = None

    def close(self) -> None:
        self._policy.leave(self)
