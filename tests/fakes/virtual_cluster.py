"""Real generations, the real policy and the real cores of both workers, on a clock that only waiting moves.

Owns: links that hand items to a core in place of a stream, and devices whose steps take virtual time. Everything but
gRPC, the store and the clock is what a cluster runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from services.common.errors import OutriderError
from services.common.service import wait_until
from services.common.session_record import RecordLost, Write
from services.common.values import SamplingParams, VerificationMethod, WorkerInfo, WorkerLoad
from services.coordinator.committer import Committer
from services.coordinator.draft_length import AdaptiveLength, DraftLength, FixedLength, LengthPolicy
from services.coordinator.generation import Generation, Routes, Timeouts
from services.coordinator.journal import Journal, RecordCopy
from services.coordinator.output import Output
from services.coordinator.plan import GenerationPlan
from services.coordinator.propose_deadline import ProposeDeadline
from services.coordinator.statistics import GenerationStatistics, StatisticsCollector
from services.coordinator.tokenizer import SimulatedTokenizer
from services.coordinator.trim import EndRules, Trimmed, Trimmer
from services.coordinator.worker_link import DRAFT_CODEC, TARGET_CODEC, WorkerLink, _key
from services.draft.core import DraftCore
from services.engine.block_manager import BlockManager
from services.engine.drafters.simulated import simulated_drafter
from services.engine.simulated import Pace, SimulatedTarget, simulated_info
from services.target.core import TargetCore
from tests.fakes.fixed_route import FixedRoute
from tests.fakes.virtual_time import VirtualTimeLoop, run

MAX_LEN = 32_768
FOREVER_S = 1e6


@dataclass(frozen=True, slots=True)
class Times:
    """What the simulated workers and the way between them take, in milliseconds."""

    step_ms: float = 20.0
    row_ms: float = 0.0
    token_ms: float = 2.0
    acceptance: float = 0.7
    prefill_token_ms: float = 0.0
    delay_ms: float = 0.2
    """One way, between coordinator and workers."""
    overhead_ms: float = 0.5
    """A commit."""


@dataclass(slots=True)
class Clock:
    """A device's own: it runs ahead of the loop's while a step is computed."""

    now_s: float = 0.0
    pause_s: Callable[[], float] = lambda: 0.0
    """How much longer the next wait takes."""

    def seconds(self) -> float:
        return self.now_s

    def nanoseconds(self) -> int:
        return round(self.now_s * 1e9)

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s + self.pause_s()


class VirtualLink(WorkerLink[Any, Any]):
    """A link to a core, both ways `delay_s` long. Drives the core as services.engine.engine_thread does."""

    def __init__(self, core: Any, codec: Any, info: WorkerInfo, clock: Clock, delay_s: float) -> None:
        super().__init__("virtual", codec)
        self._core = core
        self._clock = clock
        self._delay_s = delay_s
        self._way_there: deque[tuple[Any, ...]] = deque()  # timers of the same moment fire in any order
        self._way_back: deque[tuple[Any, WorkerLoad]] = deque()
        self._inbox: list[tuple[Any, int]] = []
        self._busy = False
        self._hold: asyncio.TimerHandle | None = None
        self._info = info
        self._up.set()
        self._tasks = [asyncio.create_task(self._sweep())]

    def enqueue(self, items: Sequence[Any]) -> None:
        self._way_there.append(tuple(items))
        asyncio.get_running_loop().call_later(self._delay_s, self._arrive)

    def _arrive(self) -> None:
        arrived_ns = round(asyncio.get_running_loop().time() * 1e9)
        self._inbox += [(item, arrived_ns) for item in self._way_there.popleft()]
        asyncio.get_running_loop().call_soon(self._turn)  # what was sent together arrives together

    def _turn(self) -> None:
        if self._busy:
            return
        loop = asyncio.get_running_loop()
        self._clock.now_s = max(self._clock.now_s, loop.time())
        inbox, self._inbox = self._inbox, []
        for item, arrived_ns in inbox:
            self._answer(self._core.handle(1, [item], arrived_ns))
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        if not self._core.has_work:
            return
        if (hold_s := self._core.hold_s) > 0:
            self._hold = loop.call_later(max(hold_s, 1e-7), self._turn)
            return
        results = self._core.step()
        self._busy = True
        loop.call_at(self._clock.now_s, self._stepped, results)

    def _stepped(self, results: Any) -> None:
        self._busy = False
        self._answer(results)
        asyncio.get_running_loop().call_soon(self._turn)

    def _answer(self, results: Any) -> None:
        if results:
            self._way_back.append((results, self._core.load))
            asyncio.get_running_loop().call_later(self._delay_s, self._deliver)

    def _deliver(self) -> None:
        results, self._load = self._way_back.popleft()
        for _, result in results:
            if lane := self._lanes.get(_key(result.identity)):
                lane.deliver(result)


class Served(NamedTuple):
    """What requests got. Means; `tpot_ms` counts from a request's first token."""

    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float


class SlowStore:
    """Acknowledges all commits after a while."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    async def write_all(self, writes: Sequence[Write]) -> list[OutriderError | RecordLost | None]:
        await asyncio.sleep(self._delay_s)
        return [None] * len(writes)


class Counted(Generation):
    """A generation that tells how far it is."""

    began_s = first_s = last_s = 0.0
    """When it was started, and when its first and last tokens went out."""

    def start(self) -> asyncio.Task[None]:
        self.began_s = asyncio.get_running_loop().time()
        return super().start()

    def _emit(self, kept: Trimmed) -> None:
        self.last_s = asyncio.get_running_loop().time()
        self.first_s = self.first_s or self.last_s
        super()._emit(kept)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens) - self._plan.prompt_len

    @property
    def statistics(self) -> GenerationStatistics:
        return self._snapshot()


def _alphas(statistics: list[GenerationStatistics]) -> tuple[float, ...]:
    accepted, verified = (
        [sum(counts) for counts in zip_longest(*columns, fillvalue=0)]
        for columns in (
            [s.num_accepted_tokens_per_pos for s in statistics],
            [s.num_verified_tokens_per_pos for s in statistics],
        )
    )
    return tuple(a / v for a, v in zip(accepted, verified, strict=True))


@dataclass
class VirtualCluster:
    """One target, one draft and a coordinator's generations. Made on the loop that runs them."""

    times: Times

    def __post_init__(self) -> None:
        times, delay_s = self.times, self.times.delay_ms / 1e3
        clocks = Clock(), Clock()
        self._num_ended = 0
        self.draft_clock = clocks[1]
        self.deadline = ProposeDeadline(5.0)
        blocks = BlockManager(8192, 16), BlockManager(8192, 16)
        target = SimulatedTarget(
            blocks[0],
            step_ms=times.step_ms,
            row_ms=times.row_ms,
            prefill_token_ms=times.prefill_token_ms,
            pace=Pace(clocks[0].seconds, clocks[0].sleep),
        )
        drafter = simulated_drafter(
            blocks[1],
            token_ms=times.token_ms,
            acceptance=times.acceptance,
            pace=Pace(clocks[1].seconds, clocks[1].sleep),
        )
        limits = {"max_sequences": 256, "max_sequence_len": MAX_LEN, "max_draft_tokens": 16}
        self.target = self._link(
            TargetCore(target, blocks[0], clock=clocks[0].nanoseconds, **limits), TARGET_CODEC, clocks[0], delay_s
        )
        self.draft = self._link(
            DraftCore(drafter, clock=clocks[1].nanoseconds, **limits), DRAFT_CODEC, clocks[1], delay_s
        )
        self.policy = LengthPolicy(lambda: self.target.load.num_sequences)
        self.alphas: tuple[float, ...] = ()
        """Conditional acceptance by position that the last run realised."""
        self._committer = Committer(SlowStore(times.overhead_ms / 1e3), outage_after_s=FOREVER_S)

    @staticmethod
    def _link(core: Any, codec: Any, clock: Clock, delay_s: float) -> VirtualLink:
        info = WorkerInfo(codec.role, codec.role, simulated_info(), "simulated", 16, 256, MAX_LEN)
        return VirtualLink(core, codec, info, clock, delay_s)

    def generation(self, number: int, num_tokens: int, num_draft_tokens: int | None, prompt_len: int = 3) -> Counted:
        """`num_draft_tokens` None: adaptive."""
        prompt = [number % 95 + 32, number // 95 + 32, *[33] * (prompt_len - 2)]
        plan = GenerationPlan(
            session_id=f"s{number}",
            lease_epoch=1,
            prompt_len=len(prompt),
            max_len=len(prompt) + num_tokens,
            end_token_ids=frozenset(),
            sampling=SamplingParams(temperature=0.0),
            verification=VerificationMethod.COUPLED,
            num_draft_tokens=16 if num_draft_tokens is None else num_draft_tokens,
            log_probs=False,
            num_top_log_probs=0,
            vocab_size=257,
        )
        text = SimulatedTokenizer().text_stream(include_special_tokens=False, context=())
        output = Output(max_unread_tokens=1 << 30, slow_client_s=1e9)
        length: DraftLength = (
            AdaptiveLength(self.policy, 16) if num_draft_tokens is None else FixedLength(num_draft_tokens)
        )
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        return Counted(
            plan,
            prompt,
            routes=Routes(FixedRoute(self.target), FixedRoute(self.draft) if num_draft_tokens != 0 else None),
            trimmer=Trimmer(EndRules(frozenset(), frozenset(), (), num_tokens), text),
            journal=Journal(self._committer, plan.session_id, 1, RecordCopy.of(prompt, bytes(len(prompt)), b"", {})),
            output=output,
            statistics=StatisticsCollector(arrived_ns=0, lossy=False, num_replaced_tokens=0),
            timeouts=Timeouts(self.deadline, FOREVER_S, 1.0),
            length=length,
            clock=loop.nanoseconds,
        )

    async def generate_one(self, num_tokens: int, num_draft_tokens: int | None) -> Counted:
        """One generation to its end, after those before. `aclose` afterwards."""
        self._num_ended += 1
        if self._num_ended == 1:
            self._committer.start()
        generation = self.generation(self._num_ended, num_tokens, num_draft_tokens)
        await generation.start()
        return generation

    async def generate(self, num_sequences: int, num_draft_tokens: int | None, *, skipped: int, measured: int) -> float:
        """Tokens a second while so many generations run that start together, and are stopped in the end.

        Measured once each has `skipped` tokens, until they have `measured` more on average.
        """
        self._committer.start()
        loop = asyncio.get_running_loop()
        generations = [self.generation(n, MAX_LEN // 2, num_draft_tokens) for n in range(num_sequences)]
        for generation in generations:
            generation.start()
        await wait_until(lambda: min(generation.num_tokens for generation in generations) >= skipped, FOREVER_S)
        before, started_s = self._num_tokens(generations), loop.time()
        await wait_until(lambda: self._num_tokens(generations) >= before + measured * num_sequences, FOREVER_S)
        rate = (self._num_tokens(generations) - before) / (loop.time() - started_s)
        self.alphas = _alphas([generation.statistics for generation in generations])
        for generation in generations:
            await generation.stop(None)
        await self.aclose()
        return rate

    async def aclose(self) -> None:
        """Nothing runs any more."""
        await self._committer.aclose()
        await self.target.aclose()
        await self.draft.aclose()

    async def serve(
        self, num_places: int, num_draft_tokens: int, *, prompt_len: int, output_len: int, num_requests: int
    ) -> Served:
        """`num_places` send one request after the other, the first ones shorter, each by another length.

        Measured while the requests behind the first `num_places` that end, up to `num_requests` a place.
        """
        self._committer.start()
        loop = asyncio.get_running_loop()
        ended: list[Counted] = []
        all_begun: list[Counted] = []
        measured = asyncio.Event()

        async def place(index: int) -> None:
            num_tokens = max(1, round((index + 1) / num_places * output_len))
            while not measured.is_set():
                generation = self.generation(len(all_begun), num_tokens, num_draft_tokens, prompt_len)
                all_begun.append(generation)
                await generation.start()
                ended.append(generation)
                num_tokens = output_len

        places = [asyncio.create_task(place(index)) for index in range(num_places)]
        await wait_until(lambda: len(ended) >= num_places, FOREVER_S)
        before, started_s = self._num_tokens(all_begun), loop.time()
        await wait_until(lambda: len(ended) >= num_requests * num_places, FOREVER_S)
        took_s, num_tokens = loop.time() - started_s, self._num_tokens(all_begun) - before
        whole = [g for g in ended[num_places:] if g.num_tokens > 1]
        self.alphas = _alphas([generation.statistics for generation in all_begun])
        measured.set()
        for generation in all_begun:
            await generation.stop(None)
        await asyncio.gather(*places)
        await self.aclose()
        firsts = [g.first_s - g.began_s for g in all_begun if g.first_s >= started_s]
        return Served(
            num_tokens / took_s,
            1e3 * sum(firsts) / len(firsts),
            1e3 * sum(g.last_s - g.first_s for g in whole) / sum(g.num_tokens - 1 for g in whole),
        )

    @staticmethod
    def _num_tokens(generations: list[Counted]) -> int:
        return sum(generation.num_tokens for generation in generations)


def tokens_per_s(
    times: Times,
    num_sequences: int,
    num_draft_tokens: int | None,
    *,
    skipped: int = 16,
    measured: int = 64,
    on_end: Callable[[VirtualCluster], None] = lambda cluster: None,
) -> float:
    """Of one run in virtual time."""

    async def main() -> float:
        cluster = VirtualCluster(times)
        rate = await cluster.generate(num_sequences, num_draft_tokens, skipped=skipped, measured=measured)
        on_end(cluster)
        return rate

    return run(main(), VirtualTimeLoop())


def served(
    times: Times,
    num_places: int,
    num_draft_tokens: int,
    *,
    prompt_len: int,
    output_len: int,
    num_requests: int,
    on_end: Callable[[VirtualCluster], None] = lambda cluster: None,
) -> Served:
    """Of one run in virtual time."""

    async def main() -> Served:
        cluster = VirtualCluster(times)
        found = await cluster.serve(
            num_places, num_draft_tokens, prompt_len=prompt_len, output_len=output_len, num_requests=num_requests
        )
        on_end(cluster)
        return found

    return run(main(), VirtualTimeLoop())
