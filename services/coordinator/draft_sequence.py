"""One generation's sequence on a draft worker: opened, told of commits, asked for proposals, lost, and opened again.

Owns: what the draft has been told, and when to try again. Must not know: verification, the store, the client, which
draft is next (its route does). A draft is only a hint: nothing here raises because of the draft, and nothing waits for
it but `propose`. While another draft is being opened, the target decodes alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TypeGuard

from services.common.errors import DeadlineExceeded, InvalidArgument, OutriderError
from services.common.items import DraftItem, DraftResult, Opened, Propose, Proposed, Refused
from services.common.values import Proposal, WorkerInfo
from services.coordinator.feature_relay import FeatureRelay
from services.coordinator.plan import GenerationPlan
from services.coordinator.propose_deadline import ProposeDeadline
from services.coordinator.route import Route
from services.coordinator.worker_link import Lane

log = logging.getLogger(__name__)

DraftRoute = Route[DraftItem, DraftResult]

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_NOTE_LEN = 16
"""Commits are told to a draft that is not proposing in portions of this many tokens."""


class DraftSequence:
    """`tokens` is the generation's own list of committed tokens; it only grows, and is only read here.

    `on_ready` is called when the draft becomes ready to propose, possibly many times. Without a route it never does.
    """

    def __init__(
        self,
        route: DraftRoute | None,
        plan: GenerationPlan,
        tokens: Sequence[int],
        *,
        deadline: ProposeDeadline,
        on_ready: Callable[[], None],
    ) -> None:
        self._route = route
        self._plan = plan
        self._tokens = tokens
        self._deadline = deadline
        self._on_ready = on_ready
        self._lane: Lane[DraftItem, DraftResult] | None = None
        self._ready = False
        self._attempt = 0
        self._round = 0
        self._told_len = 0
        self._num_proposals = 0
        self._backoff_s = _FIRST_BACKOFF_S
        self._retry: asyncio.TimerHandle | None = None
        self._info: WorkerInfo | None = None
        """Of the worker that it was last opened on."""
        self.num_cached_tokens = 0
        self.features = FeatureRelay()
        """Of the newest committed tokens; the generation adds what the target tells."""

    @property
    def wanted(self) -> bool:
        """Whether this generation uses a draft at all."""
        return self._route is not None

    @property
    def ready(self) -> bool:
        """Whether a proposal would be quick."""
        return self._ready

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def instance_id(self) -> str:
        return self._info.instance_id if self._info else ""

    def open(self) -> None:
        """Opens the sequence where a worker takes it, else tries again later."""
        self._retry = None
        if self._route is None:
            return
        link = self._route.link if self._route.place() else None
        if link is None or link.info is None or not link.up:
            self._try_later()
            return
        self._info = link.info
        if self._is_outgrown(link.info):
            self.close()
            return
        self._attempt += 1
        identity = self._plan.identity(self._attempt, self._round, len(self._tokens))
        self._lane = link.open_lane(identity)
        self._lane.on_result, self._lane.on_broken = self._on_result, self._lose
        self._lane.send(self._plan.draft_open(identity, self._tokens, link.info.max_sequence_len))
        self._told_len = len(self._tokens)
        self.features.rewind()

    async def propose(self, round_number: int, num_draft_tokens: int, parent_span_id: int = 0) -> Proposed | None:
        """At most `num_draft_tokens` valid tokens behind the committed ones.

        None if the draft is late, lost, refuses, sends what is no such proposal, or is too short for the sequence.
        """
        self._close_if_outgrown()
        self._move_if_draining()
        lane, info = self._lane, self._info
        if lane is None or info is None or not self._ready:
            return None
        num_draft_tokens = min(num_draft_tokens, info.max_draft_tokens)
        self._round = round_number
        self._tell(num_draft_tokens, parent_span_id)
        started_s = asyncio.get_running_loop().time()
        try:
            while True:
                result = await lane.receive(self._deadline.seconds(num_draft_tokens))
                if isinstance(result, Refused):
                    raise result.error
                if self._is_awaited(result):
                    self._check(result.proposal, num_draft_tokens)
                    self._deadline.arrived(num_draft_tokens, asyncio.get_running_loop().time() - started_s)
                    self._succeeded()
                    self.num_cached_tokens = result.num_cached_tokens
                    return result
        except OutriderError as error:
            if isinstance(error, DeadlineExceeded):
                self._deadline.was_late()
            if self._lane is lane:  # else the broken stream has told already
                self._lose(error)
        return None

    def note_commits(self, round_number: int) -> None:
        """While the target decodes alone: tells the draft of commits now and then, so that it can catch up."""
        self._round = round_number
        self._close_if_outgrown()
        self._move_if_draining()
        if self._lane is not None and len(self._tokens) - self._told_len >= _NOTE_LEN:
            self._tell(0)

    def close(self) -> None:
        """Frees the sequence. Nothing is called back afterwards."""
        self._drop()
        if self._route is not None:
            self._route.close()
            self._route = None

    def _tell(self, num_draft_tokens: int, parent_span_id: int = 0) -> None:
        if self._lane is None:
            return
        self._num_proposals += 1
        base_len = len(self._tokens)
        committed = tuple(self._tokens[self._told_len :])
        identity = self._plan.identity(self._attempt, self._round, base_len)
        features = self.features.take()
        self._lane.send(Propose(identity, committed, num_draft_tokens, self._num_proposals, parent_span_id, features))
        self._told_len = base_len

    def _on_result(self, result: DraftResult) -> bool:
        if isinstance(result, Opened):
            self.num_cached_tokens = result.num_cached_tokens
            self._ready = True
            self._on_ready()
            return True
        waiting = self._lane is not None and self._lane.waiting
        if isinstance(result, Refused) and not waiting:
            self._lose(result.error)  # of the Open, or of a note of commits
            return True
        return isinstance(result, Proposed) and not (waiting and self._is_awaited(result))

    def _is_awaited(self, result: DraftResult) -> TypeGuard[Proposed]:
        return isinstance(result, Proposed) and result.proposal.proposal_id == self._num_proposals

    def _check(self, proposal: Proposal, num_draft_tokens: int) -> None:
        """Raises InvalidArgument for what the target would refuse."""
        if len(proposal.token_ids) > num_draft_tokens:
            raise InvalidArgument(
                "INVALID_PARAMETER", f"the draft proposed {len(proposal.token_ids)} tokens, not {num_draft_tokens}"
            )
        if any(token_id >= self._plan.vocab_size for token_id in proposal.token_ids):
            raise InvalidArgument("INVALID_PARAMETER", "the draft proposed a token outside the target's vocabulary")

    def _is_outgrown(self, info: WorkerInfo) -> bool:
        """Whether the draft can propose nothing more: behind a proposal there must be room for a token."""
        return info.max_sequence_len < len(self._tokens) + 2

    def _close_if_outgrown(self) -> None:
        if self._lane is not None and self._info is not None and self._is_outgrown(self._info):
            self.close()

    def _move_if_draining(self) -> None:
        if self._lane is not None and self._route is not None and self._route.should_move:
            log.info("session %s leaves the %s", self._plan.session_id, self._route.link)
            self._drop()
            self._route.leave()
            self.open()

    def _lose(self, error: OutriderError) -> None:
        """Goes on without; another draft is tried at once, those that have failed after a while."""
        log.info(
            "session %s decodes without a draft for now: %s",
            self._plan.session_id,
            error,
            extra=self._plan.log_fields(self._round),
        )
        self._drop()
        if self._route is None:
            return
        self._route.lost(error)
        if self._route.place():
            self._retry = asyncio.get_running_loop().call_later(0, self.open)
        else:
            self._try_later()

    def _succeeded(self) -> None:
        self._backoff_s = _FIRST_BACKOFF_S
        if self._route is not None:
            self._route.succeeded()

    def _drop(self) -> None:
        lane, self._lane, self._ready = self._lane, None, False
        if lane is not None:
            lane.on_result = lane.on_broken = None
            lane.close(self._plan.identity(self._attempt, self._round, len(self._tokens)))
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _try_later(self) -> None:
        if self._route is not None:
            self._retry = asyncio.get_running_loop().call_later(self._backoff_s, self._open_anywhere)
            self._backoff_s = min(2 * self._backoff_s, _MAX_BACKOFF_S)

    def _open_anywhere(self) -> None:
        if self._route is not None:
            self._route.forgive()
        self.open()
