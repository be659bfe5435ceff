"""What is measured of a model: memory, steps, rates, and transformers beside them.

Owns: how each figure is taken. Must not know: how figures are shown. A step's time is that of forward and verification
together, on the host's clock, until the tokens are there.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

from bench.gpu.models import BLOCK_SIZE, BenchModel
from services.common.items import Identity
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.paged_attention import IMPLEMENTATION
from services.engine.sampler import Sampler
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.verifier import Verifier

MIN_REPEATS = 3


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of `batch` sequences with `rows` rows each. `share`: of the memory's limit for reading the weights."""

    batch: int
    rows: int
    ms: float
    share: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second over all sequences. `acceptance`: of each draft token, given those before it; None: plain."""

    engine: str
    batch: int
    num_draft_tokens: int
    acceptance: float | None
    tokens_per_s: float


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second that a copy within the device's memory moves, read and written; the best of ten."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(timed(device, lambda: target.copy_(source)) for _ in range(10))


def timed(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds that `function` takes until the device is done."""
    _synchronize(device)
    started = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - started


def step_time(bench: BenchModel, batch: int, rows: int, context: int, bandwidth: float, budget_s: float) -> StepTime:
    """The median over as many steps as `budget_s` holds, behind two that are not counted."""
    verifier = Verifier()
    works = [
        Work(sequence, 1, Proposal(0, (1,) * (rows - 1)) if rows > 1 else None, rows)
        for sequence in _sequences(batch, context, rows, bench.model.vocab_size)
    ]

    def step() -> None:
        with torch.inference_mode():
            verifier.verify(works, bench.runner.forward(works))

    for _ in range(2):
        step()
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or sum(seconds) < budget_s:
        seconds.append(timed(bench.model.device, step))
    median = statistics.median(seconds)
    return StepTime(batch, rows, median * 1e3, bench.weight_bytes / bandwidth / median)


def speculative_rate(
    target: BenchModel,
    draft: BenchModel,
    batch: int,
    num_draft_tokens: int,
    acceptance: float,
    context: int,
    seconds: float,
) -> Rate:
    """Rounds of drafting and verification in turn, in one process; how many tokens stand is drawn, not computed."""
    rng, verifier, sampler = random.Random(7), Verifier(), Sampler()
    width = num_draft_tokens + 1
    bodies = _sequences(batch, context, 2 * width, target.model.vocab_size)
    sketches = _sequences(batch, context, 2 * width, draft.model.vocab_size)
    num_tokens, spent = 0, 0.0
    while spent < seconds or not num_tokens:
        accepted = [_draw_accepted(rng, num_draft_tokens, acceptance) for _ in range(batch)]

        def one_round() -> None:
            with torch.inference_mode():
                for _ in range(num_draft_tokens):
                    works = [Work(sketch, sketch.num_uncached_tokens, None, 1) for sketch in sketches]
                    drawn = sampler.sample(works, draft.runner.forward(works))
                    for sketch, sampled in zip(sketches, drawn, strict=True):
                        sketch.num_cached = len(sketch)
                        sketch.tokens.append(sampled.token_id if sampled else 0)
                proposals = [Proposal(0, tuple(sketch.tokens[-num_draft_tokens:])) for sketch in sketches]
                works = [Work(body, 1, proposal, width) for body, proposal in zip(bodies, proposals, strict=True)]
                verifier.verify(works, target.runner.forward(works))

        spent += timed(target.model.device, one_round)
        num_tokens += sum(accepted) + batch
        for body, sketch, count in zip(bodies, sketches, accepted, strict=True):
            # Every round starts at the same context. After a full acceptance the draft's next step has two rows.
            del sketch.tokens[context:]
            sketch.num_cached = context - (2 if count == num_draft_tokens else 1)
            body.num_cached = context - 1
    return Rate("outrider", batch, num_draft_tokens, acceptance, num_tokens / spent)


def transformers_rate(bench: BenchModel, assistant: BenchModel | None, num_draft_tokens: int, num_tokens: int) -> Rate:
    """transformers' own generate, one sequence, greedily, with its default cache; assisted by the assistant given."""
    modules = [bench.model.module, *([assistant.model.module] if assistant else [])]
    for module in modules:
        module.set_attn_implementation("sdpa")
    prompt = torch.randint(bench.model.vocab_size, (1, 32), device=bench.model.device)
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0
    )
    extra = {}
    if assistant:
        assistant.model.module.generation_config.num_assistant_tokens = num_draft_tokens
        assistant.model.module.generation_config.num_assistant_tokens_schedule = "constant"
        extra = {"assistant_model": assistant.model.module}

    def generate() -> None:
        with torch.inference_mode():
            bench.model.module.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config, **extra
            )

    try:
        generate()
        seconds = timed(bench.model.device, generate)
    finally:
        for module in modules:
            module.set_attn_implementation(IMPLEMENTATION)
    return Rate("transformers", 1, num_draft_tokens if assistant else 0, None, num_tokens / seconds)


def num_blocks_for(batch: int, context: int, rows: int) -> int:
    """Blocks of the pool that `batch` sequences of the step need."""
    return batch * -(-(context + rows) // BLOCK_SIZE)


def _sequences(batch: int, context: int, room: int, vocab_size: int) -> list[Sequence]:
    """`context` tokens each, all but the last one cached; blocks are dealt round so that none follow each other."""
    num_blocks, rng = -(-(context + room) // BLOCK_SIZE), random.Random(1)
    sequences = []
    for line in range(batch):
        sequences.append(
            Sequence(
                identity=Identity(str(line), 1, 1, 0, context),
                tokens=[rng.randrange(vocab_size) for _ in range(context)],
                prompt_len=context,
                eos_token_ids=frozenset(),
                sampling=SamplingParams(temperature=0.0),
                verification=VerificationMethod.COUPLED,
                max_len=1 << 20,
                num_cached=context - 1,
                block_table=[line + batch * place for place in range(num_blocks)],
            )
        )
    return sequences


def _draw_accepted(rng: random.Random, num_draft_tokens: int, acceptance: float) -> int:
    return next((n for n in range(num_draft_tokens) if rng.random() >= acceptance), num_draft_tokens)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
