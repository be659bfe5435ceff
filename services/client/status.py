"""How a coordinator and its workers are doing, as operators see it.

Owns: the values, and their conversion from messages. Must not know: calls, how it is shown.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from outrider.v1 import coordinator_pb2

from services.client.values import DraftPool
from services.client.wire import pool_from_proto
from services.common import wire
from services.common.values import WorkerInfo


@dataclass(frozen=True, slots=True)
class CoordinatorActivity:
    """What a coordinator has done since its start; who wants a rate compares two of them."""

    num_calls: int = 0
    num_failed_calls: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_rounds: int = 0
    num_plain_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    cpu_ns: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker as a coordinator sees it. `info` is fresh while it is up, else from its last connection, if any."""

    role: str
    address: str
    pool: str
    up: bool
    trouble: str
    info: WorkerInfo | None


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A coordinator and its workers at one moment."""

    instance_id: str
    uptime_s: float
    draining: bool
    num_requests_running: int
    num_requests_waiting: int
    activity: CoordinatorActivity
    workers: tuple[WorkerStatus, ...]
    drafts: tuple[DraftPool, ...]


def status_from_proto(message: coordinator_pb2.GetClusterStatusResponse) -> ClusterStatus:
    activity = {field.name: getattr(message.activity, field.name) for field in dataclasses.fields(CoordinatorActivity)}
    return ClusterStatus(
        instance_id=message.instance_id,
        uptime_s=message.uptime_s,
        draining=message.draining,
        num_requests_running=message.num_requests_running,
        num_requests_waiting=message.num_requests_waiting,
        activity=CoordinatorActivity(**activity),
        workers=tuple(_worker_from_proto(worker) for worker in message.workers),
        drafts=tuple(pool_from_proto(pool) for pool in message.drafts),
    )


def _worker_from_proto(message: coordinator_pb2.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        role=wire.role_from_proto(message.role),
        address=message.address,
        pool=message.pool,
        up=message.up,
        trouble=message.trouble,
        info=wire.info_from_proto(message.info) if message.HasField("info") else None,
    )
