"""How likely the target is to accept the token at each position of a proposal.

Owns: the estimates. Must not know: clocks, costs, who asks. Pure.

alpha_i is the conditional acceptance: accepted at position i over reached there, everything before being accepted.
Positions behind the first rejection were never reached: they are censored, not rejected. A proposal that is shorter
than asked for, and accepted as a whole, counts as a failure of the position it lacks: asking further would not have
brought more.

    pool        alpha_i = (accepted_i + w * alpha_(i-1)) / (reached_i + w),      alpha_0 = PRIOR
    sequence    alpha_i = (accepted_i + m * base_i) / (reached_i + m),           base_i = alpha_i of the pool * rho
    rho         (all its accepted + m) / (what the pool's alphas expect of its reached positions + m)

so that a sequence without evidence is as its pool, a position without evidence as the one before it, and a sequence
that does better or worse than its pool is expected to do so at deeper positions too.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

from services.common.values import MAX_DRAFT_TOKENS

PRIOR = 0.5
POOL_WEIGHT = 2.0
"""w: observations that the position before counts for."""
SEQUENCE_WEIGHT = 8.0
"""m: observations that the pool counts for."""
POOL_WINDOW = 512.0
NEWS_SHARE = 1.0 / 32.0
"""Part of the pool's evidence that may be newer than its estimate, which all sequences ask for in every round."""
SEQUENCE_WINDOW = 48.0
"""Observations of a position after which older ones have lost most of their weight."""
MAX_ALPHA = 0.995


class Evidence:
    """Reached and accepted at each position; the older, the less they count."""

    def __init__(self, window: float) -> None:
        self.reached = [0.0] * MAX_DRAFT_TOKENS
        self.accepted = [0.0] * MAX_DRAFT_TOKENS
        self._keep = 1.0 - 1.0 / window

    def observe(self, num_accepted: int, num_reached: int) -> None:
        """A round; `num_reached` is `num_accepted`, or one more where it did not end by itself."""
        for i in range(num_reached):
            self.reached[i] = self._keep * self.reached[i] + 1.0
            self.accepted[i] = self._keep * self.accepted[i] + (i < num_accepted)

    def discount(self, share: float) -> None:
        """Forgets all but a share of it."""
        self.reached = [share * count for count in self.reached]
        self.accepted = [share * count for count in self.accepted]


class PoolAcceptance:
    """Of all sequences that one draft pool drafts for."""

    def __init__(self) -> None:
        self._evidence = Evidence(POOL_WINDOW)
        self._alphas: list[float] | None = None
        self._num_news = 0

    @property
    def num_reached(self) -> float:
        """Rounds that the estimate of the first position rests on."""
        return self._evidence.reached[0]

    @property
    def alphas(self) -> list[float]:
        """By position, from the first."""
        if self._alphas is None:
            self._alphas, alpha, self._num_news = [], PRIOR, 0
            for reached, accepted in zip(self._evidence.reached, self._evidence.accepted, strict=True):
                alpha = (accepted + POOL_WEIGHT * alpha) / (reached + POOL_WEIGHT)
                self._alphas.append(alpha)
        return self._alphas

    def observe(self, num_accepted: int, num_reached: int) -> None:
        self._evidence.observe(num_accepted, num_reached)
        self._num_news += 1
        if self._num_news > NEWS_SHARE * self.num_reached:
            self._alphas = None

    def discount(self, max_reached: float) -> None:
        """Forgets so much that news counts: at most `max_reached` observations of the first position are left."""
        if self.num_reached > max_reached:
            self._evidence.discount(max_reached / self.num_reached)
            self._alphas = None


class SequenceAcceptance:
    """Of one sequence, shrunk toward its pool."""

    def __init__(self, pool: PoolAcceptance) -> None:
        self._pool = pool
        self._evidence = Evidence(SEQUENCE_WINDOW)

    def observe(self, num_accepted: int, num_reached: int) -> None:
        """A round of this sequence; the pool learns of it too."""
        self._evidence.observe(num_accepted, num_reached)
        self._pool.observe(num_accepted, num_reached)

    def fade(self, share: float) -> None:
        """Forgets all but a share of it, and becomes more like the pool."""
        self._evidence.discount(share)

    @property
    def alphas(self) -> list[float]:
        pool, reached, accepted = self._pool.alphas, self._evidence.reached, self._evidence.accepted
        expected = sum(map(mul, pool, reached))
        rho = (sum(accepted) + SEQUENCE_WEIGHT) / (expected + SEQUENCE_WEIGHT)
        return [
            min(MAX_ALPHA, (a + SEQUENCE_WEIGHT * min(MAX_ALPHA, alpha * rho)) / (r + SEQUENCE_WEIGHT))
            for alpha, r, a in zip(pool, reached, accepted, strict=True)
        ]

    @property
    def survivals(self) -> list[float]:
        """Probability that the first k tokens of a proposal are accepted, from k = 1."""
        return list(accumulate(self.alphas, mul))
