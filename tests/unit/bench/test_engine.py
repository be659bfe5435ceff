"""The engine benchmark's figures follow from what was measured, and it runs from end to end on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.engine import report
from bench.engine.__main__ import QUICK, SHAPES, run
from bench.engine.children import ChildModel, measure, share_cores
from bench.engine.figures import Figures, Measured, Peer, figures, percentile, quantiles
from bench.engine.measure import weight_bytes
from services.cli.bench.machine import environment
from services.engine.packed_linear import pack_linear_layers, packed_layer
from tests.tiny_models import build_model, save_model

MEASURED = Measured(
    dtype="bfloat16",
    weight_bytes=300_000_000,
    bandwidths=[10e9, 15e9, 12e9],
    step_ms={(1, 1): [50.0, 40.0, 90.0], (1, 8): [60.0, 55.0, 70.0]},
    tokens_per_s={1: [20.0, 24.0, 10.0], 16: [160.0, 150.0, 20.0]},
    burst_tokens_per_s={1: [10.0, 8.0, 12.0], 16: [60.0, 90.0, 65.0]},
    peers=[
        Peer("generate", "bfloat16", [10.0, 9.0, 11.0]),
        Peer("static", "bfloat16", [8.0, 16.0, 8.0]),
        Peer("generate", "float32", [25.0, 25.0, 1.0]),
    ],
    cold_ttft_ms=[1000.0, 900.0, 5000.0],
    hit_ttft_ms=[150.0, 250.0, 100.0],
    alone_gaps_ms=[[20.0] * 99 + [1000.0], [20.0] * 100, [1.0] * 100],
    beside_prefill_gaps_ms=[[30.0] * 50 + [60.0] * 49 + [2000.0], [25.0] * 10, [900.0] * 100],
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_figures_are_ratios_of_medians() -> None:
    assert figures(MEASURED) == Figures(
        plain_vs_transformers=20 / 10,
        plain_vs_transformers_any_dtype=20 / 25,
        rows8_vs_rows1=60 / 50,
        concurrency16_vs_1=65 / 10,
        steady_concurrency16_vs_1=150 / 20,
        share_of_bandwidth_limit=pytest.approx(20 / 50),
        prefix_hit_ttft_ratio=150 / 1000,
        prefill_interference_p50_ratio=30 / 20,
        prefill_interference_p99_ratio=60 / 20,
    )


def test_the_limit_is_the_weights_over_the_best_bandwidth() -> None:
    assert MEASURED.limit_ms == pytest.approx(20.0)


def test_a_rates_share_counts_one_reading_of_the_weights_for_all_sequences() -> None:
    assert MEASURED.rate_share(25.0) == pytest.approx(0.5)
    assert MEASURED.rate_share(400.0, 16) == pytest.approx(0.5)


def test_quantiles_are_kept_of_every_round() -> None:
    assert quantiles([[3.0, 1.0, 2.0], [5.0]]) == {
        "p50": [2.0, 5.0],
        "p90": [3.0, 5.0],
        "p99": [3.0, 5.0],
        "p100": [3.0, 5.0],
        "count": [3.0, 1.0],
    }


@pytest.mark.parametrize(("percent", "expected"), [(1, 1.0), (50, 2.0), (75, 3.0), (99, 4.0), (100, 4.0)])
def test_a_percentile_is_one_of_the_values(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == expected


def test_a_packed_models_weights_count_without_the_embedding() -> None:
    module = build_model().to(torch.bfloat16)
    plain = weight_bytes(module)
    if layer := packed_layer(torch.bfloat16, torch.device("cpu")):
        pack_linear_layers(module, layer)
    assert weight_bytes(module) == plain
    assert plain > build_model().lm_head.weight.numel() * 2


def test_a_tied_head_counts_once_packed_or_not() -> None:
    module = build_model().to(torch.bfloat16)
    module.lm_head.weight = module.model.embed_tokens.weight
    plain = weight_bytes(module)
    if layer := packed_layer(torch.bfloat16, torch.device("cpu")):
        pack_linear_layers(module, layer)
    assert weight_bytes(module) == plain


def test_a_tiny_run_writes_every_figure_and_the_plot(tmp_path: Path) -> None:
    plan = replace(
        QUICK,
        rounds=1,
        steps_a_round=1,
        context=20,
        prompt_len=4,
        num_tokens=3,
        first_turn=40,
        answer=3,
        second_turn=4,
        num_gaps=4,
        prefill=60,
        prefill_budget=16,
        read_bytes=1 << 16,
    )
    console = Console(quiet=True)
    measured = run(plan, str(save_model(tmp_path / "model")), "bfloat16", console)
    assert set(measured.step_ms) == set(SHAPES)
    report.show(measured, 1, console)
    report.write(measured, environment([]), 1, tmp_path)
    found = json.loads((tmp_path / "engine.json").read_text())
    assert all(found[name] > 0 for name in Figures.__slots__)
    assert [(peer["name"], peer["dtype"]) for peer in found["peers"]] == [
        ("generate", "bfloat16"),
        ("generate, static cache", "bfloat16"),
        ("generate", "float32"),
    ]
    assert all(count > 0 for gaps in found["gaps_ms"].values() for count in gaps["count"])
    assert found["environment"]["versions"]["torch"]
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")


def test_a_child_that_fails_or_hangs_is_recorded_with_its_reason(tmp_path: Path) -> None:
    model = ChildModel(tmp_path / "missing", "bfloat16")
    assert "missing" in measure(model, "compiled", (), 60.0, passive=False)["failed"]
    assert measure(model, "compiled", (), 0.01, passive=False) == {"failed": "not done within 0 s"}


def test_two_processes_share_the_cores(tmp_path: Path) -> None:
    model = ChildModel(save_model(tmp_path / "model"), "float32")
    found = share_cores(model, {"target": 3}, 0.05)
    assert found["target"]["ratio"] == pytest.approx(found["target"]["beside"] / found["target"]["alone"])
    assert found["target"]["alone"] > 0
