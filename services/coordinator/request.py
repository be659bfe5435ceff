"""An admitted request: every value checked, every default filled in.

Owns: its shape, and the digest by which a repeated request_id is compared. Must not know: protobuf, sessions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from services.common.session_record import ANONYMOUS
from services.common.values import SamplingParams, VerificationMethod
from services.coordinator.chat_template import Message


@dataclass(frozen=True, slots=True)
class TextInput:
    """Plain text, tokenized as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatInput:
    """Messages for the chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TokenInput:
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a client stands: tokens received, and those of them beyond the last durable_len."""

    num_received_tokens: int
    tokens_beyond_durable: tuple[int, ...]
    num_prompt_tokens: int = 0
    """Tokens that the generation continues, as its client was told; 0: the client does not say."""


@dataclass(frozen=True, slots=True)
class Fork:
    """The session that a new one begins as a copy of: of its first `length` tokens, or of all that is recorded."""

    source_id: str
    length: int | None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation, as asked for. `seed` None: one is to be drawn; `sampling.seed` is then 0 and must be replaced."""

    session_id: str
    request_id: str
    model: str
    input: TextInput | ChatInput | TokenInput
    sampling: SamplingParams
    seed: int | None
    max_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    verification: VerificationMethod
    num_draft_tokens: int | None
    """None: the client leaves it to the coordinator."""
    draft: str
    """Name of the draft pool; empty leaves it to the pools' weights."""
    log_probs: bool
    num_top_log_probs: int
    ignore_eos: bool
    include_special_tokens: bool
    resume: ResumePoint | None
    fork: Fork | None = None
    cache_salt: str = ""
    """Only requests of one owner and one salt share cached prefixes. It changes no token."""
    owner_key: str = ANONYMOUS
    """Whose sessions these are; others see none of them."""
    default_num_draft_tokens: int | None = None
    """The coordinator's own choice, no part of what is asked. None: as many as pay, up to the server's limit."""

    @property
    def wanted_num_draft_tokens(self) -> int | None:
        """None: as many as pay."""
        return self.default_num_draft_tokens if self.num_draft_tokens is None else self.num_draft_tokens

    @property
    def digest(self) -> str:
        """SHA-256 over what must be equal when a request_id comes again, here or at a coordinator that is configured
        otherwise: all that the client asked but ids, resume point, owner and what changes no token."""
        return hashlib.sha256(f"{self.input!r}\n{self.parameters()}".encode()).hexdigest()

    def parameters(self) -> str:
        """The parameters as JSON, for the session's record. The prompt is not among them."""
        left_out = [
            "session_id",
            "request_id",
            "input",
            "resume",
            "owner_key",
            "default_num_draft_tokens",
            "cache_salt",
        ]
        names = [field.name for field in dataclasses.fields(self) if field.name not in left_out]
        values: dict[str, object] = {name: getattr(self, name) for name in names}
        values |= {"sampling": dataclasses.asdict(self.sampling), "verification": self.verification.value}
        values["fork"] = dataclasses.asdict(self.fork) if self.fork else None
        return json.dumps(values, sort_keys=True)
