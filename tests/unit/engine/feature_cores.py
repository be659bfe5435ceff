"""A draft's core over a head on features, without a worker around it."""

from __future__ import annotations

from pathlib import Path

from services.common.items import DraftItem, Proposed
from services.draft.core import DraftCore
from services.engine.block_manager import BlockManager
from services.engine.drafters.features import FeatureDrafter
from services.engine.feature_draft import FeatureDraftModel
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.engine.sampler import Sampler
from services.engine.step import Sampled, Work

NUM_BLOCKS, BLOCK_SIZE = 32, 8


class RecordingModel(FeatureDraftModel):
    """Notes how many tokens each work of each step computes."""

    steps: list[list[int]]

    def step(self, works: list[Work]) -> list[Sampled | None]:
        self.steps = [*getattr(self, "steps", []), [work.num_new_tokens for work in works]]
        return super().step(works)


def feature_model(draft: Path, device: str = "cpu", cuda_graph_rows: int = 64) -> RecordingModel:
    options = EngineOptions(
        str(draft), draft, device=device, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, cuda_graph_rows=cuda_graph_rows
    )
    return RecordingModel(load_engine(options, Reporter(quiet=True)), Sampler())


def feature_core(draft: Path, model: RecordingModel | None = None) -> DraftCore:
    drafter = FeatureDrafter(model or feature_model(draft), BlockManager(NUM_BLOCKS, BLOCK_SIZE))
    return DraftCore(drafter, max_sequences=4, max_sequence_len=64, max_draft_tokens=8)


def drafted_by(core: DraftCore, *items: DraftItem) -> list[int]:
    """The one proposal that comes of the items."""
    results = core.handle(1, items)
    while core.has_work:
        results += core.step()
        core.check_integrity()
    (proposed,) = [result for _, result in results if isinstance(result, Proposed)]
    return list(proposed.proposal.token_ids)
