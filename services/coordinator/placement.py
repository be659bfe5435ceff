"""Which workers a generation runs on, and whether they fit each other.

Owns: the models that the targets serve, and the rules by which workers are chosen and refused: the one that has the
session's cache, else bounded-load rendezvous hashing of the prefix. Must not know: requests' contents, sequences.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.common.errors import FailedPrecondition, OutriderError, Unavailable
from services.common.items import DraftItem, DraftResult, TargetItem, TargetResult
from services.common.values import ModelInfo, WorkerInfo
from services.coordinator.draft_length import LengthPolicy
from services.coordinator.draft_pools import DraftPool, DraftShare, choose_pool, placeable
from services.coordinator.generation import Routes
from services.coordinator.link import Link
from services.coordinator.rendezvous import Candidate, bounded_choice, prefix_key
from services.coordinator.route import ItemT, PoolRoute, ResultT
from services.coordinator.target_pools import Member, TargetKind, differences, elect
from services.coordinator.tokenizer_set import TokenizerSet
from services.coordinator.worker_pool import PooledWorker, WorkerPool

log = logging.getLogger(__name__)

TargetWorkers = WorkerPool[TargetItem, TargetResult]
TargetWorker = PooledWorker[TargetItem, TargetResult]


@dataclass(frozen=True, slots=True)
class Served:
    """A target model as clients see it, and the draft pools that serve it."""

    model: ModelInfo
    kind: TargetKind
    max_sequence_len: int
    drafts: tuple[DraftPool, ...]
    ready: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be placed. The instance ids are those of workers that may hold the session's cache."""

    model: str
    token_ids: Sequence[int]
    max_len: int
    """At which the sequence would end, prompt included."""
    num_draft_tokens: int | None = None
    draft: str = ""
    session_id: str = ""
    target_instance_id: str = ""
    draft_instance_id: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    """A generation's workers, and what they told of themselves. To be released, unless a generation gets the routes."""

    routes: Routes
    target: WorkerInfo
    kind: TargetKind
    model: ModelInfo
    draft: WorkerInfo | None
    pool: DraftPool | None

    @property
    def share(self) -> DraftShare | None:
        return self.pool.share(self.model.name) if self.pool else None

    def release(self) -> None:
        self.routes.target.close()
        if self.routes.draft is not None:
            self.routes.draft.close()


class WorkerView(NamedTuple):
    """A worker as this coordinator sees it. `pool` is empty for a target."""

    role: str
    pool: str
    link: Link[Any, Any]

    @property
    def address(self) -> str:
        return self.link.address

    @property
    def up(self) -> bool:
        return self.link.up


class Placement:
    """All targets and their draft pools."""

    def __init__(self, targets: TargetWorkers, drafts: Sequence[DraftPool], tokenizers: TokenizerSet) -> None:
        self._targets = targets
        self._drafts = tuple(drafts)
        self._tokenizers = tokenizers
        self._kinds: dict[str, TargetKind] = {}
        self._models: dict[str, WorkerInfo] = {}
        """Of each name: what a target of its kind told last."""
        self._refused: set[str] = set()
        """Instance ids of targets whose refusal has been logged."""
        for pool in self._drafts:
            pool.new_policy = self._new_policy

    def start(self) -> None:
        self._targets.on_change = self._survey
        self._targets.start()
        for pool in self._drafts:
            pool.workers.start()

    async def aclose(self) -> None:
        await asyncio.gather(self._targets.aclose(), *[pool.workers.aclose() for pool in self._drafts])

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        """All that are known, connected or not. Safe from any thread."""
        targets = [WorkerView("target", "", worker.link) for worker in self._targets.workers]
        drafts = [
            WorkerView("draft", pool.name, worker.link) for pool in self._drafts for worker in pool.workers.workers
        ]
        return (*targets, *drafts)

    @property
    def ready_drafts(self) -> dict[str, bool]:
        """Each pool by name, and whether it is connected and fits a target, as far as those are known."""
        kinds = list(self._kinds.items())
        if not kinds:
            return {pool.name: pool.up for pool in self._drafts}
        return {pool.name: any(pool.serves(name) and pool.fits(kind) for name, kind in kinds) for pool in self._drafts}

    @property
    def draft_names(self) -> tuple[str, ...]:
        """What requests may name."""
        return tuple(pool.name for pool in self._drafts)

    async def wait_up(self, *, target_s: float, others_s: float) -> bool:
        """Whether a target was there within `target_s`; then gives all other workers `others_s`."""
        up = await self._targets.wait_until(lambda: any(w.link.up for w in self._targets.workers), target_s)
        if up:
            drafts = [pool.workers.wait_all_up(others_s) for pool in self._drafts]
            await asyncio.gather(self._targets.wait_all_up(others_s), *drafts)
        return up

    @property
    def served(self) -> tuple[Served, ...]:
        """The models, by name, from what workers told when they were last connected."""
        self._survey()
        return tuple(self._served(name) for name in sorted(self._models))

    def check(self, model: str) -> None:
        """Raises what `place` would because of the targets."""
        self._survey()
        self._candidates(model)

    def place(self, wish: Wish) -> Placed:
        """The workers for a generation; the draft pool is the named one or, unnamed, one that the weights choose.

        Raises Unavailable NO_TARGET, STARTING or DRAINING; FailedPrecondition VOCAB_MISMATCH or MODEL_MISMATCH.
        """
        self._survey()
        candidates = self._candidates(wish.model)
        kind, model = self._kinds[wish.model], _model(self._models[wish.model])
        pool = None
        if wish.num_draft_tokens != 0:
            others = {other for name, other in self._kinds.items() if name != wish.model}
            pool = choose_pool(self._drafts, wish.draft, wish.session_id, model, kind, others)
        longest = max(_info(worker).max_sequence_len for worker in candidates)
        target = self._target_route(wish, kind, min(wish.max_len, longest))
        if not target.place() or target.link is None or target.link.info is None:
            raise self._no_target()
        draft = self._draft_route(wish, pool, kind) if pool else None
        draft_info = None
        if draft is not None:
            draft_info = draft.link.info if draft.place() and draft.link else pool.info if pool else None
        return Placed(Routes(target, draft), target.link.info, kind, model, draft_info, pool)

    def _target_route(self, wish: Wish, kind: TargetKind, max_len: int) -> PoolRoute[TargetItem, TargetResult]:
        key = prefix_key(wish.token_ids)

        def choose(excluded: Collection[str]) -> TargetWorker | None:
            able = [w for w in self._placeable(wish.model, kind) if _info(w).max_sequence_len >= max_len]
            return _best(key, wish.target_instance_id, able, excluded)

        def hopeless() -> OutriderError | None:
            self._survey()
            if self._kinds[wish.model] == kind:
                return None
            return FailedPrecondition("MODEL_CHANGED", "the targets now serve another model than the session's")

        return PoolRoute(self._targets, choose, hopeless)

    def _draft_route(self, wish: Wish, pool: DraftPool, kind: TargetKind) -> PoolRoute[DraftItem, DraftResult]:
        key = prefix_key(wish.token_ids)

        def choose(excluded: Collection[str]) -> PooledWorker[DraftItem, DraftResult] | None:
            able = placeable(pool, kind, len(wish.token_ids))
            return _best(key, wish.draft_instance_id, able, excluded)

        return PoolRoute(pool.workers, choose)

    def _candidates(self, name: str) -> list[TargetWorker]:
        """The model's targets that are placeable. Raises why there is none."""
        if not name or name not in self._models:
            raise self._no_target()
        kind, model = self._kinds[name], _model(self._models[name])
        if not self._has_tokenizer(name):
            raise FailedPrecondition(
                "VOCAB_MISMATCH", f"the coordinator's tokenizer and the target model {model.name} differ in vocabulary"
            )
        if found := self._placeable(name, kind):
            return found
        if draining := [w for w in self._serving(name, kind) if w.draining]:
            raise Unavailable("DRAINING", f"the {draining[0].link} is stopping", retry_after_ms=1000)
        raise self._no_target()

    def _serving(self, name: str, kind: TargetKind) -> list[TargetWorker]:
        """The model's targets that are up."""
        return [worker for worker in self._targets.workers if worker.link.up and _serves(worker, name, kind)]

    def _placeable(self, name: str, kind: TargetKind) -> list[TargetWorker]:
        return [worker for worker in self._serving(name, kind) if worker.placeable]

    def _no_target(self) -> OutriderError:
        up = [worker for worker in self._targets.workers if worker.link.up]
        if up and not self._models:
            return FailedPrecondition("MODEL_MISMATCH", f"the {up[0].link} serves no model")
        troubles = self._targets.troubles
        told = [t for t in troubles if t.reason in ("STARTING", "DRAINING") or isinstance(t, FailedPrecondition)]
        if troubles and len(told) == len(troubles):
            return told[0]
        reason = troubles[0].message if troubles else "those that are there have failed a moment ago"
        return Unavailable("NO_TARGET", f"no target worker: {reason}", retry_after_ms=1000)

    def _served(self, name: str) -> Served:
        kind, info = self._kinds[name], self._models[name]
        able = self._placeable(name, kind)
        others = {other for other_name, other in self._kinds.items() if other_name != name}
        drafts = tuple(pool for pool in self._drafts if pool.serves(name))
        misfit = any(p.useless(kind, others) for p in drafts) and not any(pool.fits(kind) for pool in drafts)
        lens = [_info(worker).max_sequence_len for worker in able] or [info.max_sequence_len]
        return Served(_model(info), kind, max(lens), drafts, bool(able) and self._has_tokenizer(name) and not misfit)

    def _survey(self) -> None:
        """Takes note of the models that targets name, and of targets that differ from their model's pool."""
        now_s = asyncio.get_running_loop().time()
        members: dict[str, list[tuple[Member, TargetWorker]]] = {}
        for worker in self._targets.workers:
            info = worker.link.info
            if info and info.model and (kind := TargetKind.of(info)):
                down_s = 0.0 if worker.link.up else max(1e-9, now_s - worker.last_up_s)
                members.setdefault(info.model.name, []).append((Member(kind, down_s), worker))
        for name, named in members.items():
            kind = elect(self._kinds.get(name), [member for member, _ in named])
            if kind is None:
                continue
            if self._kinds.get(name) != kind:
                self._kinds[name] = kind
                if not self._has_tokenizer(name):
                    log.warning("the model %s is not served: no tokenizer of its vocabulary is configured", name)
            for member, worker in named:
                if member.kind != kind:
                    self._log_refusal(worker, member.kind, kind)
                elif worker.link.up or name not in self._models or TargetKind.of(self._models[name]) != kind:
                    self._models[name] = _info(worker)

    def _has_tokenizer(self, name: str) -> bool:
        """Whether there is one of the vocabulary of the model's present kind."""
        tokenizer = self._tokenizers.find(name)
        return tokenizer is not None and tokenizer.vocab_digest == self._kinds[name].vocab_digest

    def _log_refusal(self, worker: TargetWorker, its: TargetKind, kind: TargetKind) -> None:
        instance_id = _info(worker).instance_id
        if instance_id not in self._refused:
            self._refused.add(instance_id)
            log.warning(
                "%s is refused: among the targets of %s it has %s",
                worker.link,
                _model(_info(worker)).name,
                differences(its, kind),
            )

    def _new_policy(self, name: str) -> LengthPolicy:
        """Of the sequences that a pool drafts for and the model's targets verify."""

        def loads() -> list[int]:
            return [worker.link.load.num_sequences for worker in self._serving(name, self._kinds[name])]

        return LengthPolicy(lambda: max(loads(), default=0), lambda: len(loads()))


def _best(
    key: bytes, instance_id: str, able: Sequence[PooledWorker[ItemT, ResultT]], excluded: Collection[str]
) -> PooledWorker[ItemT, ResultT] | None:
    """The worker with the session's cache, unless it is full; else by the prefix and the loads."""
    workers = {worker.address: worker for worker in able if worker.address not in excluded}
    candidates = {
        address: Candidate(address, worker.num_sequences, _info(worker).max_sequences)
        for address, worker in workers.items()
    }
    for address, worker in workers.items():
        mine = candidates[address]
        if instance_id and _info(worker).instance_id == instance_id and mine.num_sequences < mine.max_sequences:
            return worker
    chosen = bounded_choice(key, list(candidates.values()))
    return workers[chosen.name] if chosen else None


def _serves(worker: TargetWorker, name: str, kind: TargetKind) -> bool:
    info = worker.link.info
    return info is not None and info.model is not None and info.model.name == name and TargetKind.of(info) == kind


def _info(worker: PooledWorker[ItemT, ResultT]) -> WorkerInfo:
    if worker.link.info is None:
        raise RuntimeError(f"{worker.link} has never told of itself")
    return worker.link.info


def _model(info: WorkerInfo) -> ModelInfo:
    if info.model is None:
        raise RuntimeError(f"the worker {info.instance_id} serves no model")
    return info.model
