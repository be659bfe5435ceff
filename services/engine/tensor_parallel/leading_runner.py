"""Computes steps on every rank of a model: rank 0's runner, and what the others do.

Owns: that all ranks compute the same step. Must not know: processes, how a step is laid out, sampling, the wire.
"""

from __future__ import annotations

from typing import Protocol

import torch

from services.common.errors import WorkerFailed
from services.engine.kv_pool import KvPool
from services.engine.models import CausalModel
from services.engine.runners import Runner
from services.engine.step import Work
from services.engine.tensor_parallel.message import Ints, pack, unpack


class Followers(Protocol):
    """The other ranks: services.engine.tensor_parallel.ranks.Ranks."""

    def send(self, message: Ints) -> None: ...


class LeadingRunner:
    """A Runner whose model is one shard of several."""

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers

    @property
    def model(self) -> CausalModel:
        return self._runner.model

    @property
    def pool(self) -> KvPool:
        return self._runner.pool

    def forward(self, works: list[Work]) -> torch.Tensor:
        """As Runner.forward. Raises WorkerFailed where a step fails: the ranks are out of step from then on."""
        if not works:
            return self._runner.forward(works)
        self._followers.send(pack(works))
        try:
            return self._runner.forward(works)
        except Exception as error:
            raise WorkerFailed(f"a step failed on rank 0, and the ranks cannot go on together: {error}") from error


def obey(runner: Runner, message: Ints) -> None:
    """Computes another rank's part of a step, or zeroes its pool."""
    if works := unpack(message):
        runner.forward(works)
    else:
        runner.pool.clear(range(runner.pool.num_blocks))
