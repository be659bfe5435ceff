"""What is simulated, and what comes of it.

Owns: those values. Must not know: how a simulation runs. Times in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Times:
    """What things take. `alphas`: conditional acceptance by position; the last one holds for deeper ones too."""

    step_ms: float
    row_ms: float = 0.0
    token_ms: float = 0.0
    token_row_ms: float = 0.0
    alphas: tuple[float, ...] = (0.7,)
    delay_ms: float = 0.2
    overhead_ms: float = 0.5
    prefill_token_ms: float = 0.0
    """Of the target, for a token of a prompt."""

    def alpha(self, position: int) -> float:
        return self.alphas[min(position, len(self.alphas) - 1)]

    def rows_ms(self, num_rows: int) -> float:
        """A step of the target."""
        return self.step_ms + self.row_ms * num_rows


@dataclass(frozen=True, slots=True)
class Request:
    """What each request asks for, in tokens. `prompt_len`: those that are not cached; at least 1."""

    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated: sequences spread evenly over targets and drafts.

    With a `request` each place sends one request after the other, without one the sequences never end.
    """

    num_sequences: int
    num_draft_tokens: int
    num_targets: int = 1
    num_drafts: int = 1
    request: Request | None = None
    num_rounds: int = 60
    """Of each sequence that never ends, on average; a quarter of them before counting begins."""
    num_requests: int = 3
    """Of each place, on average; one of them before counting begins."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rates of all sequences together. `target_busy` and `draft_busy` are shares of the time, of the average worker.

    `ttft_ms` is a mean, None where no request begins. `tpot_ms` counts from a request's first token.
    """

    tokens_per_s: float
    tpot_ms: float
    tokens_per_round: float
    target_busy: float
    draft_busy: float
    ttft_ms: float | None = None
