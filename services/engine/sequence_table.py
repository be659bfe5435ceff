"""The sequences that are open on a worker, and the fence against work that newer work has overtaken.

Owns: which session has an open sequence, for which connection, and the newest generation known of each session. Must
not know: torch, blocks, what a sequence is waiting for. Shared by draft and target; used by the engine thread alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from services.common.errors import NEWEST_EPOCH, Aborted, InvalidArgument, ResourceExhausted
from services.common.items import Identity, Open
from services.common.values import LOGIT_BIAS_RANGE, MAX_TOP_LOG_PROBS, SAMPLING_RANGES, Range
from services.engine.sequence import Sequence

FENCE_TTL_NS = 600 * 10**9
MAX_FENCED_SESSIONS = 65_536
RETRY_AFTER_MS = 1000
"""What a worker without a free place asks its callers to wait."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker takes."""

    max_sequences: int
    max_sequence_len: int
    """Tokens of one sequence, prompt included."""
    max_draft_tokens: int
    vocab_size: int | None
    """None: any token id."""

    def check_token_ids(self, field: str, token_ids: Iterable[int]) -> None:
        """Raises InvalidArgument naming `field` where an id is outside the vocabulary."""
        size = 2**32 if self.vocab_size is None else self.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise InvalidArgument(
                    "INVALID_PARAMETER",
                    f"{field}: token id {token_id} is outside the vocabulary of {size}",
                    field=field,
                )

    def check_num_draft_tokens(self, field: str, num_tokens: int) -> None:
        """Raises InvalidArgument naming `field` and the limit."""
        if not 0 <= num_tokens <= self.max_draft_tokens:
            raise InvalidArgument(
                "INVALID_PARAMETER", f"{field}: {num_tokens} draft tokens, at most {self.max_draft_tokens}", field=field
            )

    def check_open(self, item: Open) -> None:
        """Raises InvalidArgument naming the field and the limit."""
        prefix_len = len(item.prefix)
        if not prefix_len:
            raise InvalidArgument("INVALID_PARAMETER", "prefix: at least one token is needed", field="prefix")
        if prefix_len >= self.max_sequence_len:
            raise InvalidArgument(
                "PROMPT_TOO_LONG",
                f"prefix: {prefix_len} tokens, at most {self.max_sequence_len - 1} leave room to generate",
                field="prefix",
            )
        if item.identity.base_len != prefix_len:
            raise InvalidArgument(
                "INVALID_PARAMETER",
                f"base_len: {item.identity.base_len}, but the prefix has {prefix_len} tokens",
                field="base_len",
            )
        if not 0 <= item.prompt_len <= prefix_len:
            raise InvalidArgument(
                "INVALID_PARAMETER",
                f"prompt_len: {item.prompt_len}, at most the prefix's {prefix_len}",
                field="prompt_len",
            )
        if item.max_new_tokens < 1:
            raise InvalidArgument(
                "INVALID_PARAMETER", f"max_new_tokens: {item.max_new_tokens}, at least 1", field="max_new_tokens"
            )
        _check("num_top_log_probs", item.num_top_log_probs, Range(0, MAX_TOP_LOG_PROBS))
        for name, allowed in SAMPLING_RANGES.items():
            _check(f"sampling.{name}", getattr(item.sampling, name), allowed)
        for token_id, bias in item.sampling.logit_bias:
            _check(f"sampling.logit_bias[{token_id}]", bias, LOGIT_BIAS_RANGE)
        self.check_token_ids("prefix", item.prefix)


def _check(field: str, value: float, allowed: Range) -> None:
    if not allowed.holds(value):
        raise InvalidArgument("INVALID_PARAMETER", f"{field}: {value} is not in {allowed}", field=field)


class Fence:
    """The newest generation known of each session, for 10 minutes after it was last noted; bounded, the oldest go."""

    def __init__(
        self,
        clock: Callable[[], int] = time.monotonic_ns,
        ttl_ns: int = FENCE_TTL_NS,
        max_sessions: int = MAX_FENCED_SESSIONS,
    ) -> None:
        self._clock = clock
        self._ttl_ns = ttl_ns
        self._max_sessions = max_sessions
        self._newest: OrderedDict[str, tuple[tuple[int, int], int]] = OrderedDict()

    def note(self, identity: Identity) -> None:
        """Remembers the identity's generation, unless a newer one is known."""
        newest = self.newest(identity.session_id)
        generation = identity.generation if newest is None else max(newest, identity.generation)
        self._newest[identity.session_id] = (generation, self._clock() + self._ttl_ns)
        self._newest.move_to_end(identity.session_id)
        if len(self._newest) > self._max_sessions:
            self._newest.popitem(last=False)

    def newest(self, session_id: str) -> tuple[int, int] | None:
        """The newest (lease_epoch, attempt) known of the session."""
        now = self._clock()
        while self._newest and next(iter(self._newest.values()))[1] <= now:
            self._newest.popitem(last=False)
        entry = self._newest.get(session_id)
        return entry[0] if entry else None


class Slot(Protocol):
    """A place in the table: a sequence and the connection that it ends with."""

    sequence: Sequence
    connection: int


S = TypeVar("S", bound=Slot)


class SequenceTable(Generic[S]):
    """Open sequences in the order of their opening, at most one a session."""

    def __init__(self, max_sequences: int, fence: Fence) -> None:
        self._max_sequences = max_sequences
        self._fence = fence
        self._slots: dict[str, S] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> list[S]:
        """Oldest first."""
        return list(self._slots.values())

    def check_room(self, identity: Identity) -> None:
        """Raises Aborted (STALE) where the session was opened as new or newer, ResourceExhausted where all is taken."""
        newest = self._newest(identity.session_id)
        if newest is not None and identity.generation <= newest:
            raise _stale(identity, newest)
        if identity.session_id not in self._slots and len(self._slots) >= self._max_sequences:
            raise ResourceExhausted(
                "QUEUE_FULL",
                f"{len(self._slots)} sequences are open, the limit is {self._max_sequences}",
                retry_after_ms=RETRY_AFTER_MS,
            )

    def add(self, slot: S) -> None:
        """Adds a sequence for whose identity `check_room` has passed, and whose older one is removed."""
        self._slots[slot.sequence.identity.session_id] = slot
        self._fence.note(slot.sequence.identity)

    def get(self, session_id: str) -> S | None:
        return self._slots.get(session_id)

    def find(self, identity: Identity, connection: int) -> S:
        """The open sequence that the item is for. Raises Aborted: STALE for older work, else UNKNOWN_SEQUENCE."""
        newest = self._newest(identity.session_id)
        if newest is not None and identity.generation < newest:
            raise _stale(identity, newest)
        slot = self._slots.get(identity.session_id)
        if slot is None or slot.sequence.identity.generation != identity.generation or slot.connection != connection:
            raise Aborted("UNKNOWN_SEQUENCE", "no such sequence is open on this stream; open it anew")
        return slot

    def remove(self, slot: S) -> None:
        """Takes the sequence out; its generation stays known for a while."""
        del self._slots[slot.sequence.identity.session_id]
        self._fence.note(slot.sequence.identity)

    def _newest(self, session_id: str) -> tuple[int, int] | None:
        slot = self._slots.get(session_id)
        return slot.sequence.identity.generation if slot else self._fence.newest(session_id)


def check_base_len(identity: Identity, num_tokens: int) -> None:
    """Raises Aborted (STALE) unless the item stands on exactly the tokens that the sequence has."""
    if identity.base_len != num_tokens:
        raise Aborted("STALE", f"base_len is {identity.base_len}, but the sequence has {num_tokens} tokens")


def check_max_len(identity: Identity, max_len: int) -> None:
    """Raises InvalidArgument naming the limit for more tokens than the sequence may have."""
    if identity.base_len > max_len:
        raise InvalidArgument(
            "INVALID_PARAMETER",
            f"base_len: {identity.base_len}, but the sequence has at most {max_len} tokens",
            field="base_len",
        )


def _stale(identity: Identity, newest: tuple[int, int]) -> Aborted:
    message = f"(lease_epoch, attempt) is {identity.generation}, but {newest} has been opened on this worker"
    return Aborted(
        "STALE", message, metadata={NEWEST_EPOCH: str(newest[0])} if newest[0] > identity.lease_epoch else {}
    )
