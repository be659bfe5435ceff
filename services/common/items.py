"""The messages between a worker's servicer and its engine thread: items in, results out.

Owns: the shape of that seam. Must not know: the wire (services.common.wire translates), torch, queues.
The seam carries plain immutable values only, so that the engine may move to a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from services.common.errors import OutriderError
from services.common.values import Proposal, SamplingParams, TopLogProbs, VerificationMethod


@dataclass(frozen=True, slots=True)
class Identity:
    """Names the work an item belongs to. `base_len` = tokens committed, prompt included."""

    session_id: str
    lease_epoch: int
    attempt: int
    round: int
    base_len: int

    @property
    def generation(self) -> tuple[int, int]:
        """What is compared against the newest known: older work is refused."""
        return (self.lease_epoch, self.attempt)

    def at(self, base_len: int) -> Identity:
        return replace(self, base_len=base_len)


@dataclass(frozen=True, slots=True)
class Open:
    """Opens a sequence from its whole committed prefix (`identity.base_len` tokens, at least 1)."""

    identity: Identity
    prefix: tuple[int, ...]
    prompt_len: int
    eos_token_ids: frozenset[int]
    sampling: SamplingParams
    verification: VerificationMethod
    max_new_tokens: int
    log_probs: bool = False
    num_top_log_probs: int = 0
    fork: int = 0
    cache_salt: bytes = b""
    """Cached prefixes are shared only between sequences of the same salt."""
    traceparent: str = ""
    """The generation's trace (services.common.tracing); empty: it is not traced."""
    features: bool = False
    """Target only: its answers shall carry features."""


@dataclass(frozen=True, slots=True)
class Close:
    """Ends a sequence, of which `identity.base_len` tokens were committed. Unknown sequences are ignored."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Propose:
    """Asks a draft for at most `num_draft_tokens` tokens behind the commits. 0 only takes note of them, unanswered."""

    identity: Identity
    committed_tokens: tuple[int, ...]
    num_draft_tokens: int
    proposal_id: int
    parent_span_id: int = 0
    features: bytes = b""
    """Of the newest committed tokens, the newest last, as Tokens had them; for none or more tokens than these."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Asks the target to check a proposal. Answered by one Tokens with done=True."""

    identity: Identity
    proposal: Proposal
    parent_span_id: int = 0


@dataclass(frozen=True, slots=True)
class Decode:
    """Asks the target for `num_free_tokens` tokens without a draft, answered one by one; 0 interrupts a running one."""

    identity: Identity
    num_free_tokens: int
    parent_span_id: int = 0


def is_ending(item: Open | Propose | Verify | Decode | Close) -> bool:
    """A Close, or a Decode that interrupts: it always finds room, and has no answer, a refusal neither."""
    return isinstance(item, Close) or (isinstance(item, Decode) and not item.num_free_tokens)


DraftItem = Open | Propose | Close
TargetItem = Open | Verify | Decode | Close


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a worker's time for an item went. Filled by the engine; monotonic clock."""

    queue_ns: int = 0
    forward_ns: int = 0
    total_ns: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """Draft only: the prefix is processed."""

    identity: Identity
    timings: Timings = field(default_factory=Timings)
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Proposed:
    """Draft only: the answer to a Propose with num_draft_tokens > 0."""

    identity: Identity
    proposal: Proposal
    timings: Timings = field(default_factory=Timings)
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Target only: new tokens behind `identity.base_len`: accepted draft tokens first, then the target's own."""

    identity: Identity
    token_ids: tuple[int, ...]
    num_accepted_tokens: int
    num_draft_tokens: int
    done: bool
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[TopLogProbs, ...] = ()
    rows_replaced: bool = False
    timings: Timings = field(default_factory=Timings)
    num_cached_tokens: int = 0
    step_ns: int = 0
    step_rows: int = 0
    features: bytes = b""
    """float16: the final hidden state that each token was chosen from, one after the other. Empty: not known."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An item was refused; the stream goes on."""

    identity: Identity
    error: OutriderError
    timings: Timings = field(default_factory=Timings)


DraftResult = Opened | Proposed | Refused
TargetResult = Tokens | Refused
