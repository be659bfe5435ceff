"""The seam between the draft worker's core and the ways to propose tokens.

Owns: `Draft`, the state of one sequence's proposal, and the `Drafter` protocol. Must not know: torch, the wire, clocks.

    draft.sequence.tokens   0 .... sequence.num_committed .... len(tokens)
                            [  committed  )[     drafted     )
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from services.common.values import ModelInfo, Proposal, SparseRow
from services.engine.block_manager import BlockManager
from services.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Draft:
    """One open sequence on the draft worker. The core commits and requests, the drafter adds tokens."""

    sequence: Sequence
    awaited: bool = True
    """Somebody waits: for the prefix to be processed, or for a proposal."""
    num_missing_tokens: int = 0
    """Tokens still to be drafted for the proposal in progress."""
    rows: list[SparseRow | None] = field(default_factory=list)
    """Of the drafted tokens."""
    features: bytes = b""
    """What the target told with the newest commit (services.common.items.Propose); most drafters have no use for it."""
    deferred: bool = False
    """Nothing need be computed for it before tokens are missing (drafters.fallback)."""

    @property
    def drafted(self) -> tuple[int, ...]:
        return tuple(self.sequence.tokens[self.sequence.num_committed :])

    def request(self, num_tokens: int) -> None:
        """Starts a proposal of at most `num_tokens` tokens behind the committed ones.

        The last token of the budget is never drafted: the target adds one of its own to whatever it accepts.
        """
        self.num_missing_tokens = max(0, min(num_tokens, self.sequence.num_remaining_tokens - 1))

    def add(self, token_id: int, row: SparseRow | None = None) -> None:
        """Appends a drafted token and the distribution it was drawn from. An end-of-sequence token is the last one."""
        self.sequence.tokens.append(token_id)
        self.rows.append(row)
        self.num_missing_tokens -= 1
        if token_id in self.sequence.eos_token_ids:
            self.end()

    def end(self) -> None:
        """The drafter has no more to say in this proposal."""
        self.num_missing_tokens = 0

    def commit(self, token_ids: tuple[int, ...]) -> int:
        """Replaces what was drafted by the tokens committed; returns how many of the sequence's tokens stay."""
        num_same = 0
        for drafted, committed in zip(self.drafted, token_ids, strict=False):
            if drafted != committed:
                break
            num_same += 1
        num_kept = self.sequence.num_committed + num_same
        self.sequence.tokens[num_kept:] = token_ids[num_same:]
        self.sequence.confirm(len(self.sequence))
        self.rows.clear()
        self.end()
        return num_kept

    def proposal(self, proposal_id: int) -> Proposal:
        """What has been drafted. Without rows where no token has one."""
        rows = tuple(self.rows) if any(row is not None for row in self.rows) else None
        return Proposal(proposal_id, self.drafted, rows)


class Pool(NamedTuple):
    """A KV pool and all sequences that may hold blocks of it."""

    blocks: BlockManager
    sequences: list[Sequence]


class Drafter(Protocol):
    """A way to propose tokens. Called by the engine thread alone.

    Order of calls for a draft: `open` once; then, any number of times, `commit` followed by requests and steps; `close`
    once. Between `open` and `close` the draft is in the list of every step. A drafter appends tokens only in steps, by
    `Draft.add`, and only to drafts with num_missing_tokens > 0. It ends a proposal early by `Draft.end`, never because
    of which token it sampled (that would bias rejection). Proposals may be wrong, never invalid: ids are of the
    target's vocabulary.
    """

    @property
    def kind(self) -> str:
        """As services.common.drafters names it; a chain's names are joined by commas."""
        ...

    @property
    def info(self) -> ModelInfo | None:
        """The model; None for a drafter that proposes ids of whatever sequence it is given."""
        ...

    @property
    def blocks(self) -> BlockManager | None:
        """The KV pool that the drafts' sequences take their blocks from; None for a drafter without."""
        ...

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        """Every KV pool of the drafter's, `drafts` being all that are open."""
        ...

    def open(self, draft: Draft) -> None:
        """A new draft; its sequence holds the prefix."""
        ...

    def commit(self, draft: Draft, num_kept: int) -> None:
        """The sequence's tokens at `num_kept` and behind were replaced or cut.

        All are committed now, except where another drafter's uncommitted tokens stand at the end (drafters.staged).
        """
        ...

    def close(self, draft: Draft) -> None:
        """Frees what is held for the draft."""
        ...

    def is_ready(self, draft: Draft) -> bool:
        """Whether the prefix is processed, so that the next token costs no more than a step."""
        ...

    def has_work(self, drafts: list[Draft]) -> bool:
        """Whether a step would get anything done."""
        ...

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """Computes one device step for `drafts`, all that are open, oldest first. Returns those that took part."""
        ...
