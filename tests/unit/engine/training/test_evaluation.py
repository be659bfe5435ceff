"""The figures of an evaluation against serving the same text, and against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.common.items import Identity, Open
from services.common.values import SamplingParams, VerificationMethod
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Draft
from services.engine.drafters.features import FeatureDrafter
from services.engine.drafters.model import ModelDrafter
from services.engine.feature_draft import FeatureDraftModel
from services.engine.paged_model import EngineOptions, PagedDraftModel, load_engine
from services.engine.sampler import Sampler
from services.engine.sequence import Sequence
from services.engine.training.conversation import Origin
from services.engine.training.corpus import Corpus
from services.engine.training.evaluation import walk
from services.engine.training.feature_student import LoadedTarget
from tests.tiny_models import save_model
from tests.unit.engine.training.builders import QUIET, settings, train

NUM_DRAFT_TOKENS = 5


def test_walking_counts_steps_and_positions() -> None:
    run = np.array([1, 1, 0, 0, 1, 1, 1, 1], dtype=bool)
    mean, reached, accepted = walk([run[:, None]], 2)
    # 1 1 + own (the 0), 0: own, 1 1 + own (a 1), 1
    assert mean == 8 / 4
    assert reached.tolist() == [4, 2]
    assert accepted.tolist() == [3, 2]


def test_a_token_may_be_foreseen_at_one_place_of_a_draft_and_not_at_another() -> None:
    first, second = [1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0]
    mean, reached, accepted = walk([np.array([first, second], dtype=bool).T], 3)
    # 1 1 1 + own, then 1 and a token that the second place does not foresee; the third counts as the second
    assert mean == 6 / 2
    assert reached.tolist() == [2, 2, 1]
    assert accepted.tolist() == [2, 1, 1]


def _features_before(target: LoadedTarget, tokens: list[int]) -> npt.NDArray[np.float16]:
    hidden = target.hidden_states(torch.tensor([tokens]))[0]
    return np.concatenate([np.zeros((1, hidden.shape[1]), np.float16), hidden[:-1].half().numpy()])


def _served_steps(drafter: ModelDrafter, tokens: list[int], start: int, features: npt.NDArray[np.float16]) -> int:
    """Rounds that decoding tokens[start:] greedily takes with this draft, told `features` [T, width] before tokens."""
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
        draft.features = features[at : at + num_tokens].tobytes()
        drafter.commit(draft, draft.commit(tuple(tokens[at : at + num_tokens])))
        at, num_steps = at + num_tokens, num_steps + 1
    drafter.close(draft)
    return num_steps


@pytest.mark.parametrize("kind", ["model", "features"])
def test_the_reported_acceptance_length_is_that_of_serving(kind: str, tmp_path: Path) -> None:
    target = save_model(tmp_path / "target", vocab_size=300, peakedness=5.0)
    out = tmp_path / "draft"
    assert train(settings(target, out, kind=kind))
    held_out = json.loads((out / "report.json").read_text())["held_out"]
    corpus = Corpus(sorted((out / "self-play").glob("*.safetensors")))
    engine = load_engine(EngineOptions(str(out), tmp_path, num_blocks=64), QUIET)
    blocks, whole = BlockManager(64, 16), LoadedTarget(target, torch.float32)
    if kind == "features":
        drafter: ModelDrafter = FeatureDrafter(FeatureDraftModel(engine, Sampler()), blocks)
    else:
        drafter = ModelDrafter(PagedDraftModel(engine, Sampler()), blocks)
    num_tokens = num_steps = 0
    for number in corpus.held_out:
        transcript = corpus.transcript(int(number))
        greedy = transcript.origins == Origin.GREEDY
        edges = np.flatnonzero(np.diff(np.concatenate([[False], greedy, [False]]).astype(int))).reshape(-1, 2)
        features = _features_before(whole, transcript.tokens.tolist())
        for start, end in edges.tolist():
            num_steps += _served_steps(drafter, transcript.tokens[:end].tolist(), start, features)
            num_tokens += end - start
    assert num_tokens > 40
    assert num_tokens / num_steps == pytest.approx(held_out["mean_acceptance_len"], rel=0.04)
    assert num_tokens / num_steps > 1.1
