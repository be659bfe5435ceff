"""The paged attention gives a model's own logits, however a sequence's tokens are split over steps and batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ModelUnsupported
from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.block_manager import BlockManager
from services.engine.model_runner import ModelRunner
from services.engine.models import CausalModel, probe_model
from services.engine.paged_attention import IMPLEMENTATION, paged_attention, register
from services.engine.sequence import Sequence
from services.engine.step import Work
from tests.tiny_models import SUPPORTED_FAMILIES, build_model

VOCAB_SIZE = 64
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def paged(module: transformers.PreTrainedModel) -> CausalModel:
    register()
    module.set_attn_implementation(IMPLEMENTATION)
    return probe_model(module, torch.float32, torch.device("cpu"))


def own_logits(module: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = module(torch.tensor([tokens]), use_cache=False).logits[0]
    module.set_attn_implementation(before)
    return logits


def random_tokens(num_tokens: int, seed: int) -> list[int]:
    # Id 0 is left out: it pads, and some families warn about inputs that begin or end with it.
    return [random.Random(seed * 1000 + i).randrange(1, VOCAB_SIZE) for i in range(num_tokens)]


class Harness:
    """A runner with a real block manager; feeds known texts and compares every row with the model's own logits."""

    def __init__(self, module: transformers.PreTrainedModel, texts: list[list[int]], block_size: int = 4) -> None:
        self.texts = texts
        self.expected = [own_logits(module, text) for text in texts]
        num_blocks = sum(len(text) // block_size + 9 for text in texts)
        self.runner = ModelRunner(paged(module), num_blocks, block_size)
        self.blocks = BlockManager(num_blocks, block_size)
        self.sequences = [self._open(text) for text in texts]

    @staticmethod
    def _open(text: list[int]) -> Sequence:
        item = Open(
            Identity("s", 0, 0, 0, len(text)),
            tuple(text[:1]),
            1,
            frozenset(),
            SamplingParams(),
            VerificationMethod.COUPLED,
            0,
        )
        return Sequence.from_open(item)

    def work(self, index: int, end: int, drafted: list[int] | None = None, rows: bool = True) -> Work:
        """Text `index` up to `end`, then `drafted` as a proposal."""
        sequence = self.sequences[index]
        sequence.tokens = self.texts[index][:end]
        proposal = Proposal(0, tuple(drafted)) if drafted is not None else None
        num_drafted = len(drafted or ())
        self.blocks.extend(sequence, end + num_drafted)
        return Work(sequence, end - sequence.num_cached, proposal, 1 + num_drafted if rows else 0)

    def step(self, works: list[Work]) -> list[torch.Tensor]:
        """Runs a step, then truncates every sequence to its own tokens, as after a full rejection."""
        logits = torch.split(self.runner.forward(works), [work.num_rows for work in works])
        for work in works:
            work.sequence.num_cached = len(work.sequence.tokens)
            self.blocks.truncate(work.sequence, work.sequence.num_cached)
        self.blocks.check_integrity(self.sequences)
        return list(logits)

    def check(self, index: int, first_row: int, logits: torch.Tensor) -> None:
        torch.testing.assert_close(
            logits, self.expected[index][first_row : first_row + len(logits)], atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_chunks_interleaved_sequences_and_rejected_tails_give_the_models_own_logits(family: str) -> None:
    texts = [random_tokens(80, 1), random_tokens(33, 2), random_tokens(20, 3)]
    run = Harness(build_model(family, vocab_size=VOCAB_SIZE), texts)
    run.step([run.work(0, 7, rows=False)])
    _, short = run.step([run.work(0, 60, rows=False), run.work(1, 20)])
    run.check(1, 19, short)
    run.step([run.work(1, 21, random_tokens(6, 9)), run.work(0, 61, random_tokens(5, 8))])
    third, first, second = run.step(
        [run.work(2, 18, texts[2][18:20]), run.work(0, 62, texts[0][62:70]), run.work(1, 22)]
    )
    run.check(2, 17, third)
    run.check(0, 61, first)
    run.check(1, 21, second)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_split_into_steps_gives_the_models_own_logits(seed: int) -> None:
    rng = random.Random(seed)
    texts = [random_tokens(rng.randint(2, 70), i) for i in range(rng.randint(1, 5))]
    module = build_model("mistral", vocab_size=VOCAB_SIZE, sliding_window=rng.choice([None, 5, 40]))
    run = Harness(module, texts, block_size=rng.choice([1, 4, 16]))
    while any(sequence.num_cached < len(text) for sequence, text in zip(run.sequences, texts, strict=True)):
        works, indices = [], []
        for index in rng.sample(range(len(texts)), len(texts)):
            cached, text = run.sequences[index].num_cached, texts[index]
            if cached == len(text) or (works and rng.random() < 0.3):
                continue
            end = rng.randint(cached + 1, len(text))
            works.append(run.work(index, end, text[end : end + rng.randint(0, 8)] or None))
            indices.append((index, end - 1))
        for (index, row), logits in zip(indices, run.step(works), strict=True):
            run.check(index, row, logits)


def test_a_sliding_window_hides_what_lies_behind_it() -> None:
    module = build_model("mistral", vocab_size=VOCAB_SIZE, sliding_window=6, num_layers=1)
    tail = random_tokens(6, 1)
    run = Harness(module, [random_tokens(20, 2) + tail, random_tokens(20, 3) + tail])
    a, b = run.step([run.work(0, 26), run.work(1, 26)])
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
    run.check(0, 25, a)


def test_a_window_far_behind_the_first_blocks_is_exact() -> None:
    module = build_model("gemma3", vocab_size=VOCAB_SIZE, sliding_window=8, max_len=1200)
    run = Harness(module, [random_tokens(1150, 1), random_tokens(12, 2)], block_size=16)
    run.step([run.work(0, 1100, rows=False)])
    long, short = run.step([run.work(0, 1101, run.texts[0][1101:1105]), run.work(1, 12)])
    run.check(0, 1100, long)
    run.check(1, 11, short)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (4, 2), (4, 4)])
def test_query_heads_meet_their_own_key_head(num_heads: int, num_kv_heads: int) -> None:
    module = build_model("llama", vocab_size=VOCAB_SIZE, num_heads=num_heads, num_kv_heads=num_kv_heads)
    run = Harness(module, [random_tokens(30, 1), random_tokens(9, 2)])
    first, second = run.step([run.work(0, 25, run.texts[0][25:30]), run.work(1, 9)])
    run.check(0, 24, first)
    run.check(1, 8, second)


def test_stale_contents_of_reused_blocks_leave_no_trace() -> None:
    module = build_model("llama", vocab_size=VOCAB_SIZE)
    run = Harness(module, [random_tokens(40, 1), random_tokens(11, 2)])
    for keys, values in zip(run.runner.pool._keys, run.runner.pool._values, strict=True):
        keys.fill_(100.0)
        values.fill_(-100.0)
    first, second = run.step([run.work(0, 38), run.work(1, 11)])
    run.check(0, 37, first)
    run.check(1, 10, second)


def test_a_step_without_rows_fills_the_cache_and_yields_no_logits() -> None:
    run = Harness(build_model("gpt2", vocab_size=VOCAB_SIZE), [random_tokens(20, 1)])
    (logits,) = run.step([run.work(0, 12, rows=False)])
    assert logits.shape == (0, VOCAB_SIZE)
    (logits,) = run.step([run.work(0, 13)])
    run.check(0, 12, logits)


def test_a_model_without_logits_to_keep_yields_the_same_rows() -> None:
    module = build_model("llama", vocab_size=VOCAB_SIZE)
    run = Harness(module, [random_tokens(20, 1)])
    run.runner = ModelRunner(replace(run.runner.model, keeps_logits=False), 64, 4)
    (logits,) = run.step([run.work(0, 15, run.texts[0][15:18])])
    run.check(0, 14, logits)


def test_attention_calls_do_not_grow_with_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_model("llama", vocab_size=VOCAB_SIZE)
    run = Harness(module, [random_tokens(60, i) for i in range(7)])
    num_calls = 0
    product = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return product(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    run.step([run.work(i, 50 if i < 3 else 5 + i) for i in range(7)])
    assert num_calls == 2 * len(run.runner.model.layer_shapes)


class NoStep:
    def attend(self, call: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"s_aux": torch.zeros(1)}, "'s_aux'"),
        ({"position_bias": torch.zeros(1)}, "'position_bias'"),
        ({"attention_mask": torch.zeros(1)}, "mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
        ({"paged_step": None}, "extra keywords"),
    ],
)
def test_an_argument_that_could_change_the_result_is_refused(arguments: dict[str, object], sentence: str) -> None:
    module = torch.nn.Module()
    module.layer_idx = 0
    tensor = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ModelUnsupported, match=sentence):
        paged_attention(module, tensor, tensor, tensor, **({"paged_step": NoStep()} | arguments))


def test_arguments_that_cannot_change_the_result_are_taken() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0
    tensor = torch.ones(1, 1, 1, 1)
    attended, _ = paged_attention(
        module, tensor, tensor, tensor, None, paged_step=NoStep(), position_ids=tensor, s_aux=None, use_cache=False
    )
    assert attended.shape == (1, 1, 1, 1)
