"""A discrete-event simulation of drafts and targets that many sequences share.

Owns: the model of a round, and time. Must not know: files, tables, questions of capacity. Pure: a function of its
arguments, the seed among them. Times in milliseconds.

    sequence     -> draft: K steps, each shared with the others there -> target: a step, shared -> coordinator -> ...
    draft        takes all that wait for a token into a step of token_ms + token_row_ms * sequences
    target       takes all that wait into a step of step_ms + row_ms * rows, K + 1 rows a sequence; before that it may
                 hold the step for those that are due back, by the rule of services.engine.hold
    prompt       is computed by the target in shares of its steps, prefill_token_ms a token, by the rule of
                 services.engine.scheduler; its draft has it computed by then
    coordinator  one for each target; works overhead_ms for each round of a step's, then all of them go on together
    network      delay_ms each way, so 4 * delay_ms a round

Without drafts the sequences stay on the target: every step takes them all, and the coordinator works meanwhile. With
requests, places begin out of step: the first ones are shorter, each by another length.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from random import Random

from services.cli.plan.setting import Outcome, Request, Setting, Times
from services.cli.plan.workers import Chunk, Sequence, Server, Target

GOLDEN = (5**0.5 - 1) / 2


def simulate(times: Times, setting: Setting) -> Outcome:
    """Plain decoding that never ends is computed; the rest is simulated."""
    is_simulated = setting.num_draft_tokens or setting.request
    return _Simulation(times, setting).run() if is_simulated else _plain(times, setting)


def _plain(times: Times, setting: Setting) -> Outcome:
    per_target = -(-setting.num_sequences // setting.num_targets)
    cycle_ms = max(times.rows_ms(per_target), times.overhead_ms * per_target)
    return Outcome(
        tokens_per_s=1e3 * setting.num_sequences / cycle_ms,
        tpot_ms=cycle_ms,
        tokens_per_round=1.0,
        target_busy=times.rows_ms(per_target) / cycle_ms,
        draft_busy=0.0,
    )


class _Simulation:
    def __init__(self, times: Times, setting: Setting) -> None:
        self._times = times
        self._setting = setting
        self._random = Random(setting.seed)  # noqa: S311  # not for secrets
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._chance = self._random.random()
        self._num_events = 0
        self._now_ms = 0.0
        self._num_tokens = 0
        self._num_rounds = 0
        self._ttfts_ms: list[float] = []
        self._decode_ms = 0.0
        self._num_decoded = 0
        self._num_ended = 0
        self._targets = [Target() for _ in range(setting.num_targets)]
        self._drafts = [Server() for _ in range(setting.num_drafts)]
        for number in range(setting.num_sequences):
            target = self._targets[number % setting.num_targets]
            sequence = Sequence(self._drafts[number % setting.num_drafts], target)
            target.members.append(sequence)
            self._at(self._random.random() * times.step_ms, self._first(sequence, number))

    def _first(self, sequence: Sequence, number: int) -> Callable[[], None]:
        if self._setting.request is None:
            return partial(self._draft, sequence)
        share = (number + 1) / self._setting.num_sequences
        first = Request(self._setting.request.prompt_len, max(1, round(share * self._setting.request.output_len)))
        return partial(self._begin, sequence, first)

    def run(self) -> Outcome:
        setting = self._setting
        each, skipped = (setting.num_requests, 1) if setting.request else (setting.num_rounds, setting.num_rounds / 4)
        self._run_until(int(skipped * setting.num_sequences))
        started_ms, num_tokens, num_rounds = self._now_ms, self._num_tokens, self._num_rounds
        self._ttfts_ms, self._decode_ms, self._num_decoded = [], 0.0, 0
        for server in [*self._targets, *self._drafts]:
            server.busy_ms = 0.0
        self._run_until(each * setting.num_sequences)
        took_ms, num_tokens = self._now_ms - started_ms, self._num_tokens - num_tokens
        tpot_ms = took_ms * setting.num_sequences / num_tokens
        if setting.request is not None:
            tpot_ms = self._decode_ms / max(1, self._num_decoded)
        return Outcome(
            tokens_per_s=1e3 * num_tokens / took_ms,
            tpot_ms=tpot_ms,
            tokens_per_round=num_tokens / max(1, self._num_rounds - num_rounds),
            target_busy=min(1.0, sum(server.busy_ms for server in self._targets) / len(self._targets) / took_ms),
            draft_busy=min(1.0, sum(server.busy_ms for server in self._drafts) / len(self._drafts) / took_ms),
            ttft_ms=sum(self._ttfts_ms) / len(self._ttfts_ms) if self._ttfts_ms else None,
        )

    def _run_until(self, total: int) -> None:
        """Rounds of sequences that never end, else requests that ended."""
        while (self._num_ended if self._setting.request else self._num_rounds) < total:
            self._now_ms, _, event = heapq.heappop(self._events)
            event()

    def _at(self, time_ms: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_ms, self._num_events, event))

    def _begin(self, sequence: Sequence, request: Request) -> None:
        """A request comes to the coordinator, which opens it on the target."""
        sequence.begin(self._now_ms, request.prompt_len, request.output_len)
        self._at(self._now_ms + self._times.delay_ms, partial(self._verify, sequence))

    def _draft(self, sequence: Sequence) -> None:
        """It asks its draft for a proposal, or its target for the last token."""
        wanted = min(self._setting.num_draft_tokens, sequence.num_left - 1)
        sequence.num_missing = sequence.num_drafted = int(wanted)
        if not sequence.num_missing:
            self._verify(sequence)
            return
        sequence.draft.waiting.append(sequence)
        self._at(self._now_ms, partial(self._draft_step, sequence.draft))

    def _draft_step(self, draft: Server) -> None:
        if draft.busy or not draft.waiting:
            return
        members = list(draft.waiting)
        took_ms = self._times.token_ms + self._times.token_row_ms * len(members)
        draft.busy, draft.busy_ms = True, draft.busy_ms + took_ms
        self._at(self._now_ms + took_ms, partial(self._drafted, draft, members))

    def _drafted(self, draft: Server, members: list[Sequence]) -> None:
        draft.busy = False
        for sequence in members:
            sequence.num_missing -= 1
            if not sequence.num_missing:
                draft.waiting.remove(sequence)
                self._at(self._now_ms + 2 * self._times.delay_ms, partial(self._verify, sequence))
        self._draft_step(draft)

    def _verify(self, sequence: Sequence) -> None:
        """Its proposal, or its prompt, has come to the target."""
        sequence.come_back(self._now_ms)
        sequence.target.waiting.append(sequence)
        self._at(self._now_ms, partial(self._target_step, sequence.target))

    def _target_step(self, target: Target) -> None:
        if target.busy or not target.waiting:
            return
        target.woken += 1
        chunks = target.next_step(self._times, self._now_ms)
        if (until_ms := target.held_until_ms(self._times, chunks, self._now_ms)) > self._now_ms:
            self._at(until_ms, partial(self._end_hold, target, target.woken))
            return
        target.held_since_ms = None
        took_ms = target.step_ms(self._times, chunks)
        target.observe(self._times, chunks)
        target.busy, target.busy_ms = True, target.busy_ms + took_ms
        self._at(self._now_ms + took_ms, partial(self._stepped, target, chunks))

    def _end_hold(self, target: Target, woken: int) -> None:
        if target.woken == woken:
            self._target_step(target)

    def _stepped(self, target: Target, chunks: list[Chunk]) -> None:
        target.busy = False
        staying = {id(sequence) for sequence in target.waiting}
        told_ms = max(target.coordinator_free_ms, self._now_ms + self._times.delay_ms)
        told_ms += self._times.overhead_ms * sum(1 for chunk in chunks if chunk.num_rows)
        target.coordinator_free_ms = told_ms
        for chunk in chunks:
            if not self._settle(chunk, told_ms):
                staying.discard(id(chunk.sequence))
        target.waiting = [sequence for sequence in target.waiting if id(sequence) in staying]
        self._target_step(target)

    def _settle(self, chunk: Chunk, told_ms: float) -> bool:
        """Takes a sequence's part in a step into it; returns whether it stays, for the next one.

        At `told_ms` the coordinator is done with the step.
        """
        sequence, is_first = chunk.sequence, not chunk.sequence.num_generated
        if not chunk.num_rows:
            sequence.num_uncached -= chunk.num_tokens
            sequence.is_begun = True
            return True
        num_new = int(min(self._num_accepted(sequence.num_drafted) + 1, sequence.num_left))
        sequence.num_uncached, sequence.is_begun = 1, True
        sequence.num_generated += num_new
        sequence.num_left -= num_new
        self._num_tokens += num_new
        self._num_rounds += 1
        if is_first and self._setting.request is not None:
            sequence.first_ms = told_ms
            self._ttfts_ms.append(told_ms - sequence.began_ms)
        if sequence.num_left <= 0:
            self._at(told_ms, partial(self._end, sequence))
            return False
        if not self._setting.num_draft_tokens:
            return True
        if chunk.num_rows > 1:
            sequence.left_ms, sequence.num_rows = self._now_ms, chunk.num_rows
        self._at(told_ms + self._times.delay_ms, partial(self._draft, sequence))
        return False

    def _end(self, sequence: Sequence) -> None:
        """The last token has come to the coordinator; the place's next request begins."""
        self._decode_ms += self._now_ms - sequence.first_ms
        self._num_decoded += int(sequence.num_generated) - 1
        self._num_ended += 1
        if self._setting.request is not None:
            self._begin(sequence, self._setting.request)

    def _num_accepted(self, num_draft_tokens: int) -> int:
        """Drawn by the additive recurrence of the golden ratio: few rounds come close to the distribution."""
        if not num_draft_tokens:
            return 0
        self._chance = (self._chance + GOLDEN) % 1.0
        survival = 1.0
        for position in range(num_draft_tokens):
            survival *= self._times.alpha(position)
            if self._chance >= survival:
                return position
        return num_draft_tokens
