"""One conversation of self-play: whose turn it is, how its next token is drawn, and when it ends.

Owns: the plan of the turns and their lengths. Must not know: torch, batches, files. Everything drawn here comes from
the conversation's own generator, so that a conversation depends on its number, and on what it quotes, alone.

    opening [user's words] reply [assistant's words] next [user's words] reply [assistant's words] ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from services.engine.training import tasks
from services.engine.training.chat_frame import ChatFrame
from services.engine.training.tasks import Kind


class Origin(IntEnum):
    """Where a token comes from. Those not GIVEN were drawn from the target, whose distribution is kept."""

    GIVEN = 0
    INSTRUCTION = 1
    GREEDY = 2
    COOL = 3
    WARM = 4


_ANSWER_TEMPERATURES = {Origin.GREEDY: 0.0, Origin.COOL: 0.5, Origin.WARM: 1.0}
_INSTRUCTION_TEMPERATURES = (1.0, 0.7, 0.7)
"""Each as often as the others: at 1 a small target's requests vary most, below they make more sense."""
ANSWER_SHARES = {Origin.GREEDY: 0.55, Origin.COOL: 0.25, Origin.WARM: 0.2}
"""Of answers; of tokens warm ones have more, which seldom end early."""
FOLLOW_SHARE = 0.4
"""How often an answer is followed by another turn."""
_LOOP_NGRAM_LEN = 16
_MAX_LOOP_LEN = 32
"""An answer ends where so many n-grams in a row have stood in it before: greedy decoding repeats itself for ever."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Limits in tokens."""

    max_conversation: int

    @property
    def max_instruction(self) -> int:
        return min(128, self.max_conversation // 4)

    @property
    def max_answer(self) -> int:
        return min(256, self.max_conversation // 2)


@dataclass(frozen=True, slots=True)
class Written:
    """An instruction and the answer to it, as text, to be quoted later."""

    instruction: str
    answer: str


class Library:
    """What was written lately, for later conversations to work on; bounded."""

    def __init__(self, max_entries: int = 256) -> None:
        self._entries: deque[Written] = deque(maxlen=max_entries)

    def add(self, written: Written) -> None:
        self._entries.append(written)

    def draw(self, rng: np.random.Generator, num: int) -> list[Written]:
        return [self._entries[i] for i in rng.choice(len(self._entries), size=num, replace=False)]

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(slots=True, eq=False)
class Conversation:
    """Its tokens so far and where each came from. `begin`, then `add` a token at a time until `ended`."""

    number: int
    seed: int
    frame: ChatFrame
    lengths: Lengths
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    library: Library
    tokens: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    ended: bool = False
    origin: Origin = Origin.INSTRUCTION
    """Of the tokens drawn now."""
    temperature: float = 1.0
    """At which they are drawn."""
    _rng: np.random.Generator = field(init=False)
    _turn_start: int = 0
    _instruction: str = ""
    _ngrams: set[tuple[int, ...]] = field(default_factory=set)
    _loop_len: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng([self.seed, self.number])

    def begin(self) -> None:
        """Writes what stands before the first token to be drawn."""
        self._give(self.frame.opening)
        if not self.frame.has_turns:
            self._start_answer()
            return
        self._start_instruction()
        kind = tasks.draw_kind(self._rng)
        if kind is Kind.OPENED:
            self._give(self.encode(tasks.opener(self._rng)))
        elif kind in (Kind.ON_TEXT, Kind.QUESTION) and len(self.library) >= 4:
            self._give_request(self._quoting(kind))

    def add(self, token_id: int) -> None:
        """Takes a token drawn at `temperature`, and writes what follows by itself."""
        self.tokens.append(token_id)
        self.origins.append(self.origin)
        turn_len = len(self.tokens) - self._turn_start
        stopped = token_id in self.frame.stop_ids
        if self.origin is Origin.INSTRUCTION:
            if stopped or turn_len >= self.lengths.max_instruction:
                self._end_instruction()
        elif stopped or turn_len >= self.lengths.max_answer or self._loops():
            self._end_answer()
        if len(self.tokens) >= self.lengths.max_conversation:
            self.ended = True

    def _give(self, token_ids: Sequence[int]) -> None:
        """Writes tokens that nobody draws; too many end the conversation."""
        if len(self.tokens) + len(token_ids) >= self.lengths.max_conversation:
            self.ended = True
            return
        self.tokens.extend(token_ids)
        self.origins.extend([Origin.GIVEN] * len(token_ids))

    def _give_request(self, text: str) -> None:
        self._give(self.encode(text))
        self._end_instruction()

    def _quoting(self, kind: Kind) -> str:
        if kind is Kind.ON_TEXT:
            return tasks.on_text(self._rng, self.library.draw(self._rng, 1)[0].answer)
        written = self.library.draw(self._rng, int(self._rng.integers(1, 5)))
        return tasks.question_on(self._rng, [one.answer for one in written], written[0].instruction)

    def _start_instruction(self) -> None:
        self.origin, self.temperature = Origin.INSTRUCTION, float(self._rng.choice(_INSTRUCTION_TEMPERATURES))
        self._turn_start = len(self.tokens)

    def _end_instruction(self) -> None:
        words = [token for token in self.tokens[self._turn_start :] if token not in self.frame.stop_ids]
        if not words:
            self.ended = True
            return
        self._instruction = self.decode(words)
        self._give(self.frame.rest(self.frame.reply, self.tokens[-1]))
        self._start_answer()

    def _start_answer(self) -> None:
        origins = list(ANSWER_SHARES)
        self.origin = origins[self._rng.choice(len(origins), p=list(ANSWER_SHARES.values()))]
        self.temperature = _ANSWER_TEMPERATURES[self.origin]
        self._turn_start = len(self.tokens)
        self._ngrams, self._loop_len = set(), 0

    def _end_answer(self) -> None:
        words = [token for token in self.tokens[self._turn_start :] if token not in self.frame.stop_ids]
        looped = self._loop_len >= _MAX_LOOP_LEN
        if self._instruction and len(words) >= 32 and not looped:
            self.library.add(Written(self._instruction, self.decode(words)))
        closed = not looped and self.frame.has_turns and self.tokens[-1] in self.frame.stop_ids
        if closed and self._rng.random() < FOLLOW_SHARE:
            self._start_next_turn()
        else:
            self.ended = True

    def _start_next_turn(self) -> None:
        self._give(self.frame.rest(self.frame.next, self.tokens[-1]))
        self._start_instruction()
        if self._rng.random() < 0.5 and not self.ended:
            self._give_request(tasks.follow_up(self._rng))

    def _loops(self) -> bool:
        """Whether the answer repeats itself; asked once for each of its tokens."""
        ngram = tuple(self.tokens[-_LOOP_NGRAM_LEN:])
        if len(self.tokens) - self._turn_start < _LOOP_NGRAM_LEN:
            return False
        self._loop_len = self._loop_len + 1 if ngram in self._ngrams else 0
        self._ngrams.add(ngram)
        return self._loop_len >= _MAX_LOOP_LEN
