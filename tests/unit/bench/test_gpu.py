"""The GPU benchmark runs from end to end on tiny models, and its figures are of what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.gpu.__main__ import main
from bench.gpu.models import weight_bytes
from tests.tiny_models import build_model


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_a_tiny_run_writes_every_kind_of_figure_and_the_plot(tmp_path: Path) -> None:
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "tiny-target: ms a step" in " ".join(result.output.split())
    found = json.loads((tmp_path / "gpu.json").read_text())
    target, draft = found["models"]
    assert [(step["batch"], step["rows"]) for step in target["steps"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert all(step["ms"] > 0 and step["share"] > 0 for model in (target, draft) for step in model["steps"])
    kinds = [(rate["engine"], rate["batch"], rate["num_draft_tokens"], rate["acceptance"]) for rate in target["rates"]]
    assert kinds == [
        ("outrider", 1, 0, None),
        ("outrider", 2, 0, None),
        ("outrider", 1, 2, 0.8),
        ("transformers", 1, 0, None),
        ("transformers", 1, 2, None),
    ]
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_cannot_be_had_is_skipped_with_a_sentence(tmp_path: Path) -> None:
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--models", "tiny-draft,./not-there"]
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "skipped: ./not-there" in result.output


def test_a_device_that_is_not_there_fails_with_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--tiny", "--device", "cuda:99", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "cuda:99" in result.output


def test_an_input_embedding_counts_only_where_it_is_the_head_too() -> None:
    module = build_model(vocab_size=64)
    total = sum(parameter.nbytes for parameter in module.parameters())
    assert weight_bytes(module) == total - 64 * 32 * 4
    module.set_input_embeddings(torch.nn.Embedding(64, 32, _weight=module.get_output_embeddings().weight))
    assert weight_bytes(module) == total - 64 * 32 * 4
