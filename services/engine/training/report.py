"""What a training run tells of itself: report.json and, where matplotlib is installed, curve.png.

Owns: their content. Must not know: how the figures were taken.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from services.engine.training.checkpoint import Progress
from services.engine.training.config import TrainingConfig
from services.engine.training.costs import Costs
from services.engine.training.evaluation import Figures


def write_report(
    directory: Path,
    config: TrainingConfig,
    progress: Progress,
    figures: Figures,
    costs: Costs,
    corpus_tokens: int,
    size: int,
) -> dict[str, object]:
    """Writes and returns report.json's content. It travels with the draft: directories stand by their last part."""
    paths = {name: Path(getattr(config, name)) for name in ("target", "out", "self_play", "start")}
    named: dict[str, Any] = {name: path.name for name, path in paths.items() if path.exists()}
    config = replace(config, **named)
    content: dict[str, object] = {
        "command": command(config),
        "target": config.target,
        "num_parameters": size,
        "self_play_tokens": corpus_tokens,
        "trained_tokens": progress.num_tokens,
        "training_s": round(progress.trained_s, 1),
        "training_tokens_per_s": round(progress.num_tokens / max(progress.trained_s, 1e-9), 1),
        "held_out": asdict(figures),
        "costs": asdict(costs),
        "num_draft_tokens": config.num_draft_tokens,
        "expected_speed_up": round(costs.speed_up(figures.mean_acceptance_len, config.num_draft_tokens), 3),
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "settings": asdict(config),
        "curve": progress.curve,
    }
    (directory / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    return content


def command(config: TrainingConfig) -> str:
    """The command that gave these settings: what differs from the defaults."""
    parts = ["outrider train-draft"]
    for name, field in TrainingConfig.__dataclass_fields__.items():
        if (value := getattr(config, name)) != field.default:
            parts.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(parts)


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_curve(progress: Progress, path: Path) -> None:
    """Loss and acceptance over the tokens trained on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [point["num_tokens"] / 1e6 for point in progress.curve]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("train_loss", "training"), ("loss", "held out (forward KL)")):
        left.plot(tokens, [point[name] for point in progress.curve], marker=".", label=label)
    left.set(xlabel="million tokens trained on", ylabel="loss, nats a token")
    for name in ("greedy_acceptance", "warm_acceptance"):
        right.plot(tokens, [point[name] for point in progress.curve], marker=".", label=name.replace("_", " "))
    right.set(xlabel="million tokens trained on", ylabel="teacher-forced acceptance", ylim=(0, 1))
    twin = right.twinx()
    twin.plot(tokens, [p["mean_acceptance_len"] for p in progress.curve], "k--", label="mean acceptance length")
    twin.set(ylabel="tokens a verify step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    lines = [*right.get_lines(), *twin.get_lines()]
    right.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
