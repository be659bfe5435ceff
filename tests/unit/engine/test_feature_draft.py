"""A head on features where features come, come late, or don't come at all."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.common.errors import ConfigError
from services.common.items import Open, Propose
from services.common.values import MAX_FEATURE_ROWS
from services.engine.feature_draft import MAX_HELD_ROWS, FeatureDraftModel
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.engine.sampler import Sampler
from tests.feature_drafts import export, feature_student
from tests.tiny_models import HIDDEN_SIZE, save_model
from tests.unit.engine.feature_cores import RecordingModel, drafted_by, feature_core, feature_model
from tests.unit.item_builders import close, open_item, propose

NUM_DRAFTED = 4
TOKENS = tuple(torch.randint(1, 320, (60,), generator=torch.Generator().manual_seed(1)).tolist())


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    target = save_model(directory / "target")
    return export(feature_student(target, strength=0.5), target, directory / "draft")


@pytest.fixture(scope="module")
def model(draft: Path) -> RecordingModel:
    torch.set_num_threads(1)
    return feature_model(draft)


def rows(num: int, seed: int = 0) -> bytes:
    return torch.randn(num, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)).half().numpy().tobytes()


def opening(num_tokens: int) -> Open:
    return open_item(prefix=TOKENS[:num_tokens], eos_token_ids=frozenset())


def asking(start: int, end: int, features: bytes = b"", num: int = NUM_DRAFTED) -> Propose:
    return replace(propose("a", end, TOKENS[start:end], num), features=features)


def test_what_is_drafted_depends_on_the_features(draft: Path, model: RecordingModel) -> None:
    found = {
        tuple(drafted_by(feature_core(draft, model), opening(20), asking(20, 23, features)))
        for features in (b"", rows(3, seed=1), rows(3, seed=2), rows(1, seed=1))
    }
    assert len(found) == 4


def test_features_that_come_after_their_tokens_count_as_if_they_had_come_with_them(
    draft: Path, model: RecordingModel
) -> None:
    told = rows(3)
    in_time = drafted_by(feature_core(draft, model), opening(20), asking(20, 23, told))
    core = feature_core(draft, model)
    without = drafted_by(core, opening(23), asking(23, 23))
    assert drafted_by(core, asking(23, 23, told)) == in_time != without


def test_accepted_tokens_are_computed_again_with_the_targets_features(draft: Path, model: RecordingModel) -> None:
    told, verified = rows(3), rows(3, seed=5)
    core = feature_core(draft, model)
    drafted = drafted_by(core, opening(20), asking(20, 23, told))
    accepted = (*drafted[:2], 9)
    model.steps = []
    committed = replace(propose("a", 26, accepted, NUM_DRAFTED), features=verified)
    found = drafted_by(core, committed)
    assert model.steps[0] == [3]
    anew = open_item(prefix=(*TOKENS[:20],), eos_token_ids=frozenset())
    at_once = replace(propose("a", 26, (*TOKENS[20:23], *accepted), NUM_DRAFTED), features=told + verified)
    assert drafted_by(feature_core(draft, model), anew, at_once) == found


def test_without_features_accepted_tokens_stay_as_they_were_drafted(draft: Path, model: RecordingModel) -> None:
    core = feature_core(draft, model)
    drafted = drafted_by(core, opening(20), asking(20, 23, rows(3)))
    model.steps = []
    drafted_by(core, propose("a", 26, (*drafted[:2], 9), NUM_DRAFTED))
    assert model.steps == [[1]] * NUM_DRAFTED


def test_shared_blocks_are_not_cut_for_features(draft: Path, model: RecordingModel) -> None:
    core = feature_core(draft, model)
    drafted_by(core, opening(40), asking(40, 40, rows(MAX_FEATURE_ROWS)))
    model.steps = []
    drafted_by(core, asking(40, 40, rows(MAX_FEATURE_ROWS, seed=3)))
    assert model.steps[0] == [8], "the last block, which is not shared"


def test_features_of_another_width_are_left_aside_with_a_warning(draft: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = feature_model(draft)
    expected = drafted_by(feature_core(draft, model), opening(20), asking(20, 23))
    core = feature_core(draft, model)
    with caplog.at_level(logging.WARNING, "services.engine.feature_draft"):
        assert drafted_by(core, opening(20), asking(20, 23, rows(3)[:-2])) == expected
        assert drafted_by(core, asking(23, 23, rows(3)[:-6])) == expected
    assert len(caplog.records) == 1


def test_features_that_are_no_numbers_are_refused_by_nobody(draft: Path, model: RecordingModel) -> None:
    mad = torch.full((3, HIDDEN_SIZE), torch.nan).half()
    mad[1] = torch.inf
    core = feature_core(draft, model)
    assert len(drafted_by(core, opening(20), asking(20, 23, mad.numpy().tobytes()))) == NUM_DRAFTED


def test_what_is_held_is_bounded_and_goes_with_the_sequence(draft: Path) -> None:
    model = feature_model(draft)
    core = feature_core(draft, model)
    core.handle(1, [opening(2)])
    for start in range(2, 58, 4):
        core.handle(1, [asking(start, start + 4, rows(4), num=0)])
    ((held),) = model._rows.values()
    assert len(held) == min(56, MAX_HELD_ROWS)
    assert len(drafted_by(core, asking(58, 58))) == NUM_DRAFTED
    core.handle(1, [close("a")])
    assert not model._rows


def test_a_model_that_takes_no_features_is_refused(tmp_path: Path) -> None:
    engine = load_engine(
        EngineOptions(str(save_model(tmp_path / "tiny")), tmp_path, num_blocks=8), Reporter(quiet=True)
    )
    with pytest.raises(ConfigError, match="drafter: tiny takes no features"):
        FeatureDraftModel(engine, Sampler())
