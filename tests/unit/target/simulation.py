"""A target's core between simulated coordinators, in virtual time: nothing sleeps, and every run is the same."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from services.common.items import TargetItem, Tokens
from services.engine.block_manager import BlockManager
from services.engine.simulated import INITIAL_STATE, Pace, SimulatedTarget, choose, extend_state
from services.target.core import TargetCore
from tests.unit.item_builders import close, decode, open_item, verify

NUM_DRAFT_TOKENS = 4
ACCEPTANCE = 0.7


class VirtualTime:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def seconds(self) -> float:
        return self.now_s

    def nanoseconds(self) -> int:
        return round(self.now_s * 1e9)

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def continuation(prefix: tuple[int, ...]) -> Iterator[int]:
    """What the simulated target continues a prompt with, token after token."""
    state = INITIAL_STATE
    for token_id in prefix:
        state = extend_state(state, token_id)
    while True:
        token_id = choose(state, 0)
        yield token_id
        state = extend_state(state, token_id)


@dataclass
class Client:
    """One generation: verifies with `gap_s()` between an answer and the next item, or decodes where that is None."""

    name: str
    prefix: tuple[int, ...]
    starts_s: float
    gap_s: Callable[[], float] | None
    max_new_tokens: int = 10_000
    num_tokens: int = 0
    arrivals_s: list[float] = field(default_factory=list)
    """When tokens came."""
    asked_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = Random(self.name)
        self.future = continuation(self.prefix)
        self.ahead = [next(self.future) for _ in range(NUM_DRAFT_TOKENS + 1)]

    @property
    def base_len(self) -> int:
        return len(self.prefix) + self.num_tokens

    @property
    def is_done(self) -> bool:
        return self.num_tokens >= self.max_new_tokens

    def item(self) -> TargetItem:
        if self.gap_s is None:
            return decode(self.name, self.base_len, self.max_new_tokens)
        drafted = [token if self.random.random() < ACCEPTANCE else 1 for token in self.ahead[:NUM_DRAFT_TOKENS]]
        return verify(self.name, self.base_len, tuple(drafted))

    def take(self, tokens: Tokens, now_s: float) -> None:
        assert list(tokens.token_ids) == self.ahead[: len(tokens.token_ids)]
        self.ahead = self.ahead[len(tokens.token_ids) :] + [next(self.future) for _ in tokens.token_ids]
        self.num_tokens += len(tokens.token_ids)
        self.arrivals_s.append(now_s)


class Simulation:
    """Runs clients against one core. `holds` False computes every step at once, as a core without the policy would."""

    def __init__(
        self,
        clients: list[Client],
        *,
        step_ms: float,
        row_ms: float = 0.0,
        prefill_token_ms: float = 0.0,
        holds: bool = True,
        num_blocks: int = 8192,
    ) -> None:
        self.time = VirtualTime()
        self.clients = {client.name: client for client in clients}
        self.num_steps = 0
        self.longest_hold_s = 0.0
        self._holds = holds
        self._events = [(client.starts_s, client.name) for client in clients]
        heapq.heapify(self._events)
        blocks = BlockManager(num_blocks, 16)
        pace = Pace(self.time.seconds, self.time.sleep)
        self.core = TargetCore(
            SimulatedTarget(blocks, step_ms=step_ms, row_ms=row_ms, prefill_token_ms=prefill_token_ms, pace=pace),
            blocks,
            max_sequences=256,
            max_sequence_len=32_768,
            max_draft_tokens=8,
            clock=self.time.nanoseconds,
        )

    def run(self, until_s: float) -> None:
        while self.time.now_s < until_s and self._turn(until_s):
            pass

    def _turn(self, until_s: float) -> bool:
        while self._events and self._events[0][0] <= self.time.now_s:
            self._deliver(*heapq.heappop(self._events))
        next_s = self._events[0][0] if self._events else until_s
        if not self.core.has_work:
            self.time.now_s = next_s
            return bool(self._events)
        hold_s = self.core.hold_s if self._holds else 0.0
        if hold_s > 0.0:
            passing_s = min(max(hold_s, 1e-9), next_s - self.time.now_s)
            self.longest_hold_s = max(self.longest_hold_s, passing_s)
            self.time.now_s += passing_s
            return True
        for _, result in self.core.step():
            assert isinstance(result, Tokens), result
            self._answer(self.clients[result.identity.session_id], result)
        self.num_steps += 1
        return True

    def _deliver(self, arrived_s: float, name: str) -> None:
        client = self.clients[name]
        opening = [] if client.num_tokens else [open_item(name, client.prefix, max_new_tokens=client.max_new_tokens)]
        client.asked_s.append(arrived_s)
        assert self.core.handle(1, [*opening, client.item()], round(arrived_s * 1e9)) == []

    def _answer(self, client: Client, tokens: Tokens) -> None:
        client.take(tokens, self.time.now_s)
        if client.is_done:
            self.core.handle(1, [close(client.name, base_len=client.base_len)])
        elif tokens.done and client.gap_s is not None:
            heapq.heappush(self._events, (self.time.now_s + client.gap_s(), client.name))


def tokens_per_s(simulation: Simulation, from_s: float, until_s: float) -> float:
    """Of all clients, between two times."""
    simulation.run(from_s)
    before, started_s = sum(client.num_tokens for client in simulation.clients.values()), simulation.time.now_s
    simulation.run(until_s)
    after = sum(client.num_tokens for client in simulation.clients.values())
    return (after - before) / (simulation.time.now_s - started_s)
