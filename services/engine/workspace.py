"""The memory that a worker's largest step takes on a CUDA device beside weights and pool: found by running one.

Owns: what the largest step is. Must not know: the pool's size, schedulers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.models import CausalModel
from services.engine.runners import make_runner
from services.engine.sequence import Sequence
from services.engine.step import Work

_NUM_LOGITS_COPIES = 3
"""Float32 copies of the logits that processing holds at once: penalised, sorted, its scores."""


class StepLimits(NamedTuple):
    """The most that one step computes."""

    num_prefill_tokens: int
    num_sequences: int
    num_rows: int
    """Of each sequence."""


def measure_workspace(model: CausalModel, limits: StepLimits, block_size: int) -> int:
    """Peak bytes of the largest step. Every token is written to one scratch block: nothing is kept."""
    runner = make_runner(model, 1, block_size)
    works = _largest_step(limits, min(limits.num_prefill_tokens, model.max_sequence_len), block_size)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    logits = runner.forward(works)
    peak = torch.cuda.max_memory_allocated(model.device)
    return peak - before + _NUM_LOGITS_COPIES * logits.numel() * logits.element_size()


def _largest_step(limits: StepLimits, num_prefill_tokens: int, block_size: int) -> list[Work]:
    proposal = Proposal(0, (0,) * (limits.num_rows - 1)) if limits.num_rows > 1 else None
    works = [Work(_open(1, limits.num_rows, block_size), 1, proposal, limits.num_rows)] * limits.num_sequences
    return [*works, Work(_open(num_prefill_tokens, num_prefill_tokens, block_size), num_prefill_tokens)]


def _open(num_tokens: int, num_computed: int, block_size: int) -> Sequence:
    identity = Identity(session_id="workspace", lease_epoch=0, attempt=0, round=0, base_len=num_tokens)
    sampling, method = SamplingParams(), VerificationMethod.COUPLED
    sequence = Sequence.from_open(Open(identity, (0,) * num_tokens, 1, frozenset(), sampling, method, 0))
    sequence.block_table = [0] * -(-num_computed // block_size)
    return sequence
