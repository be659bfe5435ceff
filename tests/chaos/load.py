"""The clients: a steady load through the client library, and a judgement of every reply.

Owns: replies from their request to their record, and what was wrong with them. Must not know: how faults are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from services.client import OutriderClient, Result, SessionRecord, TokenIds
from services.client.generation import is_resumable
from services.common.errors import NotFound, OutriderError
from tests.chaos.faults import Kind, Role
from tests.chaos.replies import Differences, Request, differences
from tests.chaos.reply import Reply, Wait
from tests.chaos.watch import Watch

_RECORD_S = 20.0
"""In which a record is complete, once its reply has ended."""
_POLL_S = 0.2
_LEAST_WAIT_S = 0.5
"""Before a call that ended with a retriable error is made again."""


@dataclass(slots=True)
class Tally:
    """What became of the requests. `num_called_again`: calls after one that ended with a retriable error."""

    num_requests: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    num_doubled: int = 0
    num_wrong: int = 0
    num_unfinished: int = 0
    num_resumptions: int = 0
    num_called_again: int = 0
    num_records_gone: int = 0
    """Records of finished replies that Redis was killed without."""
    errors: Counter[str] = field(default_factory=Counter)
    """Reasons that calls ended with."""
    troubles: list[str] = field(default_factory=list)
    """What was wrong, in words."""
    num_told: int = 0
    """Of the troubles, by `news`."""

    def news(self) -> list[str]:
        """Troubles since the last call."""
        fresh, self.num_told = self.troubles[self.num_told :], len(self.troubles)
        return fresh

    def add(self, found: Differences, what: str) -> None:
        self.num_lost += found.num_lost
        self.num_doubled += found.num_doubled
        self.num_wrong += found.num_wrong
        if any(found):
            self.troubles.append(f"{what}: {found}")

    def unfinished(self, what: str) -> None:
        self.num_unfinished += 1
        self.troubles.append(what)


class Load:
    """Clients that send `requests` again and again, each time in a new session."""

    def __init__(
        self,
        addresses: Sequence[str],
        requests: list[Request],
        watch: Watch,
        reply_s: float,
        text_of: Callable[[Sequence[int]], str],
    ) -> None:
        """`reply_s`: in which a reply must have ended. `text_of`: what a reply's tokens stand for."""
        self._addresses, self._requests, self._watch, self._reply_s = tuple(addresses), requests, watch, reply_s
        self._text_of = text_of
        self._expected: dict[int, Result] = {}
        self._active: dict[Reply, None] = {}
        self._stopped = False
        self.tally = Tally()
        self.gaps_s: list[float] = []
        """Of the undisturbed run, from chunk to chunk."""
        self.waits_s: dict[tuple[Role, Kind], list[float]] = defaultdict(list)
        """By fault: the longest wait for a token of each reply that was at the part."""
        self._data_lost_at = 0.0

    @property
    def session_ids(self) -> list[str]:
        """Of replies on their way."""
        return [reply.session_id for reply in self._active if reply.token_ids]

    async def run_undisturbed(self, num_clients: int) -> None:
        """Each repeatable request once: what it is answered from now on is compared with this."""
        waiting = [i for i, request in enumerate(self._requests) if request.is_repeatable]

        async def client(choose: Random) -> None:
            while waiting:
                index = waiting.pop()
                if (result := await self._answer(self._requests[index], choose)) is not None:
                    self._expected[index] = result

        await asyncio.gather(*(client(Random(i)) for i in range(num_clients)))
        if self.tally.num_requests != len(self._expected) or self.tally.troubles:
            raise RuntimeError(f"the undisturbed run failed: {self.tally.troubles}")
        self.tally = Tally()

    async def run(self, num_clients: int, choose: Random) -> None:
        """Returns once `stop` was called and every reply has ended."""
        await asyncio.gather(*(self._client(Random(choose.random())) for _ in range(num_clients)))

    def stop(self) -> None:
        """No further requests."""
        self._stopped = True

    def fault_began(self, fault: tuple[Role, Kind], session_ids: Sequence[str]) -> None:
        """It hits a part that these sessions are at."""
        now, hit = time.monotonic(), set(session_ids)
        for reply in self._active:
            if reply.session_id in hit and reply.wait is None:
                reply.wait = Wait(fault, now)

    def fault_ended(self) -> None:
        for reply in self._active:
            if reply.wait is not None:
                reply.wait.is_over = True

    def data_lost(self) -> None:
        """Redis has just come back without its data."""
        self._data_lost_at = time.monotonic()

    async def _client(self, choose: Random) -> None:
        while not self._stopped:
            index = choose.randrange(len(self._requests))
            await self._answer(self._requests[index], choose, self._expected.get(index))

    async def _answer(self, request: Request, choose: Random, expected: Result | None = None) -> Result | None:
        """None where the reply did not end as it should."""
        reply = Reply(request)
        self._active[reply] = None
        try:
            async with asyncio.timeout(self._reply_s), self._new_client(choose) as client:
                if result := await self._result(reply, client):
                    self._judge(reply, result, expected)
                    await self._judge_record(reply, result, client)
                return result
        except TimeoutError:
            self.tally.unfinished(f"{reply.name}: not ended in {self._reply_s:g} s, {len(reply.token_ids)} tokens")
            return None
        finally:
            del self._active[reply]
            self._end_wait(reply)
            self.tally.num_requests += 1
            self.tally.num_tokens += len(reply.token_ids)

    def _new_client(self, choose: Random) -> OutriderClient:
        """Each begins with another coordinator."""
        first = choose.randrange(len(self._addresses))
        return OutriderClient(*self._addresses[first:], *self._addresses[:first])

    async def _result(self, reply: Reply, client: OutriderClient) -> Result | None:
        """Calls again after errors that say so."""
        while True:
            try:
                return await self._call(reply, client)
            except OutriderError as error:
                self.tally.errors[error.reason] += 1
                if not is_resumable(error):
                    self.tally.unfinished(f"{reply.name}: {type(error).__name__} {error.reason}: {error}")
                    return None
                self.tally.num_called_again += 1
                await asyncio.sleep(max(_LEAST_WAIT_S, (error.retry_after_ms or 0) / 1e3))

    async def _call(self, reply: Reply, client: OutriderClient) -> Result:
        request = reply.request
        reply.call_began()
        generation = client.generate(
            TokenIds(request.prompt), request.options, session_id=reply.session_id, request_id=reply.request_id
        )
        async with contextlib.aclosing(generation):
            async for chunk in generation:
                reply.take(chunk)
                if chunk.tokens:
                    self._arrived(reply)
                await self._watch.look(reply.session_id, len(request.prompt) + reply.num_taken)
        self.tally.num_resumptions += generation.result.num_resumptions
        return generation.result

    def _arrived(self, reply: Reply) -> None:
        now = time.monotonic()
        if reply.last_at and not self._expected:
            self.gaps_s.append(now - reply.last_at)
        if reply.wait is not None:
            reply.wait.token(now)
            if reply.wait.is_over:
                self._end_wait(reply)
        reply.last_at = now

    def _end_wait(self, reply: Reply) -> None:
        if reply.wait is not None:
            self.waits_s[reply.wait.fault].append(reply.wait.longest_s)
            reply.wait = None

    def _judge(self, reply: Reply, result: Result, expected: Result | None) -> None:
        """Against the undisturbed reply; any reply against what was delivered and its own length."""
        self.tally.add(Differences(num_wrong=reply.num_changed), f"{reply.name}: delivered tokens changed")
        self.tally.add(differences(reply.token_ids, result.token_ids), f"{reply.name}: result and chunks")
        if expected is None:
            missing = max(0, reply.request.options.max_tokens - len(result.token_ids))
            self.tally.add(Differences(num_lost=missing), f"{reply.name}: its length")
            return
        found = differences(expected.token_ids, result.token_ids)
        self.tally.add(found, f"{reply.name}: against the undisturbed run")
        if not any(found) and (expected.text, expected.finish_reason) != (result.text, result.finish_reason):
            self.tally.add(Differences(num_wrong=1), f"{reply.name}: its text or its end")

    async def _judge_record(self, reply: Reply, result: Result, client: OutriderClient) -> None:
        """The tokens and the text that the client has against the tokens that are stored."""
        stored = await self._stored(reply, result, client)
        self.tally.add(differences(result.token_ids, stored), f"{reply.name}: its record")
        found = reply.text_differences(self._text_of(stored), result.text)
        self.tally.add(found, f"{reply.name}: its text, which is not the record's")

    async def _stored(self, reply: Reply, result: Result, client: OutriderClient) -> Sequence[int]:
        """The generated tokens in the record. Waits until it holds the reply, which it may not do at once where Redis
        was away; the reply's own where Redis has lost its data."""
        deadline, record = time.monotonic() + _RECORD_S, None
        while time.monotonic() < deadline:
            try:
                record = await client.get_session(reply.session_id)
                if _holds(record, result):
                    await client.close_session(reply.session_id)
                    return record.token_ids[record.prompt_len :]
            except NotFound:
                if self._data_lost_at > reply.began_at:
                    self.tally.num_records_gone += 1
                    return result.token_ids
            except OutriderError as error:
                self.tally.errors[error.reason] += 1
            await asyncio.sleep(_POLL_S)
        stored = record.token_ids[record.prompt_len :] if record else ()
        if stored == result.token_ids:
            self.tally.unfinished(f"{reply.name}: its record's end: {record}")
        return stored


def _holds(record: SessionRecord, result: Result) -> bool:
    return record.token_ids[record.prompt_len :] == result.token_ids and record.finish_reason is result.finish_reason
