"""From logits to scores: penalties, bias, end-of-sequence mask, temperature, truncation; for target and draft alike.

Owns: the order and the meaning of these steps. Must not know: verification, noise, models, the wire.
Invariant: a row's scores depend on that row alone, not on the rows beside it. Steps, in order:

    1. repetition penalty   every token before the row, prompt included: divides positive logits, multiplies the others
    2. presence, frequency  tokens before the row from prompt_len on: subtracted once, and once an occurrence
    3. logit bias           added
    4. min_tokens           end-of-sequence ids at -inf while index - prompt_len < min_tokens
       a greedy row ends here: its scores serve only an argmax
    5. temperature          divides
    6. top-k                keeps the k highest; among equals at the boundary the lowest ids
    7. top-p                keeps the fewest highest whose probability, renormalised over what is left, reaches top_p
    8. min-p                keeps what has at least min_p times the highest probability
    9. log-softmax          over what is left; everything else is at -inf
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.values import SamplingParams
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.transfer import to_device

_FIRST_SORT_LEN = 512
"""Highest scores that a host sorts for top-p at first; almost always they are enough."""

_MIN_TEMPERATURE = 1e-37
"""Where float32 still divides by it."""

_MAX_SCORE = 1e30
"""What the repetition penalty leaves: one near 0 would leave float32, and a row with an infinity has no softmax."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: it chooses the token behind `sequence.tokens` and `drafted`."""

    sequence: Sequence
    drafted: tuple[int, ...] = ()

    @property
    def index(self) -> int:
        """Absolute index of the token that the row chooses."""
        return len(self.sequence.tokens) + len(self.drafted)

    @property
    def sampling(self) -> SamplingParams:
        return self.sequence.sampling

    @property
    def masks_eos(self) -> bool:
        return self.index - self.sequence.prompt_len < self.sampling.min_tokens


def rows_of(works: list[Work]) -> list[Row]:
    """The rows of logits that a step yields, in order."""
    return [Row(work.sequence, work.drafted[:n]) for work in works for n in range(work.num_rows)]


def process(logits: Tensor, rows: list[Row]) -> Tensor:
    """Float32 logits [R, V] to scores [R, V]: log-probabilities, or adjusted logits where the row is greedy.

    `logits` must be finite; it is not changed, and is returned itself where no row asks for anything. Token ids of V or
    more, which a model with a smaller padded vocabulary doesn't have, are skipped. No transfer off the device.
    """
    scores = _adjust(logits, rows)
    sampled = [r for r, row in enumerate(rows) if not row.sampling.greedy]
    if not sampled:
        return scores
    params = [rows[r].sampling for r in sampled]
    if len(sampled) == len(rows):
        return _distribution(scores, params)
    at = to_device(np.array(sampled), logits.device)
    return scores.index_copy(0, at, _distribution(scores[at], params))


def _adjust(logits: Tensor, rows: list[Row]) -> Tensor:
    """Steps 1 to 4, each touching only the entries that it changes."""
    penalised = [r for r, row in enumerate(rows) if row.sampling.has_penalties]
    biased = [r for r, row in enumerate(rows) if row.sampling.logit_bias]
    masked = [r for r, row in enumerate(rows) if row.sampling.min_tokens and row.masks_eos]
    if not penalised and not biased and not masked:
        return logits
    scores = logits.clone()
    if penalised:
        _penalise(scores, rows, penalised)
    if biased:
        biases = [rows[r].sampling.logit_bias for r in biased]
        at, (values,) = _entries(
            scores,
            np.repeat(biased, [len(bias) for bias in biases]),
            np.array([token for token, _ in chain.from_iterable(biases)]),
            np.array([value for _, value in chain.from_iterable(biases)]),
        )
        scores[at] += values
    if masked:
        eos = [sorted(rows[r].sequence.eos_token_ids) for r in masked]
        flat = np.array(list(chain.from_iterable(eos)), dtype=np.int64)
        at, _ = _entries(scores, np.repeat(masked, [len(ids) for ids in eos]), flat)
        scores[at] = -torch.inf
    return scores


Entries = tuple[Tensor, Tensor]


def _entries(
    scores: Tensor, rows: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], *columns: npt.NDArray[np.float64]
) -> tuple[Entries, list[Tensor]]:
    """Index of the entries (row, id) that `scores` has, and the float32 columns beside them, on its device."""
    known = ids < scores.shape[1]
    at = to_device(rows[known], scores.device), to_device(ids[known], scores.device)
    return at, [to_device(column[known].astype(np.float32), scores.device) for column in columns]


def _penalise(scores: Tensor, rows: list[Row], penalised: list[int]) -> None:
    seen = _count_tokens([rows[r] for r in penalised])
    lens = [len(counts) for counts in seen]
    params = [rows[r].sampling for r in penalised]
    at, (count, repetition, presence, frequency) = _entries(
        scores,
        np.repeat(penalised, lens),
        np.fromiter(chain.from_iterable(seen), dtype=np.int64),
        np.fromiter(chain.from_iterable(counts.values() for counts in seen), dtype=np.float64),
        np.repeat([p.repetition_penalty for p in params], lens),
        np.repeat([p.presence_penalty for p in params], lens),
        np.repeat([p.frequency_penalty for p in params], lens),
    )
    values = scores[at]
    values = torch.where(values > 0, values / repetition, values * repetition).clamp(-_MAX_SCORE, _MAX_SCORE)
    scores[at] = values - presence * (count > 0) - frequency * count


def _count_tokens(rows: list[Row]) -> list[Counter[int]]:
    """For each row the tokens before it, with how often each stands from prompt_len on; 0: in the prompt alone.

    Committed tokens are counted once for all rows of a sequence.
    """
    seen: list[Counter[int]] = []
    sequence: Sequence | None = None
    committed: Counter[int] = Counter()
    for row in rows:
        if row.sequence is not sequence:
            sequence = row.sequence
            committed = Counter(dict.fromkeys(sequence.tokens, 0))
            committed.update(sequence.tokens[sequence.prompt_len :])
        counts = committed
        if row.drafted:
            counts = committed.copy()
            counts.update(row.drafted)
        seen.append(counts)
    return seen


def _distribution(scores: Tensor, params: list[SamplingParams]) -> Tensor:
    """Steps 5 to 9, for rows that are sampled from."""
    if any(p.temperature != 1.0 for p in params):
        temperature = _column([max(p.temperature, _MIN_TEMPERATURE) for p in params], scores)
        cooled = (scores - scores.amax(dim=1, keepdim=True)) / temperature
        scores = torch.where(temperature == 1.0, scores, cooled)
    vocab_size = scores.shape[1]
    limited = [r for r, p in enumerate(params) if 0 < p.top_k < vocab_size or p.top_p < 1.0]
    if limited:
        at = to_device(np.array(limited), scores.device)
        kept = _keep_highest(scores[at], [params[r] for r in limited])
        scores = scores.index_copy(0, at, kept)
    if any(p.min_p > 0.0 for p in params):
        floor = _column([p.min_p for p in params], scores).log() + scores.amax(dim=1, keepdim=True)
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return torch.log_softmax(scores, dim=1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.float32), like.device)[:, None]


def _keep_highest(scores: Tensor, params: list[SamplingParams]) -> Tensor:
    """Top-k, then top-p. Both keep a number of the highest, so this number and the lowest score kept say it all."""
    vocab_size = scores.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    top_p = [p.top_p if p.top_p < 1.0 else torch.inf for p in params]
    highest, num_kept = _count_highest(scores, top_k, top_p)

    lowest = highest.gather(1, num_kept - 1)
    above, equal = scores > lowest, scores == lowest
    num_equal = num_kept - above.sum(dim=1, keepdim=True)
    return scores.masked_fill(~(above | (equal & (equal.cumsum(dim=1) <= num_equal))), -torch.inf)


def _count_highest(scores: Tensor, top_k: list[int], top_p: list[float]) -> tuple[Tensor, Tensor]:
    """The highest scores in descending order, and how many of them each row keeps, int64 [R, 1], at least 1.

    top_k = V and top_p = inf limit nothing. A host sorts a few at first, and more only where top-p reaches beyond them.
    """
    device, vocab_size, sort_len = scores.device, scores.shape[1], max(top_k)
    if device.type == "cpu" and sort_len > _FIRST_SORT_LEN:
        sort_len = max([_FIRST_SORT_LEN, *(k for k in top_k if k < vocab_size)])
    limit = to_device(np.array(top_k), device)[:, None]
    share = to_device(np.array(top_p, dtype=np.float64), device)[:, None]
    peak = scores.amax(dim=1, keepdim=True).double()
    whole = (scores.double() - peak).exp().sum(dim=1, keepdim=True)
    while True:
        highest = scores.topk(sort_len, dim=1).values
        mass = (highest.double() - peak).exp().cumsum(dim=1)
        limited_mass = mass.gather(1, (limit - 1).clamp(max=sort_len - 1))
        wanted = share * torch.where(limit == vocab_size, whole, limited_mass)
        if sort_len >= max(top_k) or bool(((limit <= sort_len) | (mass[:, -1:] >= wanted)).all()):
            break
        sort_len = max(top_k)
    mass_before = torch.cat([torch.zeros_like(peak), mass[:, :-1]], dim=1)
    within = torch.arange(sort_len, device=device)[None] < limit
    num_kept = (within & (mass_before < wanted)).sum(dim=1, keepdim=True)
    return highest, num_kept.clamp(min=1)  # 0 of a row without numbers
