"""Drafts by suffix trees: what most often followed the longest end of the sequence that occurred before.

Owns: the trees of the open sequences, and how long a proposal is. Must not know: models, blocks, torch. After
SuffixDecoding (Oliaro et al. 2024): a proposal goes on greedily by the counts of the tree, as
long as the product of the estimated probabilities is high enough, and its length is bounded by that of the match.

It is deterministic, so its tokens have no rows. Only committed tokens enter a tree.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

from services.common.values import VerificationMethod
from services.engine.drafters.base import Draft, Pool
from services.engine.drafters.output_memory import OutputMemory
from services.engine.drafters.suffix_tree import SuffixTree
from services.engine.sequence import Sequence

MAX_DEPTH = 16
MAX_SEQUENCE_NODES = 1 << 18
"""Of one sequence's tree: about 80 MB, or 50,000 tokens of natural text."""
MAX_INDEXED_TOKENS = 1 << 15
"""Most of a sequence's last tokens that a tree starts with."""


@dataclass(frozen=True, slots=True)
class SuffixPolicy:
    """How far a match is trusted."""

    min_match: int = 1
    """A shorter match yields no proposal."""
    max_len_factor: float = 2.0
    """A proposal has at most this many tokens for each token of the match; the longest match knows no bound."""
    min_prob: float = 0.1
    """A proposal ends before the estimated probability of all of it falls below this."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_match < MAX_DEPTH:
            raise ValueError(f"min_match: {self.min_match} is not between 1 and {MAX_DEPTH - 1}")
        if self.max_len_factor <= 0.0 or not 0.0 <= self.min_prob <= 1.0:
            raise ValueError(f"max_len_factor: {self.max_len_factor}, min_prob: {self.min_prob}")


class Continuation(NamedTuple):
    """What a tree expects. `score` is the expected number of accepted tokens, if the tree's estimates were right."""

    token_ids: tuple[int, ...]
    score: float


NOTHING = Continuation((), 0.0)


def continuation(tree: SuffixTree, tokens: Items[int], max_tokens: int, policy: SuffixPolicy) -> Continuation:
    """The tree's continuation of `tokens`, of at most `max_tokens` tokens."""
    context_len = tree.match(tokens)
    if context_len < policy.min_match:
        return NOTHING
    if context_len < tree.max_context_len:
        max_tokens = min(max_tokens, int(policy.max_len_factor * context_len))
    path = list(tokens[len(tokens) - context_len :])
    prob, score = 1.0, 0.0
    for _ in range(max_tokens):
        follower = tree.follower(path[-tree.max_context_len :])
        if follower is None or prob * follower.prob < policy.min_prob:
            break
        prob *= follower.prob
        score += prob
        path.append(follower.token_id)
    return Continuation(tuple(path[context_len:]), score)


class _Index:
    """The tree of one sequence's committed tokens, at most MAX_SEQUENCE_NODES nodes: old tokens go first."""

    def __init__(self, sequence: Sequence) -> None:
        self._start(sequence, sequence.num_committed - MAX_INDEXED_TOKENS)

    def _start(self, sequence: Sequence, first: int) -> None:
        self.tree = SuffixTree(MAX_DEPTH)
        self._text = self.tree.new_text()
        self._first = self._num_indexed = max(0, first)
        self.extend(sequence)

    def extend(self, sequence: Sequence) -> None:
        """Adds the committed tokens behind those indexed already."""
        for token_id in sequence.tokens[self._num_indexed : sequence.num_committed]:
            self.tree.append(self._text, token_id)
        self._num_indexed = sequence.num_committed
        if self.tree.num_nodes > MAX_SEQUENCE_NODES:
            self._start(sequence, (self._first + self._num_indexed) // 2)


class SuffixDrafter:
    """The Drafter over suffix trees (services.engine.drafters.base.Drafter).

    Looks into the tree of the sequence, and with a `memory` into what earlier sequences wrote, and proposes what
    promises more accepted tokens. A commit costs time in its new tokens only, whatever the sequence's length.

    Sequences share a memory where they have the same cache salt and the same end-of-sequence ids, which tell tenants
    and most vocabularies apart. Under rejection a sequence sees no output that the same seed chose: a proposal must
    not know the target's noise.
    """

    def __init__(self, policy: SuffixPolicy | None = None, memory: OutputMemory | None = None) -> None:
        self._policy = policy or SuffixPolicy()
        self._memory = memory
        self._indexes: dict[Draft, _Index] = {}

    @property
    def kind(self) -> str:
        return "suffix"

    @property
    def info(self) -> None:
        return None

    @property
    def blocks(self) -> None:
        return None

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        return []

    def open(self, draft: Draft) -> None:
        self._indexes[draft] = _Index(draft.sequence)

    def commit(self, draft: Draft, num_kept: int) -> None:
        """Only committed tokens are indexed, and those never change."""
        self._indexes[draft].extend(draft.sequence)

    def close(self, draft: Draft) -> None:
        del self._indexes[draft]
        if self._memory is not None:
            sequence = draft.sequence
            output = sequence.tokens[sequence.prompt_len : sequence.num_committed]
            self._memory.remember(_group(draft), output, _noise_seed(draft))

    def is_ready(self, draft: Draft) -> bool:
        return True

    def has_work(self, drafts: list[Draft]) -> bool:
        return any(draft.num_missing_tokens for draft in drafts)

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """Completes every proposal in progress."""
        taking_part = [draft for draft in drafts if draft.num_missing_tokens]
        for draft in taking_part:
            tokens = draft.sequence.tokens[-MAX_DEPTH:]
            found = [continuation(t, tokens, draft.num_missing_tokens, self._policy) for t in self._trees(draft)]
            for token_id in max(found, key=lambda best: best.score).token_ids:
                if draft.num_missing_tokens:  # an end-of-sequence token ends the proposal
                    draft.add(token_id)
            draft.end()
        return taking_part

    def _trees(self, draft: Draft) -> list[SuffixTree]:
        """Those that the draft may look into, its own first."""
        own = self._indexes[draft].tree
        if self._memory is None or (earlier := self._memory.tree(_group(draft))) is None:
            return [own]
        seed = _noise_seed(draft)
        if seed is not None and self._memory.has_seed(_group(draft), seed):
            return [own]
        return [own, earlier]


def _group(draft: Draft) -> Hashable:
    return draft.sequence.cache_salt, draft.sequence.eos_token_ids


def _noise_seed(draft: Draft) -> int | None:
    """The seed, where knowing what its noise chose before would let a proposal depend on the target's noise."""
    sequence = draft.sequence
    drawn = sequence.verification is VerificationMethod.REJECTION and not sequence.sampling.greedy
    return sequence.sampling.seed if drawn else None
