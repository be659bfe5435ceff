"""Compares a model's logits through the paged attention with those of its own attention, when it is loaded.

Owns: the comparison and its tolerance. Must not know: families of models. Passing means that chunked prefill,
interleaved sequences, continuation and overwriting a rejected tail give what whole sequences give on their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from services.common.errors import ModelUnsupported
from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.models import CausalModel
from services.engine.paged_attention import IMPLEMENTATION
from services.engine.runners import make_runner
from services.engine.sequence import Sequence
from services.engine.step import Work

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference of two logits, relative to the largest logit or 1."""

LENGTHS = (60, 24)
"""Tokens of the two sequences; the first has a chunk that is longer than any verification."""

_SEED = 20_231


class Feed(NamedTuple):
    """What one sequence gets in one step: its tokens up to `end`, then `num_drafted` more as a proposal."""

    sequence: int
    end: int
    num_rows: int = 0
    num_drafted: int = 0
    wrong: bool = False
    """The proposal is not what comes next: it must leave no trace once overwritten."""


SCRIPT = (
    (Feed(0, 9),),
    (Feed(0, 50, num_rows=1), Feed(1, 11)),
    (Feed(1, 18, num_rows=1), Feed(0, 51, num_rows=5, num_drafted=4, wrong=True)),
    (Feed(0, 52, num_rows=1), Feed(1, 19, num_rows=4, num_drafted=3)),
    (Feed(0, 53, num_rows=8, num_drafted=7), Feed(1, 23, num_rows=2, num_drafted=1)),
)


class Reference(NamedTuple):
    """What the model itself gives: the tokens of each sequence, and their logits (tokens, vocab_size)."""

    texts: list[list[int]]
    logits: list[torch.Tensor]
    tolerance: float


def reference_of(model: CausalModel) -> Reference:
    """Taken before anything of the model is replaced. Raises ModelUnsupported for too few positions."""
    if model.max_sequence_len < max(LENGTHS):
        raise ModelUnsupported(f"it has {model.max_sequence_len} positions; the check at load needs {max(LENGTHS)}")
    generator = torch.Generator().manual_seed(_SEED)
    texts = [torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    return Reference(texts, [_own_logits(model, text) for text in texts], TOLERANCE[model.dtype])


def self_check(model: CausalModel, block_size: int, reference: Reference | None = None) -> float:
    """Returns the relative difference found. Raises ModelUnsupported above tolerance or for too few positions."""
    texts, expected, tolerance = reference or reference_of(model)
    found = _paged_logits(model, texts, block_size)
    scale = max(1.0, *(float(logits.abs().max()) for logits in expected))
    differences = [(logits - expected[sequence][row]).abs().max() for sequence, row, logits in found]
    difference = float(torch.stack(differences).max()) / scale
    if not difference <= tolerance:
        raise ModelUnsupported(
            f"{type(model.module).__name__} through the paged attention differs from its own attention by "
            f"{difference:.1e} of the largest logit, more than {tolerance:.0e}: its result depends on something "
            "that the paged attention is not given"
        )
    return difference


@torch.inference_mode()
def _own_logits(model: CausalModel, text: list[int]) -> torch.Tensor:
    """Logits (len(text), vocab_size) of one whole sequence by the model's own eager attention."""
    tokens = torch.tensor(text, device=model.device)
    rows = torch.arange(len(text), device=model.device)
    model.module.set_attn_implementation("eager")
    try:
        return model.logits(tokens, rows, rows).float()
    finally:
        model.module.set_attn_implementation(IMPLEMENTATION)


def _paged_logits(model: CausalModel, texts: list[list[int]], block_size: int) -> list[tuple[int, int, torch.Tensor]]:
    """Feeds the texts by SCRIPT; returns (sequence, position, logits (vocab_size,)) of the rows with a reference."""
    counts = [-(-len(text) // block_size) for text in texts]
    runner = make_runner(model, 1 + sum(counts), block_size, max_graph_tokens=sum(LENGTHS))
    sequences = [_open(text[:1]) for text in texts]
    # Tables that are neither ascending nor contiguous: block 0 stays free, the sequences' blocks alternate.
    free = list(range(sum(counts), 0, -1))
    for index in range(max(counts)):
        for sequence, count in zip(sequences, counts, strict=True):
            if index < count:
                sequence.block_table.append(free.pop(0))
    found: list[tuple[int, int, torch.Tensor]] = []
    for feeds in SCRIPT:
        works = [_work(sequences[feed.sequence], texts[feed.sequence], feed, model.vocab_size) for feed in feeds]
        logits = torch.split(runner.forward(works), [feed.num_rows for feed in feeds])
        for feed, rows in zip(feeds, logits, strict=True):
            for row in range(min(1, feed.num_rows) if feed.wrong else feed.num_rows):
                found.append((feed.sequence, feed.end - 1 + row, rows[row].clone()))
            sequences[feed.sequence].num_cached = feed.end
    return found


def _open(prefix: list[int]) -> Sequence:
    identity = Identity(session_id="self-check", lease_epoch=0, attempt=0, round=0, base_len=len(prefix))
    item = Open(identity, tuple(prefix), 1, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 0)
    return Sequence.from_open(item)


def _work(sequence: Sequence, text: list[int], feed: Feed, vocab_size: int) -> Work:
    sequence.tokens = text[: feed.end]
    drafted = text[feed.end : feed.end + feed.num_drafted]
    if feed.wrong:
        drafted = [(token + 1) % vocab_size for token in drafted]
    proposal = Proposal(0, tuple(drafted)) if drafted else None
    return Work(sequence, feed.end - sequence.num_cached, proposal, feed.num_rows)
