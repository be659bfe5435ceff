"""The draft pools beside the targets: which fit a model, and which one a request gets.

Owns: what is known of a pool's proposals for each model, and the rules by which drafts are refused.
Must not know: sessions' contents, how a worker of a pool is chosen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.common.errors import FailedPrecondition
from services.common.items import DraftItem, DraftResult
from services.common.values import ModelInfo, WorkerInfo
from services.coordinator.draft_length import LengthPolicy
from services.coordinator.propose_deadline import ProposeDeadline
from services.coordinator.statistics import DraftCounts
from services.coordinator.target_pools import TargetKind
from services.coordinator.worker_pool import PooledWorker, WorkerPool

DraftWorker = PooledWorker[DraftItem, DraftResult]


@dataclass(frozen=True, slots=True)
class DraftShare:
    """What a pool does for one model."""

    policy: LengthPolicy
    deadline: ProposeDeadline
    counts: DraftCounts = field(default_factory=DraftCounts)


class DraftPool:
    """Draft workers of one kind, for the targets of one model; an empty `model`: for all targets that they fit."""

    def __init__(
        self,
        name: str,
        weight: float,
        workers: WorkerPool[DraftItem, DraftResult],
        new_deadline: Callable[[], ProposeDeadline] = lambda: ProposeDeadline(5.0),
        model: str = "",
    ) -> None:
        self.name = name
        self.weight = weight
        self.model = model
        self.workers = workers
        self.new_policy: Callable[[str], LengthPolicy] = lambda model: LengthPolicy()
        """Makes the policy for a model, by its name."""
        self._new_deadline = new_deadline
        self._shares: dict[str, DraftShare] = {}

    def share(self, model: str) -> DraftShare:
        if model not in self._shares:
            self._shares[model] = DraftShare(self.new_policy(model), self._new_deadline())
        return self._shares[model]

    @property
    def up(self) -> bool:
        """Whether a worker is connected."""
        return any(worker.link.up for worker in self.workers.workers)

    @property
    def info(self) -> WorkerInfo | None:
        """Of one of its workers; of one that is up, if any is."""
        workers = sorted(self.workers.workers, key=lambda worker: not worker.link.up)
        return next((worker.link.info for worker in workers if worker.link.info), None)

    def serves(self, model: str) -> bool:
        """Whether it is for the targets of that name, fit or not."""
        return not self.model or self.model == model

    def fits(self, kind: TargetKind) -> bool:
        """Whether a worker is connected that may draft for such targets."""
        return any(worker.link.up and _fits(worker.link.info, kind) for worker in self.workers.workers)

    def differs(self, kind: TargetKind) -> bool:
        """Whether workers are known, and none may draft for such targets."""
        infos = [worker.link.info for worker in self.workers.workers if worker.link.info]
        return bool(infos) and not any(_fits(info, kind) for info in infos)

    def useless(self, kind: TargetKind, others: set[TargetKind]) -> bool:
        """Whether, serving targets of that kind, it differs from them and from all `others` that it may draft for."""
        return self.differs(kind) and (bool(self.model) or all(self.differs(other) for other in others))


def placeable(pool: DraftPool, kind: TargetKind, num_tokens: int) -> list[DraftWorker]:
    """The pool's workers that would take a sequence; those without room for more than `num_tokens` only as a last."""
    fitting = [worker for worker in pool.workers.workers if worker.placeable and _fits(worker.link.info, kind)]
    roomy = [w for w in fitting if w.link.info is not None and w.link.info.max_sequence_len >= num_tokens + 2]
    return roomy or fitting


def choose_pool(
    pools: Sequence[DraftPool], name: str, session_id: str, model: ModelInfo, kind: TargetKind, others: set[TargetKind]
) -> DraftPool | None:
    """By name, else among those that serve the model and fit, by weight. A session stays with its pool while that fits.

    None where there is no pool, or none but those of the `others` that are served. Raises FailedPrecondition
    VOCAB_MISMATCH or MODEL_MISMATCH where the pool's proposals would mean nothing to the target, or are for another.
    """
    if name:
        pool = next((pool for pool in pools if pool.name == name), None)
        if pool and not pool.serves(model.name):
            raise _other_model(pool, model)
    else:
        serving = [pool for pool in pools if pool.serves(model.name)]
        candidates = [pool for pool in serving if pool.fits(kind)]
        candidates = candidates or [pool for pool in serving if not pool.differs(kind)]
        candidates = candidates or [pool for pool in serving if pool.useless(kind, others)]
        pool = min(candidates, key=lambda pool: _rendezvous(session_id, pool), default=None)
    if pool and pool.differs(kind) and pool.info:
        raise _mismatch(pool.info, model, kind)
    return pool


def _rendezvous(session_id: str, pool: DraftPool) -> float:
    """The least one is chosen: each pool as often as its weight says (Schindelhauer & Schomaker 2005, "Weighted
    distributed hash tables")."""
    word = int.from_bytes(hashlib.sha256(f"{session_id}/{pool.name}".encode()).digest()[:8])
    return -math.log((word + 0.5) / 2**64) / pool.weight if pool.weight else math.inf


def _fits(draft: WorkerInfo | None, kind: TargetKind) -> bool:
    """Whether its proposals mean something to the target. A drafter without a vocabulary takes any."""
    if draft is None or draft.noise_version != kind.noise_version:
        return False
    vocab_digest = draft.model.vocab_digest if draft.model else ""
    return not vocab_digest or vocab_digest == kind.vocab_digest


def _other_model(pool: DraftPool, model: ModelInfo) -> FailedPrecondition:
    return FailedPrecondition(
        "MODEL_MISMATCH",
        f"the draft pool {pool.name} serves the target model {pool.model}, not {model.name}; name another, or none",
    )


def _mismatch(draft: WorkerInfo, model: ModelInfo, kind: TargetKind) -> FailedPrecondition:
    if draft.noise_version != kind.noise_version:
        return FailedPrecondition(
            "MODEL_MISMATCH",
            f"the draft worker's noise is version {draft.noise_version}, the target's {kind.noise_version}",
        )
    name = draft.model.name if draft.model else draft.drafter
    return FailedPrecondition(
        "VOCAB_MISMATCH",
        f"the draft model {name} and the target model {model.name} differ in "
        "vocabulary: they cannot work together (start the draft with --target-tokenizer; num_draft_tokens 0 decodes "
        "with the target alone)",
    )
