"""Which workers a generation runs on, and whether they fit each other.

Owns: the links, and the rules by which workers are refused. Must not know: sessions, requests' contents.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from services.common.errors import FailedPrecondition, Unavailable
from services.common.values import ModelInfo, WorkerInfo
from services.coordinator.draft_length import LengthPolicy
from services.coordinator.draft_sequence import DraftLink
from services.coordinator.generation import Links
from services.coordinator.link import Link
from services.coordinator.statistics import DraftCounts
from services.coordinator.target_sequence import TargetLink


@dataclass(slots=True, eq=False)
class DraftPool:
    """Draft workers of one kind, at present one; what is known of their proposals, and what became of those."""

    name: str
    weight: float
    link: DraftLink
    policy: LengthPolicy = field(default_factory=LengthPolicy)
    counts: DraftCounts = field(default_factory=DraftCounts)

    def fits(self, model: ModelInfo) -> bool:
        """Whether it is connected and not known to be of another vocabulary."""
        return self.link.up and not (self.link.info and _differ(self.link.info, model))


@dataclass(frozen=True, slots=True)
class Served:
    """A target model as clients see it, and its draft pools."""

    model: ModelInfo
    max_sequence_len: int
    drafts: tuple[DraftPool, ...]
    ready: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """A generation's workers, and what they told of themselves."""

    links: Links
    target: WorkerInfo
    model: ModelInfo
    draft: WorkerInfo | None
    pool: DraftPool | None


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
    """One target and its draft pools. `vocab_digest` is that of the coordinator's tokenizer."""

    def __init__(self, target: TargetLink, drafts: Sequence[DraftPool], vocab_digest: str) -> None:
        self._target = target
        self._drafts = tuple(drafts)
        self._vocab_digest = vocab_digest

    def start(self) -> None:
        self._target.start()
        for pool in self._drafts:
            pool.link.start()

    async def aclose(self) -> None:
        await self._target.aclose()
        for pool in self._drafts:
            await pool.link.aclose()

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        """All that are known, connected or not. Safe from any thread."""
        drafts = [WorkerView("draft", pool.name, pool.link) for pool in self._drafts]
        return (WorkerView("target", "", self._target), *drafts)

    @property
    def ready_drafts(self) -> dict[str, bool]:
        """Each pool by name, and whether it is connected and fits the target, as far as that is known."""
        info = self._target.info
        model = info.model if info else None
        return {pool.name: pool.fits(model) if model else pool.link.up for pool in self._drafts}

    @property
    def draft_names(self) -> tuple[str, ...]:
        """What requests may name."""
        return tuple(pool.name for pool in self._drafts)

    async def wait_up(self, *, target_s: float, draft_s: float) -> bool:
        """Whether the target was there within `target_s`; then gives the drafts `draft_s`."""
        up = await self._target.wait_up(target_s)
        if up:
            await asyncio.gather(*[pool.link.wait_up(draft_s) for pool in self._drafts])
        return up

    @property
    def served(self) -> tuple[Served, ...]:
        """The models, from what workers told when they were last connected."""
        info = self._target.info
        if info is None or info.model is None:
            return ()
        connected = [pool for pool in self._drafts if pool.link.up]
        drafts_fit = not connected or any(pool.fits(info.model) for pool in connected)
        fits = info.model.vocab_digest == self._vocab_digest and drafts_fit
        ready = self._target.up and not self._target.load.draining and fits
        return (Served(info.model, info.max_sequence_len, self._drafts, ready),)

    def choose(self, num_draft_tokens: int | None, draft: str = "", session_id: str = "") -> Placed:
        """The workers for a new generation, with the named draft pool or, unnamed, one that the weights choose.

        Raises Unavailable NO_TARGET, STARTING or DRAINING; FailedPrecondition VOCAB_MISMATCH or MODEL_MISMATCH.
        """
        info = self._target.info
        if not self._target.up or info is None:
            raise self._no_target()
        if self._target.load.draining:
            raise Unavailable("DRAINING", f"the {self._target} is stopping", retry_after_ms=1000)
        if info.model is None:
            raise FailedPrecondition("MODEL_MISMATCH", f"the {self._target} serves no model")
        if info.model.vocab_digest != self._vocab_digest:
            raise FailedPrecondition(
                "VOCAB_MISMATCH",
                f"the coordinator's tokenizer and the target model {info.model.name} differ in vocabulary",
            )
        pool = self._choose_pool(info.model, draft, session_id) if num_draft_tokens != 0 else None
        draft_info = pool.link.info if pool else None
        if draft_info is not None:
            _check_pair(draft_info, info, info.model)
        return Placed(Links(self._target, pool.link if pool else None), info, info.model, draft_info, pool)

    def _choose_pool(self, model: ModelInfo, name: str, session_id: str) -> DraftPool | None:
        """By name, else among those that fit, if any do. A session stays with its pool while that fits."""
        if name:
            return next((pool for pool in self._drafts if pool.name == name), None)
        candidates = [pool for pool in self._drafts if pool.fits(model)] or self._drafts
        return min(candidates, key=lambda pool: _rendezvous(session_id, pool), default=None)

    def _no_target(self) -> Exception:
        trouble = self._target.trouble
        if isinstance(trouble, FailedPrecondition) or trouble.reason in ("STARTING", "DRAINING"):
            return trouble
        return Unavailable("NO_TARGET", f"no target worker: {trouble.message}", retry_after_ms=1000)


def _rendezvous(session_id: str, pool: DraftPool) -> float:
    """The least one is chosen: each pool as often as its weight says (Schindelhauer & Schomaker 2005, "Weighted
    distributed hash tables")."""
    word = int.from_bytes(hashlib.sha256(f"{session_id}/{pool.name}".encode()).digest()[:8])
    return -math.log((word + 0.5) / 2**64) / pool.weight if pool.weight else math.inf


def _differ(draft: WorkerInfo, model: ModelInfo) -> bool:
    """Whether the draft has a vocabulary, and it is not the model's."""
    return bool(draft.model and draft.model.vocab_digest and draft.model.vocab_digest != model.vocab_digest)


def _check_pair(draft: WorkerInfo, target: WorkerInfo, model: ModelInfo) -> None:
    """Raises FailedPrecondition where the draft's proposals would mean nothing to the target."""
    if draft.model and _differ(draft, model):
        raise FailedPrecondition(
            "VOCAB_MISMATCH",
            f"the draft model {draft.model.name} and the target model {model.name} differ in vocabulary: they cannot "
            "work together (start the draft with --target-tokenizer; num_draft_tokens 0 decodes with the target alone)",
        )
    if draft.noise_version != target.noise_version:
        raise FailedPrecondition(
            "MODEL_MISMATCH",
            f"the draft worker's noise is version {draft.noise_version}, the target's {target.noise_version}",
        )
