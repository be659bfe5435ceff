"""One measured request.

Owns: what is measured and its definitions, in nanoseconds of this process's monotonic clock.
Must not know: load, reports.

    sent ......... first message with tokens ....... next ....... last       TPOT = (last - first) / tokens after first
         TTFT                                  ITL          ITL
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import time
from dataclasses import dataclass

from services.client import GenerateOptions, OutriderClient, Prompt, Result, Statistics
from services.common.errors import OutriderError


class Mode(enum.Enum):
    """Without speculation (the target decodes alone), or with it."""

    PLAIN = "plain"
    SPECULATIVE = "speculative"


@dataclass(frozen=True, slots=True)
class Key:
    """Which request it was; equal in both modes."""

    conversation: int
    turn: int
    category: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A request that succeeded.

    `arrivals_ns` holds (time, number of tokens) of each message with tokens. ITL is the gap between two such messages,
    one a message as vLLM counts it, so a speculative message's gap covers all its tokens; time a token is TPOT.
    """

    key: Key
    mode: Mode
    sent_ns: int
    arrivals_ns: tuple[tuple[int, int], ...]
    token_ids: tuple[int, ...]
    statistics: Statistics
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def ttft_ns(self) -> int | None:
        return self.arrivals_ns[0][0] - self.sent_ns if self.arrivals_ns else None

    @property
    def decode_ns(self) -> int:
        """From the first message with tokens to the last."""
        return self.arrivals_ns[-1][0] - self.arrivals_ns[0][0] if self.arrivals_ns else 0

    @property
    def num_decode_tokens(self) -> int:
        """Tokens that arrived in the time of decode_ns: all but the first message's."""
        return sum(count for _, count in self.arrivals_ns[1:])

    @property
    def tpot_ns(self) -> float | None:
        return self.decode_ns / self.num_decode_tokens if self.num_decode_tokens else None

    @property
    def itl_ns(self) -> tuple[int, ...]:
        times = [arrived for arrived, _ in self.arrivals_ns]
        return tuple(later - earlier for earlier, later in itertools.pairwise(times))

    @property
    def total_ns(self) -> int:
        return self.arrivals_ns[-1][0] - self.sent_ns if self.arrivals_ns else 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that did not succeed."""

    key: Key
    mode: Mode
    error: OutriderError


async def measure(
    client: OutriderClient, key: Key, mode: Mode, prompt: Prompt, options: GenerateOptions, session_id: str
) -> Sample | Failure:
    """Sends one request and reads it to the end. A later turn than the first fails without its session."""
    arrivals: list[tuple[int, int]] = []
    sent_ns = time.perf_counter_ns()
    try:
        generation = client.generate(prompt, options, session_id=session_id, continue_session=key.turn > 0)
        async with contextlib.aclosing(generation):
            async for chunk in generation:
                if chunk.tokens:
                    arrivals.append((time.perf_counter_ns(), len(chunk.tokens)))
        result: Result = generation.result
    except OutriderError as error:
        return Failure(key, mode, error)
    arrived = tuple(arrivals)
    return Sample(key, mode, sent_ns, arrived, result.token_ids, result.statistics, result.prompt_token_ids)
