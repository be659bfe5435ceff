"""A sequence in a draft's own vocabulary, standing for one in the target's.

Owns: the tie between the two. Must not know: how one becomes the other. Touched by the engine thread alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class OwnSequence(Sequence):
    """Tokens, blocks and cache are of the draft's ids; only those that never change again count as committed."""

    target: Sequence = field(kw_only=True)
    """The same text in the target's vocabulary."""
    by_text: bool = field(kw_only=True)
    """Tokens are drafted in the own vocabulary and proposed as text; else they are chosen among the shared ones."""

    @classmethod
    def of(cls, target: Sequence, *, by_text: bool) -> OwnSequence:
        """Empty yet."""
        return cls(
            identity=target.identity,
            tokens=[],
            prompt_len=0,
            eos_token_ids=frozenset(),
            sampling=target.sampling,
            verification=target.verification,
            max_len=target.max_len,
            fork=target.fork,
            cache_salt=target.cache_salt,
            target=target,
            by_text=by_text,
        )
