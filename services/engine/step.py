"""The seam between a worker's core (which sequences, how many rows) and the model that computes a step.

Owns: the values of one step and the two protocols. Must not know: torch, the wire.
Two implementations of each protocol: services.engine.paged_model (torch, real weights) and services.engine.simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from services.common.errors import OutriderError
from services.common.values import ModelInfo, Proposal, SparseRow, TopLogProbs
from services.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step.

    Computed are the tokens at [sequence.num_cached, sequence.num_cached + num_new_tokens), then those of `proposal`.
    The core has made sure that the block table has room for all of them. Where `num_rows` > 0 the last `num_rows`
    computed positions yield logits: row r belongs to the token at absolute index `len(sequence.tokens) + r`, so the
    chunk must reach the end of `sequence.tokens`, and num_rows = 1 + len(proposal.token_ids).
    """

    sequence: Sequence
    num_new_tokens: int
    """At least 1: the last committed token's row is always computed."""
    proposal: Proposal | None = None
    num_rows: int = 0
    """0: prefill only, no token comes of it."""

    @property
    def drafted(self) -> tuple[int, ...]:
        return self.proposal.token_ids if self.proposal else ()

    @property
    def num_computed_tokens(self) -> int:
        return self.num_new_tokens + len(self.drafted)


class Verdict(NamedTuple):
    """What verification made of a Work with rows: accepted draft tokens, then the target's own.

    The target's own is missing only where acceptance ended at an end-of-sequence token or at the remaining budget.
    """

    token_ids: tuple[int, ...]
    num_accepted_tokens: int
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[TopLogProbs, ...] = ()
    rows_replaced: bool = False
    rows: tuple[SparseRow | None, ...] = ()
    """Where a draft verified another one's tokens (drafters.staged): what the tokens are distributed as; () = none."""
    features: bytes = b""
    """float16, one row a token: the hidden state it was chosen from, where the sequence asks and the model has it."""


class Sampled(NamedTuple):
    """A drafted token and the distribution it was drawn from (rejection only; None = point mass)."""

    token_id: int
    row: SparseRow | None


class TargetModel(Protocol):
    """Computes a step of the target. Called by the engine thread only.

    `step` writes keys and values of every computed token into the blocks of its sequence and returns one entry a Work,
    in order: a Verdict where num_rows > 0, else None; an error where that sequence alone has none, or its prefill
    failed, and must end without its cache being shared. It changes no Sequence: the core appends tokens, sets
    num_cached and truncates. The cost may depend on the batch; the tokens must not (floating point apart).
    """

    @property
    def info(self) -> ModelInfo: ...

    def step(self, works: list[Work]) -> list[Verdict | OutriderError | None]: ...


class DraftModel(Protocol):
    """Computes a step of the draft: as TargetModel, but num_rows is 0 or 1, `proposal` is None (the core appends
    drafted tokens to the sequence itself), and a Work with a row yields one sampled token, or None where that row ends
    the proposal. Whether it does must not depend on what would be sampled from it."""

    @property
    def info(self) -> ModelInfo: ...

    def step(self, works: list[Work]) -> list[Sampled | None]: ...
