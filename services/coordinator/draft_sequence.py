"""One generation's sequence on a draft worker: opened, told of commits, asked for proposals, lost, and opened again.

Owns: what the draft has been told, and when to try again. Must not know: verification, the store, the client, which
draft is next (its route does). A draft is only a hint: nothing here raises because of the draft, and nothing waits for
it but `propose`, no longer than the round is worth. While a late proposal is under way, a slow worker is on trial, or
another draft is being opened, the target decodes alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from services.common.errors import DeadlineExceeded, InvalidArgument, OutriderError
from services.common.items import DraftItem, DraftResult, Opened, Propose, Proposed, Refused
from services.common.values import Proposal, WorkerInfo
from services.coordinator.feature_relay import FeatureRelay
from services.coordinator.plan import GenerationPlan
from services.coordinator.propose_deadline import Asked, DraftPace, ProposeDeadline
from services.coordinator.route import Route
from services.coordinator.worker_link import Lane

log = logging.getLogger(__name__)

DraftRoute = Route[DraftItem, DraftResult]

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_NOTE_LEN = 16
"""Commits are told to a draft that is not proposing in portions of this many tokens."""
_LATE = DeadlineExceeded("DEADLINE", "the draft is too slow for what its rounds are worth")
_TRIAL_LEN = 4
"""Most tokens of a proposal that only tells how long it took, where none was asked for in earnest."""


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
        self._opened = False
        self._asked: Asked | None = None
        self._attempt = 0
        self._round = 0
        self._told_len = 0
        self._num_proposals = 0
        self._num_draft_tokens = max(1, min(_TRIAL_LEN, plan.num_draft_tokens))
        """That were asked for last."""
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
        return self._opened and self._asked is None and self._pace.in_use

    @property
    def _pace(self) -> DraftPace:
        """The worker's."""
        return self._deadline.pace(self.instance_id)

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
        self._num_draft_tokens = min(self._num_draft_tokens, link.info.max_draft_tokens)
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
        if lane is None or info is None or not self.ready:
            return None
        self._round, self._num_draft_tokens = round_number, min(num_draft_tokens, info.max_draft_tokens)
        asked = self._ask(parent_span_id=parent_span_id)
        try:
            while True:
                result = await lane.receive(self._deadline.patience_s(asked.num_draft_tokens))
                if isinstance(result, Refused):
                    raise result.error
                if isinstance(result, Proposed) and result.proposal.proposal_id == asked.proposal_id:
                    self._arrived(asked, result)
                    return result
        except DeadlineExceeded:
            self._be_late(asked)
        except OutriderError as error:
            if self._lane is lane:  # else the broken stream has told already
                self._lose(error)
        return None

    def note_commits(self, round_number: int) -> None:
        """While the target decodes alone, for each token: tells the draft of commits now and then, so that it can catch
        up, and tries a slow one."""
        self._round = round_number
        self._close_if_outgrown()
        self._move_if_draining()
        if self._lane is None:
            return
        if self._opened and self._asked is None and self._pace.begin_trial(_now_s()):
            self._ask(trial=True)
        elif self._is_silent:
            self._lose(_LATE)
        elif self._asked is None and len(self._tokens) - self._told_len >= _NOTE_LEN:
            self._tell(0)

    def close(self) -> None:
        """Frees the sequence. Nothing is called back afterwards."""
        self._drop()
        if self._route is not None:
            self._route.close()
            self._route = None

    def _ask(self, *, trial: bool = False, parent_span_id: int = 0) -> Asked:
        self._tell(self._num_draft_tokens, parent_span_id)
        self._asked = Asked(self._num_proposals, self._num_draft_tokens, self._pace, _now_s(), trial)
        return self._asked

    def _be_late(self, asked: Asked) -> None:
        """Goes on without; the answer, when it comes, tells how long it took."""
        fields = self._plan.log_fields(self._round)
        log.info("session %s decodes while the draft %s is late", self._plan.session_id, self.instance_id, extra=fields)
        if self._deadline.is_lost(asked, _now_s()):
            self._lose(_LATE)

    def _arrived(self, asked: Asked, result: Proposed) -> None:
        """The answer to what was asked. Raises InvalidArgument for what the target would refuse."""
        self._asked = None
        timely = self._deadline.answered(asked, _now_s())
        self._check(result.proposal, asked.num_draft_tokens)
        self.num_cached_tokens = result.num_cached_tokens
        if timely:
            self._succeeded()

    def _arrived_unawaited(self, asked: Asked, result: Proposed) -> None:
        """What it proposes is of no use any more: the target has gone on.

        A draft that is always slow is left for another by one sequence for each trial: all at once would only move the
        load.
        """
        try:
            self._arrived(asked, result)
        except OutriderError as error:
            self._lose(error)
            return
        if asked.trial and asked.pace.is_habitual and self._has_other:
            self._lose(_LATE)
        elif self.ready:
            self._on_ready()

    @property
    def _is_silent(self) -> bool:
        """Whether what was asked is not to be expected any more, or better asked of another draft."""
        if (asked := self._asked) is None:
            return False
        now_s = _now_s()
        return self._deadline.is_lost(asked, now_s) or (self._deadline.is_overdue(asked, now_s) and self._has_other)

    @property
    def _has_other(self) -> bool:
        return self._route is not None and self._route.has_other

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
            self._opened = True
            self._on_ready()
            return True
        if self._lane is not None and self._lane.waiting:
            return isinstance(result, Proposed) and not self._is_asked_for(result)
        if isinstance(result, Refused):
            self._lose(result.error)  # of the Open, of a note of commits, or of a trial
        elif self._asked is not None and self._is_asked_for(result):
            self._arrived_unawaited(self._asked, result)
        return True

    def _is_asked_for(self, result: Proposed) -> bool:
        return self._asked is not None and result.proposal.proposal_id == self._asked.proposal_id

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
        lane, self._lane, self._opened = self._lane, None, False
        asked, self._asked = self._asked, None
        if asked is not None and asked.trial:
            asked.pace.end_trial(_now_s())
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


def _now_s() -> float:
    return asyncio.get_running_loop().time()
