"""Drafts with a model whose vocabulary is not the target's.

Owns: for every draft in the target's ids, one in the model's own ids, and what passes between them. Must not know:
torch, how the model's steps are computed (the drafter inside), how vocabularies match.

    commit    the committed text is encoded with the own vocabulary; what was cached stays up to the first own id that
              came out otherwise
    draft     by tokens: each is chosen among those that both vocabularies have, by its target id, and becomes an own id
              by text: own ids are drafted greedily and, once they are enough, encoded with the target's tokenizer
Proposals are hints in either case, and rows are exactly what their tokens were drawn from, so that the output stays the
target's own (Timor et al. 2025, string-level exact match and token-level intersection).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from services.common.values import ModelInfo, SparseRow
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Draft, Pool
from services.engine.drafters.model import ModelDrafter
from services.engine.own_sequence import OwnSequence
from services.engine.transcript import Transcript, continuation
from services.engine.vocabulary_pair import VocabularyPair

log = logging.getLogger(__name__)

OWN_TOKENS_A_TOKEN = 3
"""Most own tokens that are drafted by text, for each of the target's that is asked for."""

_NUM_TO_REPORT = 256
"""Drafted tokens after which the acceptance at start is logged."""


@dataclass(slots=True, eq=False)
class _OwnDraft(Draft):
    """A draft in own ids. `add` passes on to the outer draft, in the target's ids, what the sampler chose."""

    outer: Draft = field(kw_only=True)
    by_text: bool = field(kw_only=True)
    pair: VocabularyPair = field(kw_only=True)
    transcript: Transcript = field(kw_only=True)
    max_own_len: int = field(kw_only=True)
    drafted_text: bytes = b""
    num_read: int = 0
    """Of the outer sequence's tokens, those that the transcript has."""
    num_proposed: int = 0
    """Tokens of the outer draft's proposal."""

    @property
    def fits(self) -> bool:
        """Whether the model takes a sequence of that length."""
        return len(self.sequence) <= self.max_own_len

    @property
    def can_draft(self) -> bool:
        """Whether the model can say what comes next."""
        return 0 < len(self.sequence) < self.max_own_len and self.transcript.can_continue

    def follow(self) -> None:
        """Takes over what is asked of the outer draft."""
        self.awaited, self.deferred = self.outer.awaited, self.outer.deferred
        if not self.by_text:
            self.num_missing_tokens = self.outer.num_missing_tokens
        elif self.outer.num_missing_tokens and not self.num_missing_tokens:
            self.num_missing_tokens = OWN_TOKENS_A_TOKEN * self.outer.num_missing_tokens

    def add(self, token_id: int, row: SparseRow | None = None) -> None:
        if self.by_text:
            self._add_own(token_id)
            return
        self.outer.add(token_id, row)
        self.num_proposed += 1
        own_id = self.pair.draft_id_of.get(token_id)
        if own_id is None:  # only where the request leaves no shared token
            self.outer.end()
        else:
            self.sequence.tokens.append(own_id)
        self.num_missing_tokens = self.outer.num_missing_tokens

    def end(self) -> None:
        """What the model has no more to say for, the outer draft gets no more tokens of."""
        Draft.end(self)  # super() without arguments knows the class without slots
        self.outer.end()

    def _add_own(self, own_id: int) -> None:
        self.sequence.tokens.append(own_id)
        self.num_missing_tokens -= 1
        data = self.pair.draft.bytes_of.get(own_id)
        self.drafted_text += data or b""
        transcript = self.transcript
        ids = continuation(self.pair.target, transcript.context, transcript.unfinished, self.drafted_text)
        if data is None:  # special, or nothing at all: the text ends here
            special = self.pair.target_id_of.get(own_id)
            self._finish(ids if special is None else [*ids, special])
        elif len(ids) >= self.outer.num_missing_tokens or not self.num_missing_tokens or not self.can_draft:
            self._finish(ids)

    def _finish(self, target_ids: list[int]) -> None:
        """Proposes the ids, as far as tokens are asked for, and no more."""
        for token_id in target_ids:
            if self.outer.num_missing_tokens:
                self.outer.add(token_id)
                self.num_proposed += 1
        self.end()

    def take_commits(self) -> int:
        """Brings the own ids up to the committed text; returns how many of them stay."""
        start, token_ids = self.transcript.extend(self.outer.sequence.tokens[self.num_read :])
        self.num_read = len(self.outer.sequence)
        self.drafted_text, self.num_proposed = b"", 0
        self.end()
        old = self.sequence.tokens[start:]
        num_same = next((n for n, (a, b) in enumerate(zip(old, token_ids, strict=False)) if a != b), None)
        num_same = min(len(old), len(token_ids)) if num_same is None else num_same
        self.sequence.tokens[start + num_same :] = token_ids[num_same:]
        self.sequence.confirm(self.transcript.num_stable)
        return start + num_same


class TranslatedDrafter:
    """The Drafter over a ModelDrafter with a vocabulary of its own (services.engine.drafters.base.Drafter).

    The model's sampler must be a TranslatingSampler of the same `pair`. `greedy_by_text` has greedy sequences drafted
    by text, unless their logits are to be processed, which is defined for the target's ids. A sequence of more than
    `max_own_len` own ids gets empty proposals.
    """

    def __init__(
        self, inner: ModelDrafter, pair: VocabularyPair, *, max_own_len: int, greedy_by_text: bool = True
    ) -> None:
        self._inner = inner
        self._pair = pair
        self._max_own_len = max_own_len
        self._greedy_by_text = greedy_by_text
        self._own: dict[Draft, _OwnDraft] = {}
        self._info = replace(inner.info, vocab_digest=pair.target.digest, vocab_size=pair.target.size)
        self._acceptance = _Acceptance()

    @property
    def kind(self) -> str:
        return self._inner.kind

    @property
    def info(self) -> ModelInfo:
        """The model, with the vocabulary that it proposes in."""
        return self._info

    @property
    def blocks(self) -> BlockManager:
        return self._inner.blocks

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        return self._inner.pools([self._own[draft] for draft in drafts])

    def open(self, draft: Draft) -> None:
        sampling = draft.sequence.sampling
        is_processed = sampling.has_penalties or sampling.logit_bias or sampling.min_tokens
        by_text = bool(self._greedy_by_text and sampling.greedy and not is_processed)
        own = _OwnDraft(
            OwnSequence.of(draft.sequence, by_text=by_text),
            outer=draft,
            by_text=by_text,
            pair=self._pair,
            transcript=Transcript(self._pair),
            max_own_len=self._max_own_len,
        )
        self._own[draft] = own
        own.take_commits()
        self._inner.open(own)

    def commit(self, draft: Draft, num_kept: int) -> None:
        """Encodes the new text, and cuts the cache where own ids have changed."""
        own = self._own[draft]
        if own.num_proposed:  # another drafter of a chain may have proposed
            self._acceptance.add(own.num_proposed, num_kept - own.num_read)
        num_kept_own = own.take_commits()
        if not own.fits:
            self._inner.close(own)
        elif own.sequence.tokens:
            self._inner.commit(own, num_kept_own)

    def close(self, draft: Draft) -> None:
        self._inner.close(self._own.pop(draft))

    def is_ready(self, draft: Draft) -> bool:
        own = self._own[draft]
        return not own.fits or self._inner.is_ready(own)

    def has_work(self, drafts: list[Draft]) -> bool:
        owns = [self._own[draft] for draft in drafts]
        return any(own.outer.num_missing_tokens and not own.can_draft for own in owns) or (
            self._inner.has_work(_following(owns))
        )

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """One step of the model. Proposals that it cannot continue end as they are."""
        owns = [self._own[draft] for draft in drafts]
        ended = {id(own) for own in owns if own.outer.num_missing_tokens and not own.can_draft}
        for own in owns:
            if id(own) in ended:
                own.outer.end()
        taking_part = ended | {id(own) for own in self._inner.step(_following(owns))}
        for own in owns:
            if self._inner.is_ready(own):
                own.outer.sequence.num_cached = own.outer.sequence.num_committed - 1
            elif not own.sequence.num_cached:
                own.outer.sequence.num_cached = 0
        return [own.outer for own in owns if id(own) in taking_part]


def _following(owns: list[_OwnDraft]) -> list[Draft]:
    """The own drafts that the model takes, in order, with what is asked of them."""
    for own in owns:
        own.follow()
    return [own for own in owns if own.fits]


class _Acceptance:
    """Tells once how many of the first drafted tokens were accepted."""

    def __init__(self) -> None:
        self._num_drafted = self._num_accepted = 0
        self._is_told = False

    def add(self, num_drafted: int, num_accepted: int) -> None:
        self._num_drafted += num_drafted
        self._num_accepted += num_accepted
        if self._num_drafted >= _NUM_TO_REPORT and not self._is_told:
            self._is_told = True
            share = self._num_accepted / self._num_drafted
            log.info(
                "acceptance at start: %d of %d drafted tokens (%.2f)", self._num_accepted, self._num_drafted, share
            )
