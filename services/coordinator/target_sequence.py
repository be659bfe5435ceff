"""One generation's sequence on a target worker: opened, verified, decoded, lost, and opened again, there or elsewhere.

Owns: the target's part of a generation's identity, and the bounds within which a lost target is waited for.
Must not know: drafts, trimming, the store, the client, which target is next (its route does). Nothing is replayed: a
reopened sequence starts from committed tokens, and whatever was in progress is asked for again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from services.common import wire
from services.common.errors import Aborted, DeadlineExceeded, OutriderError, ResourceExhausted, Unavailable
from services.common.items import Decode, Identity, Refused, TargetItem, TargetResult, Tokens, Verify
from services.common.values import Proposal
from services.coordinator.plan import GenerationPlan
from services.coordinator.route import Route
from services.coordinator.worker_link import Lane

log = logging.getLogger(__name__)

TargetRoute = Route[TargetItem, TargetResult]

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_MAX_LOSSES = 8
"""Losses in a row, without a token in between, after which a generation gives up."""


class TargetLost(Exception):
    """The sequence is gone from the worker; `reopen` and ask again. `error` is why."""

    def __init__(self, error: OutriderError) -> None:
        super().__init__(str(error))
        self.error = error


class TargetSequence:
    """`tokens` is the generation's own list of committed tokens; it only grows, and is only read here.

    One Verify or Decode is in progress at most. Methods that wait raise TargetLost, or an OutriderError that a new
    attempt would not mend.
    """

    def __init__(
        self, route: TargetRoute, plan: GenerationPlan, tokens: Sequence[int], *, timeout_s: float, retry_s: float
    ) -> None:
        self._route = route
        self._plan = plan
        self._tokens = tokens
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._lane: Lane[TargetItem, TargetResult] | None = None
        self._attempt = 0
        self._decoding = False
        self._interrupted = False
        self._num_losses = 0
        self._first_token_seen = False
        self.instance_id = ""
        """Of the worker that it was last opened on."""
        self.max_draft_tokens = 0
        """Of one Verify there."""
        self._max_free_tokens = 1
        self.round = -1
        """The newest round's number."""
        self.num_cached_tokens = 0

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def should_move(self) -> bool:
        """Whether the worker is to be left at the next round boundary, for another that would take the sequence."""
        return self._route.should_move

    def open(self) -> None:
        """Opens the sequence from the committed tokens. Raises Unavailable where no worker takes it now."""
        if not self._route.place() or (link := self._route.link) is None:
            raise Unavailable("NO_TARGET", "no target worker takes the sequence now", retry_after_ms=1000)
        self._attempt += 1
        self._decoding = False
        identity = self._identity()
        self._lane = link.open_lane(identity)
        if link.info is not None:
            self.instance_id, self.max_draft_tokens = link.info.instance_id, link.info.max_draft_tokens
            self._max_free_tokens = wire.max_free_tokens(link.info.max_sequences)
        self._lane.send(self._plan.target_open(identity, self._tokens))

    def move(self) -> None:
        """Closes the sequence, between two rounds, and opens it on another worker. Raises as `open`."""
        fields = self._plan.log_fields(self.round)
        log.info("session %s leaves the %s", self._plan.session_id, self._route.link, extra=fields)
        self._close_lane()
        self._route.leave()
        self.open()

    async def reopen(self, lost: TargetLost) -> None:
        """Opens the sequence anew: elsewhere at once, else as soon as a worker takes it. Raises why not, in the end."""
        self._num_losses += 1
        text, fields = "session %s lost its target, attempt %d: %s", self._plan.log_fields(self.round)
        log.info(text, self._plan.session_id, self._attempt, lost.error, extra=fields)
        self._close_lane()
        link = self._route.link
        self._route.lost(lost.error, certain=True)
        if self._num_losses > _MAX_LOSSES:
            raise lost.error
        if not self._route.place():
            if not self._first_token_seen and isinstance(lost.error, ResourceExhausted):
                raise lost.error
            await asyncio.sleep(self._backoff_s(lost.error if link and link.up else None))
            if not await self._route.wait(self._retry_s):
                raise self._route.hopeless or _no_target(lost.error)
        self.open()

    def _backoff_s(self, error: OutriderError | None) -> float:
        """Before a worker that has failed is tried again; `error` is that of a worker that still answers."""
        backoff_s = min(_FIRST_BACKOFF_S * 2.0 ** (self._num_losses - 1), _MAX_BACKOFF_S)
        wanted_s = (error.retry_after_ms or 0) / 1e3 if error else 0.0
        return max(backoff_s, min(wanted_s, _MAX_BACKOFF_S))

    async def verify(self, proposal: Proposal, parent_span_id: int = 0) -> Tokens:
        """The target's verdict on a proposal."""
        self._send(Verify(self._next_identity(), proposal, parent_span_id))
        return await self._receive()

    def begin_decode(self, num_free_tokens: int, parent_span_id: int = 0) -> None:
        """Asks for that many tokens, or for as many as may wait unread; `next_decoded` returns them as they come."""
        self._decoding, self._interrupted = True, False
        num_free_tokens = min(num_free_tokens, self._max_free_tokens)
        self._send(Decode(self._next_identity(), num_free_tokens, parent_span_id))

    async def next_decoded(self) -> Tokens:
        """The next of a Decode's answers; the one with `done` is the last."""
        tokens = await self._receive()
        if tokens.done:
            self._decoding = False
        return tokens

    def interrupt(self) -> None:
        """Ends a running Decode at the next token boundary; its last answer may then be without tokens."""
        if self._decoding and not self._interrupted:
            self._interrupted = True
            self._send(Decode(self._identity(), 0))

    def close(self) -> None:
        """Frees the sequence; only the committed tokens may stay cached. Nothing may be called afterwards."""
        self._close_lane()
        self._route.close()

    def _close_lane(self) -> None:
        if self._lane is not None:
            self._lane.close(self._identity())
            self._lane = None

    def _identity(self) -> Identity:
        return self._plan.identity(self._attempt, max(0, self.round), len(self._tokens))

    def _next_identity(self) -> Identity:
        self.round += 1
        return self._identity()

    def _send(self, item: TargetItem) -> None:
        if self._lane is not None:
            self._lane.send(item)

    async def _receive(self) -> Tokens:
        if self._lane is None:
            raise TargetLost(Unavailable("NO_TARGET", "the sequence is not open", retry_after_ms=1000))
        try:
            result = await self._lane.receive(self._timeout_s)
        except (Unavailable, DeadlineExceeded) as error:
            raise TargetLost(error) from error
        if isinstance(result, Refused):
            raise _refusal(result.error)
        if result.token_ids:
            self._num_losses, self._first_token_seen = 0, True
            self._route.succeeded()
        self.num_cached_tokens = result.num_cached_tokens
        return result


def _no_target(error: OutriderError) -> Unavailable:
    return Unavailable("NO_TARGET", f"no target worker: {error}", retry_after_ms=1000)


def _refusal(error: OutriderError) -> Exception:
    """What a refusal means: the sequence is lost where opening it anew may help."""
    if error.reason == "STALE":
        message = f"the target knows a newer owner of the session: {error}"
        return Aborted("OWNERSHIP_LOST", message, metadata=error.metadata)
    if error.reason == "UNKNOWN_SEQUENCE" or error.retry_after_ms or isinstance(error, Unavailable):
        return TargetLost(error)
    return error
