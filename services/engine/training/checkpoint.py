"""A training run on disk: weights, the optimiser's moments and where in the data it is, in one file.

Owns: that file (safetensors, replaced as a whole). Must not know: models, losses.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import ConfigError
from services.engine.training.shards import write_atomically

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Progress:
    """How far a run is. `shards` are those of the epoch under way: files added meanwhile wait for the next."""

    settings: dict[str, object]
    """What must be the same when the run goes on."""
    shards: list[str] = field(default_factory=list)
    epoch: int = 0
    next_batch: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_evaluations: int = 0
    trained_s: float = 0.0
    last_loss: float = 0.0
    """Of training, smoothed."""
    curve: list[dict[str, float]] = field(default_factory=list)


def save(
    path: Path,
    progress: Progress,
    head_ids: Tensor,
    trained: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
) -> None:
    """Replaces the checkpoint; after a crash the former one or this one is there."""
    tensors = {"head_ids": head_ids.cpu()}
    for name, parameter in trained.items():
        tensors[f"param.{name}"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"progress": json.dumps(asdict(progress))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def read_progress(path: Path) -> tuple[Progress, Tensor]:
    """What `load` needs to know first: how far the run is, and its output vocabulary."""
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if "progress" not in header:
            raise ConfigError(f"out: {path} is no checkpoint")
        return Progress(**json.loads(header["progress"])), file.get_tensor("head_ids")


def load(path: Path, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, num_steps: int) -> None:
    """Puts weights and moments where they were."""
    with safe_open(path, "pt") as file, torch.no_grad():
        names = set(file.keys())
        for name, parameter in trained.items():
            parameter.copy_(file.get_tensor(f"param.{name}"))
            if f"{_MOMENTS[0]}.{name}" in names:
                moments = {m: file.get_tensor(f"{m}.{name}").to(parameter.device) for m in _MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(num_steps)), **moments}
