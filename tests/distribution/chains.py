"""Many short generations at once through the real sampler and verifier, over models that are tables of logits.

Owns: the drafters, the processing and the exact distribution of the first tokens. Must not know: how results are
judged. A chain has a seed of its own and is drawn in rounds of 1 to 3 drafted tokens until NUM_TOKENS are there, so
that accepted, residual and bonus tokens, and the first of a later round, all stand among them.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.common.items import Identity
from services.common.values import Proposal, SamplingParams, SparseRow, VerificationMethod, derive_draft_seed
from services.engine.processing import Row
from services.engine.sampler import Sampler
from services.engine.sequence import Sequence
from services.engine.step import Sampled, Work
from services.engine.verifier import Verifier
from tests.unit.engine.processing_reference import reference
from tests.unit.engine.sampling_builders import TableModel

NUM_TOKENS = 3
PROMPT = [1, 2]
CHUNK_LEN = 4_000

PROCESSING = {
    "plain": SamplingParams(),
    "top_k": SamplingParams(temperature=1.3, top_k=4),
    "top_p": SamplingParams(temperature=1.5, top_p=0.85),
    "min_p": SamplingParams(temperature=2.0, min_p=0.08),
    "penalties": SamplingParams(
        temperature=1.2, repetition_penalty=1.4, presence_penalty=0.9, frequency_penalty=0.8, logit_bias=((3, 1.0),)
    ),
    "all": SamplingParams(
        temperature=1.6, top_k=6, top_p=0.95, min_p=0.01, presence_penalty=0.6, frequency_penalty=0.7
    ),
}
DRAFTERS = ("good", "bad", "deterministic", "identical", "lying")


@dataclass(frozen=True, slots=True)
class Case:
    """One combination to draw from."""

    drafter: str
    processing: str
    vocab_size: int
    method: VerificationMethod

    def __str__(self) -> str:
        return f"{self.drafter}-{self.processing}-{self.vocab_size}-{self.method.value}"

    @property
    def sampling(self) -> SamplingParams:
        return PROCESSING[self.processing]

    @property
    def target(self) -> TableModel:
        return TableModel(self.vocab_size, seed=self.vocab_size)

    @property
    def draft(self) -> TableModel:
        """Near the target for `good` and `lying`, the target itself, or a stranger."""
        model = TableModel(self.vocab_size, seed=99)
        match self.drafter:
            case "identical":
                return self.target
            case "good" | "lying":
                model.table = self.target.table + 0.4 * model.table
        return model


def open_sequence(case: Case, seed: int) -> Sequence:
    """A sequence that holds the prompt."""
    p = case.sampling
    return Sequence(
        identity=Identity("chain", 1, 1, 0, len(PROMPT)),
        tokens=list(PROMPT),
        prompt_len=len(PROMPT),
        eos_token_ids=frozenset(),
        sampling=SamplingParams(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            logit_bias=p.logit_bias,
            seed=seed,
        ),
        verification=case.method,
        max_len=len(PROMPT) + 100,
    )


def draft_seed(case: Case, seed: int) -> int:
    """What a coordinator gives to the draft."""
    return derive_draft_seed(seed) if case.method is VerificationMethod.REJECTION else seed


def tell_lies(sampled: Sampled, vocab_size: int) -> Sampled:
    """A row that makes the token look unlikely, so that it would always be accepted. Of a draft that has no rows to
    send, another token than it meant, with a row that nobody asked for."""
    token = sampled.token_id if sampled.row else (sampled.token_id + 1) % vocab_size
    known = sampled.row.token_ids if sampled.row else ()
    other = next((i for i in known if i != token), token ^ 1)
    return Sampled(token, SparseRow((token, other), (2.0**-10, 1 - 2.0**-10)))


class Drafting:
    """Proposes for many sequences at once."""

    def __init__(self, case: Case) -> None:
        self._lies = case.drafter == "lying"
        self._certain = case.drafter == "deterministic"
        self._model = case.draft
        self._sampler = Sampler()

    def propose(self, drafts: list[Sequence], num_tokens: list[int]) -> list[Proposal]:
        """Up to num_tokens tokens behind each draft's, to which they are appended."""
        tokens: list[list[int]] = [[] for _ in drafts]
        rows: list[list[SparseRow | None]] = [[] for _ in drafts]
        for step in range(max(num_tokens)):
            lines = [line for line, num in enumerate(num_tokens) if num > step]
            for line, (token, row) in zip(lines, self._sample([drafts[line] for line in lines]), strict=True):
                drafts[line].tokens.append(token)
                tokens[line].append(token)
                rows[line].append(row)
        return [Proposal(1, tuple(t), tuple(r)) for t, r in zip(tokens, rows, strict=True)]

    def _sample(self, drafts: list[Sequence]) -> list[Sampled]:
        if self._certain:
            best = self._model.table.argmax(dim=1).tolist()
            return [Sampled(best[draft.tokens[-1]], None) for draft in drafts]
        works = [Work(draft, 1, None, 1) for draft in drafts]
        sampled = [token for token in self._sampler.sample(works, self._model.logits(works)) if token]
        return [tell_lies(token, self._model.table.shape[1]) for token in sampled] if self._lies else sampled


def draw(case: Case, num_draws: int) -> npt.NDArray[np.int64]:
    """How often each sequence of NUM_TOKENS tokens came, `num_draws` tokens in all: [vocab_size ** NUM_TOKENS]."""
    num_chains = -(-num_draws // NUM_TOKENS)
    counts = np.zeros(case.vocab_size**NUM_TOKENS, dtype=np.int64)
    with without_cycle_collection():
        for start in range(0, num_chains, CHUNK_LEN):
            seeds = range(start, min(start + CHUNK_LEN, num_chains))
            counts += count_cells(draw_chains(case, seeds), case.vocab_size)
    return counts


@contextmanager
def without_cycle_collection() -> Iterator[None]:
    """Chains are many small objects without cycles; looking for cycles among them takes half of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def draw_chains(case: Case, seeds: range) -> npt.NDArray[np.int64]:
    """The first tokens of a chain for each seed: [chains, NUM_TOKENS]."""
    drafting, target, verifier = Drafting(case), case.target, Verifier(untrusted_drafts=case.drafter == "lying")
    chains = [(open_sequence(case, seed), open_sequence(case, draft_seed(case, seed))) for seed in seeds]
    running = chains
    while running:
        sequences = [sequence for sequence, _ in running]
        proposals = drafting.propose([draft for _, draft in running], [1 + s.sampling.seed % 3 for s in sequences])
        works = [Work(s, 1, p, 1 + len(p.token_ids)) for s, p in zip(sequences, proposals, strict=True)]
        for (sequence, draft), verdict in zip(running, verifier.verify(works, target.logits(works)), strict=True):
            if verdict is None or verdict.rows_replaced:
                raise AssertionError("a row of the sampler's, or one that nobody should look at, was found invalid")
            sequence.tokens += verdict.token_ids
            draft.tokens[:] = sequence.tokens
        running = [(sequence, draft) for sequence, draft in running if len(sequence) < len(PROMPT) + NUM_TOKENS]
    return np.array([sequence.tokens[len(PROMPT) :][:NUM_TOKENS] for sequence, _ in chains])


def count_cells(tokens: npt.NDArray[np.int64], vocab_size: int) -> npt.NDArray[np.int64]:
    """Counts of token sequences [draws, NUM_TOKENS], the first token being the most significant digit of a cell."""
    cells = tokens @ vocab_size ** np.arange(NUM_TOKENS - 1, -1, -1)
    return np.bincount(cells, minlength=vocab_size**NUM_TOKENS)


def exact(case: Case) -> npt.NDArray[np.float64]:
    """The probability of each cell under the target alone, by the slow reference of processing."""
    table, sequence = case.target.table.tolist(), open_sequence(case, 0)
    probs = {(): 1.0}
    for _ in range(NUM_TOKENS):
        longer = {}
        for tokens, prob in probs.items():
            scores = reference(table[[*PROMPT, *tokens][-1]], Row(sequence, tokens))
            longer |= {(*tokens, token): prob * math.exp(score) for token, score in enumerate(scores)}
        probs = longer
    return np.array([probs[tokens] for tokens in itertools.product(range(case.vocab_size), repeat=NUM_TOKENS)])
