"""Int8 weights keep a draft close to its model; where they cannot be had, the start says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from services.common.errors import ConfigError, ModelUnsupported
from services.common.values import Proposal
from services.draft.config import DraftConfig
from services.engine.block_manager import BlockManager
from services.engine.memory import module_bytes
from services.engine.models import load_model
from services.engine.paged_model import EngineOptions, PagedEngine, load_engine
from services.engine.progress import Reporter
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.target.config import TargetConfig
from tests.tiny_models import save_model
from tests.unit.engine.test_paged_model import generated_tokens
from tests.unit.item_builders import open_item

QUIET = Reporter(quiet=True)
PROMPT = [7, 8, 9, 10]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def load(directory: Path, dtype: str) -> PagedEngine:
    return load_engine(EngineOptions(str(directory), directory, dtype=dtype, num_blocks=32), QUIET)


def acceptance(engine: PagedEngine, prompt: list[int], continuation: list[int]) -> float:
    """Share of a greedy continuation's tokens that the engine would have drafted behind those before."""
    sequence = Sequence.from_open(open_item(prefix=tuple(prompt)))
    BlockManager(32, 16).extend(sequence, len(prompt) + len(continuation))
    proposal = Proposal(0, tuple(continuation))
    logits = engine.runner.forward([Work(sequence, len(prompt), proposal, 1 + len(continuation))])
    return float((logits[:-1].argmax(1) == torch.tensor(continuation)).double().mean())


def test_an_int8_draft_of_the_targets_own_model_is_mostly_accepted(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = save_model(tmp_path)
    expected = generated_tokens(model, PROMPT, 300)
    assert acceptance(load(model, "float32"), PROMPT, expected) == 1.0
    assert acceptance(load(model, "int8"), PROMPT, expected) > 0.85


def test_int8_weights_take_half_the_memory_of_bfloat16(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model, cpu = save_model(tmp_path), torch.device("cpu")
    plain, quantised = (
        load_model(model, torch.bfloat16, cpu, QUIET, quantised=quantised).module.model.layers
        for quantised in (False, True)
    )
    assert module_bytes(quantised) < 0.7 * module_bytes(plain)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ModelUnsupported, match="GPT2LMHeadModel has no linear layers that int8 could quantise"):
        load(save_model(tmp_path, "gpt2"), "int8")


def test_a_missing_library_is_named_before_any_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match="int8 needs the package torchao"):
        load_engine(EngineOptions("sample", tmp_path, dtype="int8"), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_the_drafts_alone() -> None:
    assert DraftConfig(dtype="int8", drafter="model").dtype == "int8"
    with pytest.raises(ConfigError, match="dtype: int8 would change the target's own tokens"):
        TargetConfig(dtype="int8")


def test_int8_weights_are_not_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", sys)
    with pytest.raises(ConfigError, match="dtype: int8 weights cannot be cut into shards"):
        load_engine(EngineOptions("sample", tmp_path, dtype="int8", num_ranks=2), QUIET)
