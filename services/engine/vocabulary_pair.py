"""Which tokens of a draft's vocabulary are tokens of the target's.

Owns: the matching, and how much of either vocabulary it covers. Must not know: torch, sequences, how tokens are chosen.
Token-level intersection after Timor et al. 2025, "Accelerating LLM Inference with Lossless Speculative Decoding
Algorithms for Heterogeneous Vocabularies".

    text tokens      match by their bytes
    special tokens   match by their content; what is left, end by end and begin by begin of a sequence
Several draft tokens may match one target token, whose probability is then the sum of theirs. Of several target tokens
with the same bytes the lowest id stands for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.common.errors import ConfigError
from services.engine.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class VocabularyPair:
    """A draft's and a target's vocabulary."""

    draft: Vocabulary
    target: Vocabulary
    target_id_of: Mapping[int, int]
    """Draft id to target id, of the shared tokens, in order of the draft ids."""
    draft_id_of: Mapping[int, int]
    """Target id to the lowest draft id that matches it; special tokens included that only a prefix may hold."""

    @property
    def draft_share(self) -> float:
        """Shared tokens among the draft's."""
        return len(self.target_id_of) / max(1, len(self.draft))

    @property
    def target_share(self) -> float:
        """Shared tokens among the target's."""
        return len(set(self.target_id_of.values())) / max(1, len(self.target))

    @property
    def overlap(self) -> float:
        """The lesser of the two shares."""
        return min(self.draft_share, self.target_share)

    @property
    def summary(self) -> str:
        return (
            f"{len(self.target_id_of)} of the draft's {len(self.draft)} tokens ({self.draft_share:.1%}) are "
            f"{len(set(self.target_id_of.values()))} of the target's {len(self.target)} ({self.target_share:.1%})"
        )


def match_vocabularies(draft: Vocabulary, target: Vocabulary, min_overlap: float = 0.0) -> VocabularyPair:
    """Matches the tokens. Raises ConfigError where the overlap is below `min_overlap`."""
    matched = {i: target.id_of[data] for i, data in draft.bytes_of.items() if data in target.id_of}
    matched |= _match_special(draft, target)
    target_id_of = dict(sorted(matched.items()))
    draft_id_of = {target_id: i for i, target_id in reversed(target_id_of.items())}
    same_bytes = {i: draft.id_of[data] for i, data in target.bytes_of.items() if data in draft.id_of}
    pair = VocabularyPair(draft, target, target_id_of, same_bytes | _role_ids(draft, target) | draft_id_of)
    if pair.overlap < min_overlap or not target_id_of:
        raise ConfigError(f"min_vocab_overlap: {min_overlap} is not reached: {pair.summary}")
    return pair


def _match_special(draft: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """Draft id to target id of the special tokens that a draft may propose."""
    id_of_content = {content: i for i, content in target.special.items()}
    matched = {i: id_of_content[content] for i, content in draft.special.items() if content in id_of_content}
    if target.roles.eos:
        preferred = next((i for i in sorted(target.roles.eos) if i in matched.values()), min(target.roles.eos))
        matched |= {i: preferred for i in draft.roles.eos if i not in matched}
    return matched


def _role_ids(draft: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """Target id to draft id of what begins and ends sequences in the target's prefix."""
    ids: dict[int, int] = {}
    for mine, theirs in ((draft.roles.bos, target.roles.bos), (draft.roles.eos, target.roles.eos)):
        ids |= {i: min(mine) for i in theirs if mine}
    return ids
