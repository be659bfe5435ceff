"""What a generation's sequences are opened with, on either worker.

Owns: the constants of one generation under one lease. Must not know: links, rounds' results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.common.items import Identity, Open
from services.common.logs import work_fields
from services.common.session_store import ANONYMOUS
from services.common.tracing import trace_id_of
from services.common.values import SamplingParams, VerificationMethod, derive_draft_seed


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Fixed when the session is acquired. `max_len` is the length at which the sequence ends, prompt included."""

    session_id: str
    lease_epoch: int
    prompt_len: int
    max_len: int
    end_token_ids: frozenset[int]
    """Ids that end the generation: the model's EOS unless ignored, and the request's stop tokens."""
    sampling: SamplingParams
    verification: VerificationMethod
    num_draft_tokens: int
    """Of every round; where `adaptive`, the most of any."""
    log_probs: bool
    num_top_log_probs: int
    vocab_size: int
    """The target's: what is proposed must lie within."""
    adaptive: bool = False
    cache_salt: bytes = b""
    fork: int = 0
    """The noise fork: sessions that are copies of one another draw differently from one seed."""
    traceparent: str = ""
    """The generation's trace; empty: it is not traced."""
    features: bool = False
    """Whether the draft uses the target's features."""

    def identity(self, attempt: int, round_number: int, base_len: int) -> Identity:
        return Identity(self.session_id, self.lease_epoch, attempt, round_number, base_len)

    def log_fields(self, round_number: int) -> dict[str, object]:
        """For `extra` of a log record."""
        return work_fields(self.session_id, round_number, trace_id_of(self.traceparent))

    def target_open(self, identity: Identity, tokens: Sequence[int]) -> Open:
        return replace(self._open(identity, tokens, self.sampling, self.max_len), features=self.features)

    def draft_open(self, identity: Identity, tokens: Sequence[int], max_sequence_len: int) -> Open:
        """Under rejection the draft gets a derived seed: it must not know the target's noise."""
        sampling = self.sampling
        if self.verification is VerificationMethod.REJECTION:
            sampling = replace(sampling, seed=derive_draft_seed(sampling.seed))
        draft = self._open(identity, tokens, sampling, min(self.max_len, max_sequence_len))
        return replace(draft, log_probs=False, num_top_log_probs=0)

    def _open(self, identity: Identity, tokens: Sequence[int], sampling: SamplingParams, max_len: int) -> Open:
        return Open(
            identity=identity,
            prefix=tuple(tokens),
            prompt_len=self.prompt_len,
            eos_token_ids=self.end_token_ids,
            sampling=sampling,
            verification=self.verification,
            max_new_tokens=max_len - len(tokens),
            log_probs=self.log_probs,
            num_top_log_probs=self.num_top_log_probs,
            cache_salt=self.cache_salt,
            fork=self.fork,
            traceparent=self.traceparent,
        )


def cache_salt(owner_key: str, request_salt: str = "") -> bytes:
    """What tells one owner's cached prefixes and remembered outputs from another's on the workers, so that nobody can
    tell by its own speed what others sent; and, within an owner's, those of one `request_salt` from those of another.
    It needs to be distinct, not secret: hashes never leave a worker."""
    owner_salt = hashlib.sha256(b"cache salt\0" + owner_key.encode()).digest()
    if request_salt:
        return hashlib.sha256(owner_salt + request_salt.encode()).digest()
    return b"" if owner_key == ANONYMOUS else owner_salt
