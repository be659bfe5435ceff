"""Loading and converting a model tell how many of its tensors are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType

import torch
import transformers
from transformers import core_model_loading

from services.engine.gguf import convert_gguf
from services.engine.loading_bars import loading_bars
from services.engine.models import load_model
from services.engine.progress import Advance, Reporter
from tests.tiny_models import build_model, save_model
from tests.unit.engine.test_gguf import NUM_HEADS, NUM_KV_HEADS, VOCAB_SIZE, write_gguf


class Listening(Reporter):
    """Keeps what tasks are told: (task, stage, done, total)."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.heard: list[tuple[str, str, float, float | None]] = []

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        def advance(done: float, *, total: float | None = None, stage: str = "") -> None:
            self.heard.append((description.split()[0], stage, done, total))

        yield advance

    def check_whole(self) -> list[tuple[str, str]]:
        """The stages in their order, each of which has gone from nothing to all of its tensors."""
        stages = []
        for stage, heard in groupby(self.heard, key=lambda entry: entry[:2]):
            amounts = [(done, total) for *_, done, total in heard]
            num = len(amounts) - 1
            assert num >= 10
            assert amounts == [(done, num) for done in range(num + 1)]
            stages.append(stage)
        return stages


def test_loading_tells_of_every_tensor(tmp_path: Path) -> None:
    reporter = Listening()
    load_model(save_model(tmp_path), torch.float32, torch.device("cpu"), reporter)
    assert reporter.check_whole() == [("Loading", "")]


def test_converting_tells_of_every_tensor_in_both_its_stages(tmp_path: Path) -> None:
    reporter = Listening()
    model = build_model("llama", vocab_size=VOCAB_SIZE, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS)
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "converted", reporter)
    assert reporter.check_whole() == [("Converting", "de-quantising"), ("Converting", "loading")]


def test_transformers_has_its_own_bars_back_afterwards() -> None:
    before = core_model_loading.tqdm
    with loading_bars(lambda done, **_: None, {core_model_loading: ""}):
        assert core_model_loading.tqdm is not before
        assert not transformers.utils.logging.is_progress_bar_enabled()
    assert core_model_loading.tqdm is before
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_module_without_bars_is_left_alone() -> None:
    module = ModuleType("without")
    with loading_bars(lambda done, **_: None, {module: ""}):
        pass
    assert not hasattr(module, "tqdm")
