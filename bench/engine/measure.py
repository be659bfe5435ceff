"""What is measured of the engine and of transformers, one call a round.

Owns: how each figure is taken. Must not know: what is made of it. All times are the host's, single process, and the
engine is driven through its core without a wire.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from services.common.items import Close, Decode, Identity, Open, Refused, Tokens
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.block_manager import BlockManager
from services.engine.memory import module_bytes
from services.engine.paged_model import PagedEngine, PagedTargetModel
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.verifier import Verifier
from services.target.core import TargetCore

MAX_SEQUENCES = 16
GREEDY = SamplingParams(temperature=0.0)


def weight_bytes(module: Any) -> int:
    """Bytes of all weights but an input embedding that is not the head too, of which a step reads a few lines."""
    embedding, head = module.get_input_embeddings().weight, getattr(module.get_output_embeddings(), "weight", None)
    return module_bytes(module) - (0 if embedding is head else embedding.nbytes)


def read_bandwidth(array: torch.Tensor) -> float:
    """Bytes a second of summing `array`, which should be larger than the caches."""
    return array.nbytes / _timed(array.sum)


def opening(name: str, prefix: tuple[int, ...], base_len: int, num_tokens: int) -> Open:
    """Of a greedy sequence without an end."""
    identity = Identity(name, 1, 1, 0, base_len)
    return Open(identity, prefix, base_len, frozenset(), GREEDY, VerificationMethod.COUPLED, num_tokens)


class EngineBench:
    """One loaded engine and the calls on it. Every call leaves no sequence open."""

    def __init__(self, engine: PagedEngine, prefill_budget: int) -> None:
        self._engine = engine
        self._model = PagedTargetModel(engine, Verifier())
        self._prefill_budget = prefill_budget
        self._rng = random.Random(7)

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """Random tokens, never the same twice."""
        return tuple(self._rng.randrange(self._engine.info.vocab_size) for _ in range(num_tokens))

    def step_ms(self, sequences: int, rows: int, context: int) -> float:
        """One step of `sequences` sequences with `rows` rows each, verification included."""
        step = self.step(sequences, rows, context)
        step()
        return _timed(step) * 1e3

    def step(self, sequences: int, rows: int, context: int) -> Callable[[], object]:
        """The same step, whenever it is called."""
        blocks, size = 1 + (context + rows) // self._engine.block_size, self._engine.block_size
        works = []
        for line in range(sequences):
            sequence = Sequence.from_open(opening(str(line), self.prompt(context), context, 2 * size))
            sequence.num_cached = context - 1
            sequence.block_table.extend(range(line, line + blocks * sequences, sequences))
            works.append(Work(sequence, 1, Proposal(0, (1,) * (rows - 1)) if rows > 1 else None, rows))
        return lambda: self._model.step(works)

    def tokens_per_s(self, sequences: int, prompt_len: int, num_tokens: int) -> float:
        """Plain decoding of `num_tokens` tokens of each sequence, from when all have their first until they have them.

        None of them ends in between, however far apart they began.
        """
        driver = self._driver()
        names = [str(line) for line in range(sequences)]
        for name in names:
            driver.decode(name, self.prompt(prompt_len), 2 * (num_tokens + sequences * prompt_len))
        driver.run(lambda: len(driver.arrivals) == sequences)
        first = {name: len(driver.arrivals[name]) for name in names}
        counted, started = driver.num_tokens, time.perf_counter()
        driver.run(lambda: all(len(driver.arrivals[name]) >= first[name] + num_tokens for name in names))
        return (driver.num_tokens - counted) / (time.perf_counter() - started)

    def burst_tokens_per_s(self, sequences: int, prompt_len: int, num_tokens: int) -> float:
        """Tokens a second of requests that come together, from then until all have their `num_tokens` tokens."""
        driver = self._driver()
        started = time.perf_counter()
        for line in range(sequences):
            driver.decode(str(line), self.prompt(prompt_len), num_tokens)
        driver.run(lambda: not driver.has_work)
        return driver.num_tokens / (time.perf_counter() - started)

    def ttft_ms(self, first_len: int, answer_len: int, more_len: int) -> tuple[float, float]:
        """First-token times of a cold prompt, and of a second turn of the same length."""
        driver = self._driver()
        first = self.prompt(first_len)
        cold = driver.ttft_ms("cold", self.prompt(first_len + answer_len + more_len))
        driver.decode("first", first, answer_len)
        driver.run(lambda: not driver.has_work)
        history = first + driver.tokens["first"]
        driver.close("first", len(history))
        return cold, driver.ttft_ms("second", history + self.prompt(more_len))

    def gaps_ms(self, sequences: int, prompt_len: int, num_tokens: int, prefill_len: int) -> tuple[list[float], ...]:
        """Times between tokens of decoding sequences: alone for `num_tokens` tokens each, then beside a prefill."""
        driver = self._driver()
        names = [str(line) for line in range(sequences)]
        budget = 2 * num_tokens + 2 * prefill_len
        for name in names:
            driver.decode(name, self.prompt(prompt_len), budget)
        driver.run(lambda: len(driver.arrivals) == sequences)
        before = {name: len(driver.arrivals[name]) - 1 for name in names}
        driver.run(lambda: all(len(driver.arrivals[name]) > before[name] + num_tokens for name in names))
        alone = [gap for name in names for gap in driver.gaps_ms(name)[before[name] :]]
        before = {name: len(driver.arrivals[name]) - 1 for name in names}
        driver.decode("prefill", self.prompt(prefill_len), 1)
        driver.run(lambda: bool(driver.arrivals.get("prefill")))
        return alone, [gap for name in names for gap in driver.gaps_ms(name)[before[name] :]]

    def _driver(self) -> Driver:
        blocks = BlockManager(self._engine.num_blocks, self._engine.block_size)
        max_len = min(self._engine.max_sequence_len, blocks.num_blocks * blocks.block_size)
        core = TargetCore(
            self._model,
            blocks,
            max_sequences=MAX_SEQUENCES,
            max_sequence_len=max_len,
            max_draft_tokens=8,
            prefill_budget=self._prefill_budget,
        )
        return Driver(core, max_len)


class Driver:
    """Drives one core, and notes when each session's tokens come."""

    def __init__(self, core: TargetCore, max_len: int) -> None:
        self._core = core
        self._max_len = max_len
        self.arrivals: dict[str, list[float]] = {}
        """Seconds, a value a token."""
        self.tokens: dict[str, tuple[int, ...]] = {}

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.arrivals.values()))

    def decode(self, name: str, prompt: tuple[int, ...], num_tokens: int) -> None:
        """Asks for that many tokens, or as many as a sequence may have."""
        num_tokens = min(num_tokens, self._max_len - len(prompt))
        opened = opening(name, prompt, len(prompt), num_tokens)
        self._take(self._core.handle(1, [opened, Decode(opened.identity, num_tokens)]))

    def close(self, name: str, base_len: int) -> None:
        self._take(self._core.handle(1, [Close(Identity(name, 1, 1, 0, base_len))]))

    def run(self, is_done: Callable[[], bool]) -> None:
        """Steps until `is_done`. Raises RuntimeError where the core runs out of work before."""
        while not is_done():
            if not self._core.has_work:
                raise RuntimeError("the core has nothing left to do")
            self._take(self._core.step())

    def ttft_ms(self, name: str, prompt: tuple[int, ...]) -> float:
        """From the request to its one token."""
        started = time.perf_counter()
        self.decode(name, prompt, 1)
        self.run(lambda: name in self.arrivals)
        self.close(name, len(prompt) + 1)
        return (self.arrivals[name][0] - started) * 1e3

    def gaps_ms(self, name: str) -> list[float]:
        times = self.arrivals[name]
        return [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(times)]

    def _take(self, results: list[tuple[int, Any]]) -> None:
        now = time.perf_counter()
        for _, result in results:
            if isinstance(result, Refused):
                raise result.error
            if isinstance(result, Tokens):
                name = result.identity.session_id
                self.arrivals.setdefault(name, []).extend([now] * len(result.token_ids))
                self.tokens[name] = self.tokens.get(name, ()) + result.token_ids


class PeerBench:
    """transformers' own `generate` on the same weights: one sequence, greedily, with its fused attention."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._module = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
        ).eval()

    def tokens_per_s(self, prompt: tuple[int, ...], num_tokens: int, cache: str | None, compiled: bool) -> float:
        """Tokens behind the first: a run of one token is taken off a run of all."""
        seconds = self._seconds(prompt, 1 + num_tokens, cache, compiled)
        return num_tokens / (seconds - self._seconds(prompt, 1, cache, compiled))

    def continuous_tokens_per_s(self, prompts: list[list[int]], num_tokens: int) -> float:
        """transformers' continuous batching over all prompts, prefill included."""
        config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, eos_token_id=-1
        )
        batching = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512, use_cuda_graph=False)
        started = time.perf_counter()
        found = self._module.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching, warmup=False
        )
        count = sum(len(output.generated_tokens) for output in found.values())
        if count != len(prompts) * num_tokens:
            errors = {str(output.error) for output in found.values() if output.error}
            raise RuntimeError(f"{count} of {len(prompts) * num_tokens} tokens came {errors or ''}".strip())
        return count / (time.perf_counter() - started)

    def _seconds(self, prompt: tuple[int, ...], num_tokens: int, cache: str | None, compiled: bool) -> float:
        compiling = transformers.CompileConfig()
        compiling._compile_all_devices = compiled
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            cache_implementation=cache,
            compile_config=compiling if compiled else None,
            disable_compile=not compiled,
        )
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            return _timed(
                lambda: self._module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            )


def _timed(function: Callable[[], object]) -> float:
    """Seconds that `function` takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
