"""One request of the load through the client library, and many of them at once.

Owns: what is asked, and when. Must not know: goals, processes.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.cli.bench.report import Percentiles
from services.cli.bench.sample import Failure, Key, Mode, Sample, measure
from services.client import GenerateOptions, OutriderClient, RetryPolicy
from services.common.errors import OutriderError

NO_RETRY = RetryPolicy(max_attempts=1, max_attempts_unreached=1, first_message_timeout_s=30.0)
"""The load retries by itself, so that refusals are seen; only silence is left to the library's own limit."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request: a sample, or the error, after so long."""

    outcome: Sample | Failure
    started_s: float
    took_ms: float

    @property
    def sample(self) -> Sample | None:
        return self.outcome if isinstance(self.outcome, Sample) else None

    @property
    def error(self) -> OutriderError | None:
        return self.outcome.error if isinstance(self.outcome, Failure) else None

    @property
    def tpot_ms(self) -> float | None:
        tpot_ns = self.sample.tpot_ns if self.sample else None
        return None if tpot_ns is None else tpot_ns / 1e6


class Requests:
    """Sends requests that differ in their prompts alone, over clients in turn."""

    def __init__(self, clients: Sequence[OutriderClient], options: GenerateOptions) -> None:
        self._clients = itertools.cycle(clients)
        self._options = options
        self._numbers = itertools.count()

    async def send(self) -> Answer:
        number = next(self._numbers)
        started_s = time.perf_counter()
        key = Key(number, 0, "load")
        client = next(self._clients)
        prompt = f"{number} is the number of this request"
        outcome = await measure(client, key, Mode.SPECULATIVE, prompt, self._options, str(uuid.uuid4()))
        return Answer(outcome, started_s, (time.perf_counter() - started_s) * 1e3)

    async def closed(self, concurrency: int, stop: asyncio.Event) -> list[Answer]:
        """Always `concurrency` at a time, until `stop`; those that run then are read to their end. Who is refused comes
        again after the time that it was told."""
        answers: list[Answer] = []

        async def place() -> None:
            while not stop.is_set():
                answers.append(answer := await self.send())
                if answer.error:
                    await asyncio.sleep((answer.error.retry_after_ms or 1000) / 1e3)

        await asyncio.gather(*[place() for _ in range(concurrency)])
        return answers

    async def open(self, per_s: float, stop: asyncio.Event, seed: int = 0) -> list[Answer]:
        """Poisson arrivals until `stop`, however many run; who is refused does not come again."""
        gaps, loop = random.Random(seed), asyncio.get_running_loop()
        tasks: list[asyncio.Task[Answer]] = []
        due = loop.time()
        while not stop.is_set():
            await asyncio.sleep(max(0.0, due - loop.time()))
            tasks.append(asyncio.create_task(self.send()))
            due += gaps.expovariate(per_s)
        return await asyncio.gather(*tasks)


def tpot_of(answers: Iterable[Answer]) -> Percentiles:
    """Of the requests that succeeded."""
    return Percentiles.of(answer.tpot_ms for answer in answers if answer.tpot_ms is not None)


def reasons(answers: Iterable[Answer]) -> dict[str, int]:
    """How many ended with which error's reason; `ok` where with none."""
    counts: dict[str, int] = {}
    for answer in answers:
        reason = answer.error.reason if answer.error else "ok"
        counts[reason] = counts.get(reason, 0) + 1
    return counts


async def after(seconds: float, stop: asyncio.Event) -> None:
    """Sets `stop` when they have passed."""
    await asyncio.sleep(seconds)
    stop.set()
