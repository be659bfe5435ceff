"""A sequence: one session's tokens on one worker, and which of them are in the KV cache.

Owns: the length algebra. Must not know: torch, blocks' contents, the wire. Mutable; touched by the engine thread alone.

    tokens      0 ......... num_cached ......... len(tokens)
                [ in the cache )[   uncached   )

    tokens      0 ......... num_committed ...... len(tokens)
                [  for good    )[ may be cut   )

The last committed token is always uncached before its first row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.items import Identity, Open
from services.common.values import SamplingParams, VerificationMethod


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one open sequence. `block_table[i]` holds tokens [i * block_size, (i + 1) * block_size)."""

    identity: Identity
    """Of the newest item; `identity.generation` fences older work."""
    tokens: list[int]
    prompt_len: int
    eos_token_ids: frozenset[int]
    sampling: SamplingParams
    verification: VerificationMethod
    max_len: int
    """No token is generated at this index or beyond: the opening prefix's length + max_new_tokens."""
    log_probs: bool = False
    num_top_log_probs: int = 0
    fork: int = 0
    cache_salt: bytes = b""
    features: bool = False
    """On a target: verdicts shall carry the hidden states that their tokens were chosen from."""
    num_committed: int = 0
    """Tokens known to be committed: the opening prefix, and what later items stand on. They never change."""
    num_cached: int = 0
    num_shared_blocks: int = 0
    """The first blocks of the table, which are in the prefix index and are never written to."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the first blocks, as far as they were asked for (services.engine.prefix_cache)."""

    @classmethod
    def from_open(cls, item: Open) -> Sequence:
        return cls(
            identity=item.identity,
            tokens=list(item.prefix),
            prompt_len=item.prompt_len,
            eos_token_ids=item.eos_token_ids,
            sampling=item.sampling,
            verification=item.verification,
            max_len=len(item.prefix) + item.max_new_tokens,
            log_probs=item.log_probs,
            num_top_log_probs=item.num_top_log_probs,
            fork=item.fork,
            cache_salt=item.cache_salt,
            features=item.features,
            num_committed=len(item.prefix),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def confirm(self, num_tokens: int) -> None:
        """The first `num_tokens` tokens are committed. What was committed stays so, whatever is confirmed later."""
        if num_tokens > self.num_committed:
            self.num_committed = min(num_tokens, len(self.tokens))

    @property
    def num_uncached_tokens(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that may still be generated."""
        return max(0, self.max_len - len(self.tokens))
