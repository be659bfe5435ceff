"""The largest step runs over one scratch block, and its peak is what is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.engine.models import load_model
from services.engine.progress import Reporter
from services.engine.workspace import StepLimits, measure_workspace
from tests.tiny_models import save_model


def test_peak_and_copies_of_the_logits_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5000)
    model = load_model(save_model(tmp_path, vocab_size=300), torch.float32, torch.device("cpu"), Reporter(quiet=True))
    limits = StepLimits(num_prefill_tokens=100_000, num_sequences=3, num_rows=5)
    assert measure_workspace(model, limits, 16) == 4000 + 3 * (3 * 5 * 300 * 4)
