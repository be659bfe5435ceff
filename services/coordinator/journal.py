"""One generation's record on its way to the store.

Owns: a copy of the whole record, what of it is stored, and when its tokens may go out. Must not know: how writes travel
(services.coordinator.committer), generations, Redis.

    0 ........ durable_len ........ sent ........ len
      stored             in the write   gathering
                         under way
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.common.errors import OutriderError, Unavailable
from services.common.session_record import Commit, RecordLost, Restoration, Write, pack_token_ids, unpack_token_ids

if TYPE_CHECKING:
    from services.coordinator.committer import Committer

_TOKEN_BYTES = 4


@dataclass(slots=True)
class RecordCopy:
    """The record as its owner knows it: of all tokens, the prompt included, packed as the store has them."""

    packed_token_ids: bytearray = field(default_factory=bytearray)
    origins: bytearray = field(default_factory=bytearray)
    log_probs: bytearray = field(default_factory=bytearray)
    """Of the last generation only."""
    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, token_ids: Sequence[int], origins: bytes, log_probs: bytes, fields: Mapping[str, str]) -> RecordCopy:
        return cls(bytearray(pack_token_ids(token_ids)), bytearray(origins), bytearray(log_probs), dict(fields))

    def __len__(self) -> int:
        return len(self.origins)


class Journal:
    """One generation's writes, in order; everything that waits goes into one. After a refusal nothing more is written.

    Tokens go out when they are stored; or at once while the committer says that the store is away. Then they follow
    when it is back, and where it has lost the record, all of it is written again.
    """

    def __init__(self, committer: Committer, session_id: str, lease_epoch: int, copy: RecordCopy) -> None:
        """`copy` is what is stored now."""
        self._committer = committer
        self.session_id = session_id
        self._lease_epoch = lease_epoch
        self._copy = copy
        self._fields: dict[str, str] = {}
        self._unreleased: deque[tuple[int, Callable[[], None]]] = deque()
        self._in_flight = False
        self._sent_len = len(copy)
        self._sent_log_prob_bytes = self._stored_log_prob_bytes = len(copy.log_probs)
        self._is_lost = False
        self._is_refused = False
        self._waiters: list[asyncio.Future[None]] = []
        self.durable_len = len(copy)
        self.failure: OutriderError | None = None
        self.on_failure: Callable[[OutriderError], None] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to be written."""
        is_stored = self.durable_len == len(self._copy) and not self._fields and not self._is_lost
        return self._is_refused or (is_stored and not self._in_flight)

    def append(
        self,
        token_ids: Sequence[int],
        origins: bytes,
        log_probs: bytes,
        fields: Mapping[str, str],
        release: Callable[[], None],
    ) -> None:
        """Adds tokens and fields. Raises the journal's failure.

        `release` is called when the tokens may go out, in the order of the appends, and never after a failure.
        """
        if self.failure is not None:
            raise self.failure
        self._copy.packed_token_ids += pack_token_ids(token_ids)
        self._copy.origins += origins
        self._copy.log_probs += log_probs
        self._unreleased.append((len(self._copy), release))
        self._write(fields)

    def note(self, fields: Mapping[str, str]) -> None:
        """Adds fields alone; does nothing after a refusal."""
        if not self._is_refused:
            self._write(fields)

    async def drain(self) -> None:
        """Waits until all is stored, or the store is away. Raises the journal's failure."""
        await self.settle()
        if self.failure is not None:
            raise self.failure

    async def settle(self) -> None:
        """As `drain`, but does not raise: afterwards no write can arrive, unless the store was away."""
        while not (self.is_complete or self._committer.away):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    # --- For the committer: one write is under way at a time --------------------------------------------------------

    def take(self) -> Write:
        """What is to be written now: all that is not stored, or the whole record where that was lost."""
        fields, self._fields = self._fields, {}
        self._in_flight = True
        self._sent_len, self._sent_log_prob_bytes = len(self._copy), len(self._copy.log_probs)
        copy = self._copy
        if self._is_lost:
            values = bytes(copy.packed_token_ids), bytes(copy.origins), bytes(copy.log_probs)
            return Restoration(self.session_id, self._lease_epoch, *values, dict(copy.fields))
        return Commit(
            self.session_id,
            self._lease_epoch,
            self.durable_len,
            unpack_token_ids(bytes(copy.packed_token_ids[_TOKEN_BYTES * self.durable_len :])),
            bytes(copy.origins[self.durable_len :]),
            bytes(copy.log_probs[self._stored_log_prob_bytes :]),
            fields,
        )

    def answered(self, outcome: OutriderError | RecordLost | None) -> None:
        """The outcome of what was taken. Where the record was lost, it asks to be written again."""
        self._in_flight = False
        if isinstance(outcome, RecordLost):
            self._is_lost = True
            self._committer.ask(self)
        elif outcome is not None:
            self._is_refused = True
            self._fail(outcome)
        else:
            self._is_lost = False
            self.durable_len, self._stored_log_prob_bytes = self._sent_len, self._sent_log_prob_bytes
            self._release(self.durable_len)
        self._wake()

    def let_go(self) -> None:
        """The store is away: what waits may go out, and is written later."""
        self._release(len(self._copy))
        self._wake()

    def give_up(self, error: Unavailable) -> None:
        """The store is away, and the generation shall end there; what was added is written later all the same."""
        self._fail(error)
        self._wake()

    def _write(self, fields: Mapping[str, str]) -> None:
        self._copy.fields.update(fields)
        self._fields.update(fields)
        self._committer.ask(self)

    def _release(self, end: int) -> None:
        while self.failure is None and self._unreleased and self._unreleased[0][0] <= end:
            self._unreleased.popleft()[1]()

    def _fail(self, error: OutriderError) -> None:
        if self.failure is None:
            self.failure = error
            self._unreleased.clear()
            if self.on_failure is not None:
                self.on_failure(error)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
