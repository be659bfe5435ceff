"""The load: conversations sent in a closed or an open loop, plain and speculative in turns.

Owns: who is sent when. Must not know: what becomes of the samples.

Prompts are cold: each conversation has a cache salt of its own in each mode, so that no request finds the prefix that
another one left in the workers' caches, but a further turn that of its own first.

Machines are noisy, so the two modes alternate in blocks, and a block's first mode alternates too: drift and other load
hit both alike. A block is one conversation where one runs at a time, else a few for each place, to keep places busy.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from services.cli.bench.sample import Failure, Key, Mode, Sample, measure
from services.cli.prompts import Conversation
from services.client import Chat, GenerateOptions, OutriderClient, Prompt

_BLOCK_ROUNDS = 4
_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How to send. A `rate` (conversations a second, Poisson) makes it an open loop; else `concurrency` at a time."""

    options: GenerateOptions
    modes: tuple[Mode, ...] = (Mode.PLAIN, Mode.SPECULATIVE)
    concurrency: int = 1
    rate: float | None = None
    seed: int = 0
    raw: bool = False
    all_turns: bool = False
    num_warmups: int = 1

    @property
    def block_len(self) -> int:
        """Conversations of a block."""
        if self.rate is not None:
            return 8
        return 1 if self.concurrency == 1 else self.concurrency * _BLOCK_ROUNDS

    def options_for(self, mode: Mode, index: int) -> GenerateOptions:
        """A conversation's options: its own seed, the same in both modes."""
        options = replace(self.options, seed=(self.seed + index) & _SEED_MASK)
        return replace(options, num_draft_tokens=0) if mode is Mode.PLAIN else options


class Block(NamedTuple):
    """What one block in one mode gave, and how long it took."""

    mode: Mode
    outcomes: tuple[Sample | Failure, ...]
    wall_ns: int


class Load:
    """Sends a plan's conversations to one client."""

    def __init__(self, client: OutriderClient, plan: LoadPlan, on_done: Callable[[], None] = lambda: None) -> None:
        """`on_done` is called after each conversation."""
        self._client = client
        self._plan = plan
        self._on_done = on_done

    async def warm_up(self, conversations: Sequence[Conversation]) -> None:
        """Sends the first conversations shortened, in every mode; raises OutriderError if one fails."""
        for mode in self._plan.modes:
            for index, conversation in enumerate(conversations[: self._plan.num_warmups]):
                options = self._plan.options_for(mode, index)
                options = replace(_cold(options), max_tokens=min(8, options.max_tokens))
                await self._client.complete(self._prompt(conversation.turns[0]), options)

    async def run(self, conversations: Sequence[Conversation]) -> AsyncIterator[Block]:
        """Every conversation in every mode, block by block."""
        numbered = list(enumerate(conversations))
        blocks = [numbered[i : i + self._plan.block_len] for i in range(0, len(numbered), self._plan.block_len)]
        for number, block in enumerate(blocks):
            modes = self._plan.modes if number % 2 == 0 else self._plan.modes[::-1]
            for mode in modes:
                started_ns = time.perf_counter_ns()
                outcomes = await self._run_block(mode, block)
                yield Block(mode, tuple(outcomes), time.perf_counter_ns() - started_ns)

    async def _run_block(self, mode: Mode, block: list[tuple[int, Conversation]]) -> list[Sample | Failure]:
        send = self._closed_loop if self._plan.rate is None else self._open_loop
        outcomes = await send(mode, block)
        return sorted(outcomes, key=lambda outcome: (outcome.key.conversation, outcome.key.turn))

    async def _closed_loop(self, mode: Mode, block: list[tuple[int, Conversation]]) -> list[Sample | Failure]:
        waiting, outcomes = iter(block), list[Sample | Failure]()

        async def place() -> None:
            for index, conversation in waiting:
                outcomes.extend(await self._converse(mode, index, conversation))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._plan.concurrency, len(block))):
                group.create_task(place())
        return outcomes

    async def _open_loop(self, mode: Mode, block: list[tuple[int, Conversation]]) -> list[Sample | Failure]:
        rate = self._plan.rate or 1.0
        arrivals = random.Random(self._plan.seed + block[0][0])  # noqa: S311 - load, not secrets
        tasks: list[asyncio.Task[list[Sample | Failure]]] = []
        loop = asyncio.get_running_loop()
        due = loop.time()
        async with asyncio.TaskGroup() as group:
            for index, conversation in block:
                await asyncio.sleep(max(0.0, due - loop.time()))
                tasks.append(group.create_task(self._converse(mode, index, conversation)))
                due += arrivals.expovariate(rate)
        return [outcome for task in tasks for outcome in task.result()]

    async def _converse(self, mode: Mode, index: int, conversation: Conversation) -> list[Sample | Failure]:
        """The conversation's turns, one after the other in one session; ends at the first failure."""
        outcomes: list[Sample | Failure] = []
        session_id = str(uuid.uuid4())
        options = _cold(self._plan.options_for(mode, index))
        for turn, text in enumerate(conversation.turns if self._plan.all_turns else conversation.turns[:1]):
            key = Key(index, turn, conversation.category)
            outcome = await measure(self._client, key, mode, self._prompt(text), options, session_id)
            outcomes.append(outcome)
            if isinstance(outcome, Failure):
                break
        self._on_done()
        return outcomes

    def _prompt(self, text: str) -> Prompt:
        return text if self._plan.raw else Chat.of(text)


def _cold(options: GenerateOptions) -> GenerateOptions:
    """The options with a cache salt that nobody else has."""
    return replace(options, cache_salt=str(uuid.uuid4()))
