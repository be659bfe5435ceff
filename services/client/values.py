"""What a caller of the client hands in and gets back.

Owns: immutable values of the public interface. Must not know: protobuf messages, gRPC, how a stream is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.values import FinishReason, SamplingParams, TokenOrigin, TopLogProbs, VerificationMethod


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation. `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that the server puts into the model's chat template."""

    messages: tuple[ChatMessage, ...]

    @classmethod
    def of(cls, user: str, *, system: str | None = None) -> Chat:
        """A conversation of one user message, after an optional system message."""
        head = (ChatMessage("system", system),) if system is not None else ()
        return cls((*head, ChatMessage("user", user)))


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids of the target's vocabulary, taken as they are."""

    token_ids: tuple[int, ...]


Prompt = str | Chat | TokenIds
"""A `str` is plain text and passes no chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How to generate. The server checks every value and names the field that it refuses.

    A seed that is not given is drawn by the client, so that a resumed stream and its first attempt are one generation.
    `num_draft_tokens`: draft tokens a round; 0 decodes plainly, None leaves it to the server. `draft` names the draft
    pool to use; empty leaves it to the server. Only requests of one `cache_salt` share cached prefixes on the workers:
    give each user of yours one where they shall not tell by the speed what others sent. It changes no token.
    """

    model: str = ""
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    verification: VerificationMethod = VerificationMethod.COUPLED
    num_draft_tokens: int | None = None
    draft: str = ""
    log_probs: bool = False
    num_top_log_probs: int = 0
    include_special_tokens: bool = False
    cache_salt: str = ""

    def sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=seed,
            min_tokens=self.min_tokens,
        )


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `text` became certain with it: empty while a character or stop string is incomplete."""

    token_id: int
    origin: TokenOrigin
    text: str
    log_prob: float | None = None
    top_log_probs: TopLogProbs | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the stream. `text` is that of `tokens`, and at the end whatever was held back: `trailing_text`.

    `offset` is the first token's index among the generated tokens; `durable_len` counts those that the session's record
    holds.
    """

    text: str
    tokens: tuple[Token, ...]
    offset: int
    durable_len: int

    @property
    def trailing_text(self) -> str:
        return self.text[sum(len(token.text) for token in self.tokens) :]


@dataclass(frozen=True, slots=True)
class Round:
    """One round. `token_offset` is its first token's index among the generated tokens.

    What the trim took away counts neither as drafted nor as accepted.
    """

    token_offset: int
    num_draft_tokens: int
    num_accepted_tokens: int
    draft_ms: float
    verify_ms: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts and times of one generation; if it was resumed, rounds, drafts and times are those of the last stream.

    `overhead_ms`: each round's wall time at the coordinator less the workers' own reported times; `rounds` is parallel.
    """

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    num_verified_tokens_per_pos: tuple[int, ...] = ()
    num_rounds: int = 0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    overhead_ms: tuple[float, ...] = ()
    lossy: bool = False
    num_replaced_tokens: int = 0
    num_replaced_rows: int = 0
    draft: str = ""
    rounds: tuple[Round, ...] = ()

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None if nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens a verify step that had a draft, the target's own included; None if there was none."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation. `num_resumptions` counts the streams that broke on the way."""

    text: str
    tokens: tuple[Token, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    statistics: Statistics
    session_id: str
    request_id: str
    model: str
    seed: int
    lossy: bool
    num_resumptions: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as the server's store holds it. `finish_reason` is None while it runs or after it was cut off."""

    session_id: str
    request_id: str
    model: str
    token_ids: tuple[int, ...]
    prompt_len: int
    running: bool
    finish_reason: FinishReason | None
    lease_epoch: int
    expires_in_s: int


@dataclass(frozen=True, slots=True)
class DraftPool:
    """Draft workers of one kind that requests may name, and what became of their proposals since the server started."""

    name: str
    weight: float
    drafter: str
    draft_model: str
    ready: bool
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None if nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model pair that requests may name."""

    name: str
    digest: str
    drafter: str
    draft_model: str
    vocab_size: int
    max_sequence_len: int
    ready: bool
    drafts: tuple[DraftPool, ...] = ()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a broken stream is resumed, and when not any more.

    `max_attempts` failures in a row end it once the server has been reached, `max_attempts_unreached` before. Waits
    grow from `initial_backoff_s` to `max_backoff_s`, with jitter. A stream is broken after `heartbeat_timeout_s`
    without a message (servers send one every 500 ms); the first one, with the connection, may take
    `first_message_timeout_s`. Any token received starts the count anew. A generation that has begun outlasts what a
    coordinator says will pass, and when to ask again (a target or a Redis that restarts), for `max_told_wait_s` of
    waits, however many failures those are.
    """

    max_attempts: int = 10
    max_attempts_unreached: int = 4
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    heartbeat_timeout_s: float = 1.5
    first_message_timeout_s: float = 3.0
    max_told_wait_s: float = 120.0
