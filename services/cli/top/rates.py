"""What two looks at a cluster say of the time between them.

Owns: the definitions of the rates that `outrider top` shows. Must not know: terminals, calls, clocks. Pure functions;
a figure is None where nothing happened that it could be taken from, or where there was no earlier look.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from services.client import ClusterStatus, CoordinatorActivity, DraftPool, WorkerStatus
from services.common.values import WorkerActivity


@dataclass(frozen=True, slots=True)
class Look:
    """All coordinators' answers at one moment, by address; one that could not be reached has the reason instead."""

    at_s: float
    answers: Mapping[str, ClusterStatus | str]


@dataclass(frozen=True, slots=True)
class CoordinatorRow:
    """A coordinator. `trouble` is why it could not be reached; then there are no figures."""

    address: str
    trouble: str = ""
    draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    tokens_per_s: float | None = None
    calls_per_s: float | None = None
    failed_calls_per_s: float | None = None
    rounds_per_s: float | None = None
    acceptance_rate: float | None = None
    mean_acceptance_len: float | None = None
    cpu_ms_per_round: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker. `state` is up, draining or down; `trouble` says why it is down."""

    role: str
    pool: str
    address: str
    state: str
    trouble: str = ""
    model: str = ""
    drafter: str = ""
    device: str = ""
    num_sequences: int = 0
    num_queued: int = 0
    batch: float | None = None
    rows: float | None = None
    step_ms: float | None = None
    queue_ms: float | None = None
    busy: float | None = None
    tokens_per_s: float | None = None
    num_used_blocks: int = 0
    num_blocks: int = 0
    prefix_hit_rate: float | None = None
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PoolRow:
    """A draft pool, over all coordinators; `total` figures are since their start."""

    name: str
    ready: bool
    weight: float
    acceptance_rate: float | None
    mean_acceptance_len: float | None
    total_acceptance_rate: float | None
    draft_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All that is shown. `interval_s` is None before there were two looks."""

    interval_s: float | None
    tokens_per_s: float | None
    coordinators: tuple[CoordinatorRow, ...]
    workers: tuple[WorkerRow, ...]
    pools: tuple[PoolRow, ...]


def view_of(now: Look, before: Look | None) -> ClusterView:
    """The cluster at `now`, its rates since `before`."""
    interval_s = now.at_s - before.at_s if before else None
    earlier = before.answers if before else {}
    coordinators = tuple(
        _coordinator(address, a, earlier.get(address), interval_s) for address, a in now.answers.items()
    )
    rates = [row.tokens_per_s for row in coordinators if row.tokens_per_s is not None]
    past = _by_instance(earlier.values())
    return ClusterView(
        interval_s=interval_s,
        tokens_per_s=sum(rates) if rates else None,
        coordinators=coordinators,
        workers=tuple(_worker(status, past, interval_s) for status in _workers(now.answers.values())),
        pools=_pools(now.answers, earlier, interval_s),
    )


def _coordinator(
    address: str, now: ClusterStatus | str, before: ClusterStatus | str | None, interval_s: float | None
) -> CoordinatorRow:
    if isinstance(now, str):
        return CoordinatorRow(address, trouble=now)
    row = CoordinatorRow(
        address, draining=now.draining, num_running=now.num_requests_running, num_waiting=now.num_requests_waiting
    )
    if not isinstance(before, ClusterStatus) or before.instance_id != now.instance_id or not interval_s:
        return row
    done = _difference(CoordinatorActivity, now.activity, before.activity)
    num_rounds = done["num_rounds"] + done["num_plain_rounds"]
    return CoordinatorRow(
        address,
        draining=now.draining,
        num_running=now.num_requests_running,
        num_waiting=now.num_requests_waiting,
        tokens_per_s=done["num_generated_tokens"] / interval_s,
        calls_per_s=done["num_calls"] / interval_s,
        failed_calls_per_s=done["num_failed_calls"] / interval_s,
        rounds_per_s=num_rounds / interval_s,
        acceptance_rate=_share(done["num_accepted_tokens"], done["num_draft_tokens"]),
        mean_acceptance_len=_acceptance_len(done["num_accepted_tokens"], done["num_drafts"]),
        cpu_ms_per_round=_share(done["cpu_ns"] / 1e6, num_rounds),
    )


def _workers(answers: Iterable[ClusterStatus | str]) -> list[WorkerStatus]:
    """Each once, though several coordinators know it: one that is up says more than one that is not."""
    found: dict[tuple[str, str, str], WorkerStatus] = {}
    for answer in answers:
        for status in answer.workers if isinstance(answer, ClusterStatus) else ():
            key = (status.role, status.pool, status.address)
            if key not in found or (status.up and not found[key].up):
                found[key] = status
    return list(found.values())


def _by_instance(answers: Iterable[ClusterStatus | str]) -> dict[str, WorkerActivity]:
    return {status.info.instance_id: status.info.activity for status in _workers(answers) if status.info and status.up}


def _worker(status: WorkerStatus, past: Mapping[str, WorkerActivity], interval_s: float | None) -> WorkerRow:
    info = status.info
    state = "down" if not status.up else "draining" if info and info.load.draining else "up"
    if info is None:
        return WorkerRow(status.role, status.pool, status.address, state, status.trouble)
    activity = info.activity
    before = past.get(info.instance_id) if status.up and interval_s else None
    done = _difference(WorkerActivity, activity, before) if before else dict[str, int]()
    return WorkerRow(
        role=status.role,
        pool=status.pool,
        address=status.address,
        state=state,
        trouble=status.trouble,
        model=info.model.name if info.model else "",
        drafter=info.drafter,
        device=info.model.device if info.model else "",
        num_sequences=info.load.num_sequences,
        num_queued=info.load.num_queued,
        batch=_share(done.get("num_step_sequences", 0), done.get("num_steps", 0)),
        rows=_share(done.get("num_step_rows", 0), done.get("num_steps", 0)),
        step_ms=_share(done.get("busy_ns", 0) / 1e6, done.get("num_steps", 0)),
        queue_ms=_share(done.get("queue_ns", 0) / 1e6, done.get("num_answers", 0)),
        busy=min(1.0, done["busy_ns"] / 1e9 / interval_s) if done and interval_s else None,
        tokens_per_s=done["num_tokens"] / interval_s if done and interval_s else None,
        num_used_blocks=info.load.num_used_blocks,
        num_blocks=info.load.num_blocks,
        prefix_hit_rate=_share(activity.num_prefix_hit_tokens, activity.num_prefix_tokens),
        memory_used_bytes=activity.memory_used_bytes,
        memory_total_bytes=activity.memory_total_bytes,
    )


def _pools(
    now: Mapping[str, ClusterStatus | str], before: Mapping[str, ClusterStatus | str], interval_s: float | None
) -> tuple[PoolRow, ...]:
    """Summed by name. A coordinator that is new, or was started anew, has no part in the rates yet."""
    totals, fresh = dict[str, _PoolCounts](), dict[str, _PoolCounts]()
    for address, status in now.items():
        if isinstance(status, str):
            continue
        then = before.get(address)
        known = isinstance(then, ClusterStatus) and then.instance_id == status.instance_id
        for pool in status.drafts:
            totals.setdefault(pool.name, _PoolCounts()).add(pool, 1)
            if known:
                fresh.setdefault(pool.name, _PoolCounts()).add(pool, 1)
        for pool in then.drafts if known and isinstance(then, ClusterStatus) else ():
            fresh.setdefault(pool.name, _PoolCounts()).add(pool, -1)
    return tuple(_pool(name, counts, fresh.get(name), interval_s) for name, counts in totals.items())


@dataclass(slots=True)
class _PoolCounts:
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    ready: bool = False
    weight: float = 0.0

    def add(self, pool: DraftPool, sign: int) -> None:
        self.num_drafts += sign * pool.num_drafts
        self.num_draft_tokens += sign * pool.num_draft_tokens
        self.num_accepted_tokens += sign * pool.num_accepted_tokens
        self.ready, self.weight = self.ready or pool.ready, pool.weight


def _pool(name: str, total: _PoolCounts, fresh: _PoolCounts | None, interval_s: float | None) -> PoolRow:
    return PoolRow(
        name=name,
        ready=total.ready,
        weight=total.weight,
        acceptance_rate=_share(fresh.num_accepted_tokens, fresh.num_draft_tokens) if fresh else None,
        mean_acceptance_len=_acceptance_len(fresh.num_accepted_tokens, fresh.num_drafts) if fresh else None,
        total_acceptance_rate=_share(total.num_accepted_tokens, total.num_draft_tokens),
        draft_tokens_per_s=fresh.num_draft_tokens / interval_s if fresh and interval_s else None,
    )


def _difference(kind: type, now: object, before: object) -> dict[str, int]:
    return {field.name: getattr(now, field.name) - getattr(before, field.name) for field in fields(kind)}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _acceptance_len(num_accepted: int, num_drafts: int) -> float | None:
    """Tokens a verify step that had a draft, the target's own included."""
    return 1 + num_accepted / num_drafts if num_drafts else None
