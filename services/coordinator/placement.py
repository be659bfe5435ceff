"""Which workers a generation runs on, and whether they fit each other.

Owns: the links, and the rules by which workers are refused. Must not know: sessions, requests' contents.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.errors import FailedPrecondition, Unavailable
from services.common.values import ModelInfo, WorkerInfo
from services.coordinator.draft_sequence import DraftLink
from services.coordinator.generation import Links
from services.coordinator.target_sequence import TargetLink


@dataclass(frozen=True, slots=True)
class Served:
    """A model pair as clients see it."""

    model: ModelInfo
    max_sequence_len: int
    drafter: str
    draft_model: str
    ready: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """A generation's workers, and what they told of themselves."""

    links: Links
    target: WorkerInfo
    model: ModelInfo
    draft: WorkerInfo | None


class Placement:
    """One target and at most one draft. `vocab_digest` is that of the coordinator's tokenizer."""

    def __init__(self, target: TargetLink, draft: DraftLink | None, vocab_digest: str) -> None:
        self._target = target
        self._draft = draft
        self._vocab_digest = vocab_digest

    def start(self) -> None:
        self._target.start()
        if self._draft:
            self._draft.start()

    async def aclose(self) -> None:
        await self._target.aclose()
        if self._draft:
            await self._draft.aclose()

    async def wait_up(self, *, target_s: float, draft_s: float) -> bool:
        """Whether the target was there within `target_s`; then gives the draft `draft_s`."""
        up = await self._target.wait_up(target_s)
        if up and self._draft:
            await self._draft.wait_up(draft_s)
        return up

    @property
    def served(self) -> tuple[Served, ...]:
        """The models, from what workers told when they were last connected."""
        info = self._target.info
        if info is None or info.model is None:
            return ()
        draft = self._draft.info if self._draft and self._draft.up else None
        fits = info.model.vocab_digest == self._vocab_digest and not (draft and _differ(draft, info.model))
        ready = self._target.up and not self._target.load.draining and fits
        draft_model = draft.model.name if draft and draft.model else ""
        return (Served(info.model, info.max_sequence_len, draft.drafter if draft else "", draft_model, ready),)

    def choose(self, num_draft_tokens: int) -> Placed:
        """The workers for a new generation.

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
        draft = self._draft if num_draft_tokens else None
        draft_info = draft.info if draft else None
        if draft_info is not None:
            _check_pair(draft_info, info, info.model)
        return Placed(Links(self._target, draft), info, info.model, draft_info)

    def _no_target(self) -> Exception:
        trouble = self._target.trouble
        if isinstance(trouble, FailedPrecondition) or trouble.reason in ("STARTING", "DRAINING"):
            return trouble
        return Unavailable("NO_TARGET", f"no target worker: {trouble.message}", retry_after_ms=1000)


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
