"""Self-play: the target writes instructions and answers, many conversations in one forward of the engine.

Owns: the batch, the draw of every token, and what is kept of the target's distribution. Must not know: files, what a
conversation consists of (conversation.Conversation). After Xu et al. 2024 (Magpie), section 2: an aligned model that is
given the opening of a user's turn writes an instruction.

A token is drawn by inversion of one counter-based variate, (seed, conversation, index), from the whole distribution at
temperature 1, from its ROW_LEN most likely tokens below, and is the most likely one at 0. Kept are the
log-probabilities at temperature 1 and, if asked for, the final hidden states that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.errors import ConfigError
from services.common.items import Identity, Open
from services.common.values import SamplingParams, VerificationMethod
from services.engine import noise
from services.engine.block_manager import BlockManager
from services.engine.noise import NoiseKeys, Purpose
from services.engine.runners import Runner
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.training.conversation import Conversation
from services.engine.training.shards import ROW_LEN, Rows, Transcript


class Drawn(NamedTuple):
    """A step's tokens [N] and the rows they were drawn from."""

    token_ids: npt.NDArray[np.int64]
    rows: Rows


@dataclass(slots=True, eq=False)
class _Player:
    conversation: Conversation
    sequence: Sequence
    rows: list[Rows] = field(default_factory=list)
    features: list[npt.NDArray[np.float16]] = field(default_factory=list)

    def transcript(self) -> Transcript:
        """What was written so far."""
        num_drawn = len(self.rows)
        empty = Rows(np.zeros((0, ROW_LEN), np.int64), np.zeros((0, ROW_LEN), np.float16), np.zeros(0, np.float32))
        stacked = Rows(*(np.stack(part) for part in zip(*self.rows, strict=True))) if num_drawn else empty
        origins = np.array(self.conversation.origins, dtype=np.uint8)
        features = np.stack(self.features) if self.features else None
        return Transcript(np.array(self.conversation.tokens, dtype=np.int32), origins, stacked, features)


class SelfPlay:
    """`num_sequences` conversations at a time, each replaced by the next when it ends.

    A forward takes `step_sequences` of them, neighbours in length: on CPU attention pads to the longest beside it.
    """

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        start: Callable[[int], Conversation],
        *,
        num_sequences: int,
        step_sequences: int,
        first_number: int = 0,
        keep_features: bool = False,
    ) -> None:
        """`start` makes a conversation by its number. The pool must hold `num_sequences` of the longest."""
        self._runner, self._blocks, self._start = runner, blocks, start
        self._num_sequences, self._step_sequences = num_sequences, step_sequences
        self.next_number = first_number
        self._keep_features = keep_features
        self._players: list[_Player] = []

    def step(self) -> list[Transcript]:
        """A token more of every conversation. Returns those that ended."""
        while len(self._players) < self._num_sequences:
            self._players.append(self._new_player())
        by_len = sorted(self._players, key=lambda player: len(player.sequence))
        for start in range(0, len(by_len), self._step_sequences):
            self._forward(by_len[start : start + self._step_sequences])
        return self._take_ended()

    def _forward(self, players: list[_Player]) -> None:
        works = [self._work(player) for player in players]
        logits = self._runner.forward(works)
        drawn = draw(logits, [player.conversation for player in players])
        features = self._features(len(players)) if self._keep_features else None
        for i, (player, work) in enumerate(zip(players, works, strict=True)):
            player.sequence.num_cached += work.num_new_tokens
            player.rows.append(Rows(*(part[i] for part in drawn.rows)))
            player.conversation.add(int(drawn.token_ids[i]))
            if features is not None:
                player.features.append(features[i])

    def _features(self, num_rows: int) -> npt.NDArray[np.float16]:
        """Of the last forward, one a row. Raises ConfigError for a model whose head cannot be listened to."""
        tap = self._runner.model.tap
        if tap is None:
            raise ConfigError("keep_features: the target does not give its final hidden states; leave it out")
        largest = torch.finfo(torch.float16).max
        features: npt.NDArray[np.float16] = tap.rows(num_rows).clamp(-largest, largest).half().cpu().numpy()
        return features

    def stop(self) -> Iterator[Transcript]:
        """Ends all conversations where they are; those that have said something are returned."""
        players, self._players = self._players, []
        for player in players:
            self._blocks.free(player.sequence)
            if player.rows:
                yield player.transcript()

    def _new_player(self) -> _Player:
        while True:
            conversation = self._start(self.next_number)
            self.next_number += 1
            conversation.begin()
            if not conversation.ended:
                return _Player(conversation, _sequence(conversation))

    def _work(self, player: _Player) -> Work:
        self._blocks.extend(player.sequence, len(player.sequence))
        return Work(player.sequence, player.sequence.num_uncached_tokens, num_rows=1)

    def _take_ended(self) -> list[Transcript]:
        ended = [player for player in self._players if player.conversation.ended]
        self._players = [player for player in self._players if not player.conversation.ended]
        for player in ended:
            self._blocks.free(player.sequence)
        return [player.transcript() for player in ended]


def _sequence(conversation: Conversation) -> Sequence:
    """Shares its list of tokens with the conversation, which alone appends to it."""
    identity = Identity(f"self-play {conversation.number}", 0, 0, 0, len(conversation.tokens))
    item = Open(identity, (), 0, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 0)
    sequence = Sequence.from_open(item)
    sequence.tokens = conversation.tokens
    return sequence


def draw(logits: Tensor, conversations: list[Conversation]) -> Drawn:
    """Draws the next token of every conversation from its row of float32 `logits` [N, V]."""
    row_len = min(ROW_LEN, logits.shape[1])
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    top = logits.topk(row_len, dim=1)
    log_probs = top.values - total
    tails = (1.0 - log_probs.exp().sum(dim=1)).clamp(min=0.0)
    temperatures = np.array([c.temperature for c in conversations])
    ids, head = top.indices.cpu().numpy(), log_probs.double().cpu().numpy()
    variates = _variates(conversations)
    places = _places(head, temperatures, variates)
    token_ids = ids[np.arange(len(ids)), np.minimum(places, row_len - 1)]
    for i in np.flatnonzero(places == row_len):
        token_ids[i] = _tail_token(logits[i], total[i], top.indices[i], variates[i] - np.exp(head[i]).sum())
    padding = ((0, 0), (0, ROW_LEN - row_len))
    rows = Rows(
        np.pad(ids, padding),
        np.pad(head.astype(np.float16), padding, constant_values=-np.inf),
        tails.float().cpu().numpy(),
    )
    return Drawn(token_ids, rows)


def _variates(conversations: list[Conversation]) -> npt.NDArray[np.float64]:
    """One uniform variate for each, of its number and the index of the token to come."""
    seeds = np.array([c.seed for c in conversations], dtype=np.uint64)
    indices = np.array([len(c.tokens) for c in conversations])
    forks = np.array([c.number for c in conversations])
    return noise.uniform(noise.words(NoiseKeys(seeds, indices, Purpose.TARGET, forks), 0))


def _places(
    head: npt.NDArray[np.float64], temperatures: npt.NDArray[np.float64], variates: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """The place drawn in each row of log-probabilities [N, L], most likely first; L stands for the tail."""
    places = np.zeros(len(head), dtype=np.int64)
    for i, temperature in enumerate(temperatures):
        if temperature == 0.0:
            continue
        probs = np.exp((head[i] - head[i, 0]) / temperature) if temperature != 1.0 else np.exp(head[i])
        sums = np.cumsum(probs)
        limit = sums[-1] if temperature != 1.0 else 1.0
        places[i] = np.searchsorted(sums, variates[i] * limit, side="right")
    below = temperatures != 1.0
    places[below] = np.minimum(places[below], head.shape[1] - 1)
    return places


def _tail_token(logits: Tensor, total: Tensor, top_ids: Tensor, rest: float) -> int:
    """The token at cumulative mass `rest` among those outside `top_ids`; the last one where rounding leaves none."""
    probs = (logits - total).double().exp()
    probs[top_ids] = 0.0
    sums = probs.cumsum(0)
    return int(torch.searchsorted(sums, min(max(rest, 0.0), float(sums[-1]) * (1 - 1e-12)), right=True))
