"""How a coordinator and its workers are doing, for operators.

Owns: asking the workers, and adding up what the coordinator counted. Must not know: protobuf, who wants to know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.common.errors import OutriderError
from services.common.tally import CallTally
from services.common.values import WorkerInfo
from services.coordinator.placement import WorkerView
from services.coordinator.tally import CoordinatorTally

DESCRIBE_S = 1.0
SERVER_FAILURES = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNKNOWN")
"""Codes of calls that failed for reasons that the caller has no part in."""


@dataclass(frozen=True, slots=True)
class CoordinatorActivity:
    """As in CoordinatorActivity of the wire contract."""

    num_calls: int
    num_failed_calls: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_rounds: int
    num_plain_rounds: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    cpu_ns: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker and what it told of itself: just now while it is up, else when it was last connected."""

    view: WorkerView
    info: WorkerInfo | None


class StatusReader:
    """Of one coordinator, from its start on."""

    def __init__(
        self,
        instance_id: str,
        tally: CoordinatorTally,
        calls: CallTally,
        workers: Callable[[], tuple[WorkerView, ...]],
    ) -> None:
        self.instance_id = instance_id
        self._tally = tally
        self._calls = calls
        self._workers = workers
        self._started_s = time.monotonic()

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started_s

    async def workers(self) -> list[WorkerStatus]:
        """Asks all that are up at the same time; who does not answer within DESCRIBE_S is shown as it last was."""
        return list(await asyncio.gather(*[_describe(view) for view in self._workers()]))

    def activity(self) -> CoordinatorActivity:
        """What the coordinator has done until now."""
        tallies = [tally for _, tally in self._tally.kinds]
        calls = list(self._calls.counts.items())
        return CoordinatorActivity(
            num_calls=sum(count for _, count in calls),
            num_failed_calls=sum(count for kind, count in calls if kind.code in SERVER_FAILURES),
            num_prompt_tokens=sum(tally.num_prompt_tokens for tally in tallies),
            num_generated_tokens=sum(tally.num_generated_tokens for tally in tallies),
            num_rounds=sum(tally.num_rounds for tally in tallies),
            num_plain_rounds=sum(tally.num_plain_rounds for tally in tallies),
            num_drafts=sum(tally.num_drafts for tally in tallies),
            num_draft_tokens=sum(tally.num_draft_tokens for tally in tallies),
            num_accepted_tokens=sum(tally.num_accepted_tokens for tally in tallies),
            cpu_ns=time.process_time_ns(),
        )


async def _describe(view: WorkerView) -> WorkerStatus:
    try:
        return WorkerStatus(view, await view.link.describe(DESCRIBE_S))
    except OutriderError:
        return WorkerStatus(view, view.link.info)
