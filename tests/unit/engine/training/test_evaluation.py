"""The figures of an evaluation against serving the same text, and against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from services.common.items import Identity, Open
from services.common.values import SamplingParams, VerificationMethod
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Draft
from services.engine.drafters.model import ModelDrafter
from services.engine.paged_model import EngineOptions, PagedDraftModel, load_engine
from services.engine.sampler import Sampler
from services.engine.sequence import Sequence
from services.engine.training.conversation import Origin
from services.engine.training.corpus import Corpus
from services.engine.training.evaluation import walk
from tests.tiny_models import save_model
from tests.unit.engine.training.builders import QUIET, settings, train

NUM_DRAFT_TOKENS = 5


def test_walking_counts_steps_and_positions() -> None:
    run = np.array([1, 1, 0, 0, 1, 1, 1, 1], dtype=bool)
    mean, reached, accepted = walk([run], 2)
    # 1 1 + own (the 0), 0: own, 1 1 + own (a 1), 1
    assert mean == 8 / 4
    assert reached.tolist() == [4, 2]
    assert accepted.tolist() == [3, 2]


def _served_steps(drafter: ModelDrafter, tokens: list[int], start: int) -> int:
    """Rounds that decoding tokens[start:] greedily takes with this draft."""
    identity = Identity(f"served {start}", 0, 0, 0, start)
    item = Open(
        identity, tuple(tokens[:start]), start, frozenset(), SamplingParams(0.0), VerificationMethod.COUPLED, 999
    )
    draft = Draft(Sequence.from_open(item))
    drafter.open(draft)
    num_steps, at = 0, start
    while at < len(tokens):
        draft.request(NUM_DRAFT_TOKENS)
        while draft.num_missing_tokens:
            drafter.step([draft])
        agreed = [a == b for a, b in zip(draft.drafted, tokens[at:], strict=False)]
        num_tokens = [*agreed, False].index(False) + 1
        drafter.commit(draft, draft.commit(tuple(tokens[at : at + num_tokens])))
        at, num_steps = at + num_tokens, num_steps + 1
    drafter.close(draft)
    return num_steps


def test_the_reported_acceptance_length_is_that_of_serving(tmp_path: Path) -> None:
    target = save_model(tmp_path / "target", vocab_size=300, peakedness=5.0)
    out = tmp_path / "draft"
    assert train(settings(target, out))
    held_out = json.loads((out / "report.json").read_text())["held_out"]
    corpus = Corpus(sorted((out / "self-play").glob("*.safetensors")))
    engine = load_engine(EngineOptions(str(out), tmp_path, num_blocks=64), QUIET)
    drafter = ModelDrafter(PagedDraftModel(engine, Sampler()), BlockManager(64, 16))
    num_tokens = num_steps = 0
    for number in corpus.held_out:
        transcript = corpus.transcript(int(number))
        greedy = transcript.origins == Origin.GREEDY
        edges = np.flatnonzero(np.diff(np.concatenate([[False], greedy, [False]]).astype(int))).reshape(-1, 2)
        for start, end in edges.tolist():
            num_steps += _served_steps(drafter, transcript.tokens[:end].tolist(), start)
            num_tokens += end - start
    assert num_tokens > 40
    assert num_tokens / num_steps == pytest.approx(held_out["mean_acceptance_len"], rel=0.04)
    assert num_tokens / num_steps > 1.1
