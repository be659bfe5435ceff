"""What a draft costs beside its target on this machine: steps of both through the engine's own runners.

Owns: the measurement and the formula. Must not know: how the draft came about. In units of one plain step of the target
(one row): v is a verification step of K + 1 rows, c one token of the draft; E tokens a step then give a speed-up of
E / (v + K c) (Leviathan et al. 2023, section 3.2, with v for its 1).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.runners import Runner
from services.engine.sequence import Sequence
from services.engine.step import Work

_CONTEXT_LEN = 256
_NUM_REPEATS = 15


@dataclass(frozen=True, slots=True)
class Costs:
    """Medians, one sequence with 256 tokens behind it."""

    target_step_ms: float
    verify_step_ms: float
    draft_step_ms: float

    @property
    def verify(self) -> float:
        return self.verify_step_ms / self.target_step_ms

    @property
    def draft(self) -> float:
        return self.draft_step_ms / self.target_step_ms

    def speed_up(self, mean_acceptance_len: float, num_draft_tokens: int) -> float:
        return mean_acceptance_len / (self.verify + num_draft_tokens * self.draft)


class Forward(Protocol):
    """A Runner, or what else computes a draft's logits."""

    def forward(self, works: list[Work]) -> torch.Tensor: ...


def measure_costs(target: Runner, draft: Forward, num_draft_tokens: int) -> Costs:
    """Takes turns between the three kinds of step, so that a slow moment of the machine is shared. Needs 20 blocks."""
    times: tuple[list[float], ...] = ([], [], [])
    kinds: tuple[tuple[Forward, int], ...] = ((target, 0), (target, num_draft_tokens), (draft, 0))
    for _ in range(_NUM_REPEATS + 2):
        for (runner, num_drafted), found in zip(kinds, times, strict=True):
            found.append(_step_s(runner, num_drafted, target.pool.block_size, target.model.device))
    return Costs(*(float(np.median(found[2:])) * 1e3 for found in times))


def _step_s(runner: Forward, num_drafted: int, block_size: int, device: torch.device) -> float:
    num_tokens = _CONTEXT_LEN + 1
    identity = Identity("cost", 0, 0, 0, num_tokens)
    item = Open(identity, (1,) * num_tokens, 1, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 64)
    sequence = Sequence.from_open(item)
    sequence.num_cached = _CONTEXT_LEN
    sequence.block_table = list(range(-(-(num_tokens + num_drafted) // block_size)))
    proposal = Proposal(0, (1,) * num_drafted) if num_drafted else None
    work = Work(sequence, 1, proposal, num_rows=1 + num_drafted)
    _synchronise(device)
    started = time.perf_counter()
    runner.forward([work])
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
