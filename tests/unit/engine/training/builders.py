"""Targets and self-play for the tests of training: real files, made in a second."""

from __future__ import annotations

from pathlib import Path

from services.engine.progress import Reporter
from services.engine.training.config import TrainingConfig
from services.engine.training.stages import run
from services.engine.training.stop import Stop

QUIET = Reporter(quiet=True)


def settings(target: Path, out: Path, **changes: object) -> TrainingConfig:
    """A run of seconds: some 150 conversations of at most 96 tokens, a student of one layer."""
    values: dict[str, object] = {
        "target": str(target),
        "out": str(out),
        "dtype": "float32",
        "threads": 1,
        "num_sequences": 16,
        "max_conversation_len": 96,
        "self_play_tokens": 10_000,
        "shard_tokens": 2_000,
        "head_tokens": 200,
        "train_tokens": 60_000,
        "batch_tokens": 512,
        "learning_rate": 3e-3,
        "checkpoint_minutes": 100.0,
    }
    return TrainingConfig(**(values | changes))  # type: ignore[arg-type]


def train(config: TrainingConfig, stop: Stop | None = None) -> bool:
    return run(config, QUIET, stop or Stop())


class StopAfter(Stop):
    """Asks for the end when it has been asked `num` times."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self._left = num

    @property
    def wanted(self) -> bool:
        self._left -= 1
        return self._left < 0
