"""The figures of one category of prompts, of Spec-Bench's grouping of them, and of all.

Owns: what stands in the category table. Must not know: how it is shown. Pure.

Tokens per second are a request's own: all tokens over the summed durations of the requests, prefill included, so that
categories can be told apart where requests run side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.cli.bench.acceptance import (
    Acceptance,
    acceptance_before_repetition,
    acceptance_of,
    ratio,
    repetition_end,
)
from services.cli.bench.sample import Key, Mode, Sample

Samples = Mapping[Mode, Mapping[Key, Sample]]

MULTI_TURN = "multi-turn"
MULTI_TURN_CATEGORIES = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)
"""Spec-Bench (Xia et al. 2024) groups the eight categories of MT-Bench as multi-turn conversation."""


@dataclass(frozen=True, slots=True)
class CategoryReport:
    """`speedup` compares tokens/s over the `num_compared` requests that succeeded in both modes.

    `num_repeating` counts speculative outputs that come to repeat themselves.
    """

    num_requests: int
    plain_tokens_per_s: float | None
    speculative_tokens_per_s: float | None
    speedup: float | None
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    num_compared: int
    num_identical_outputs: int | None
    num_repeating: int
    acceptance: Acceptance
    acceptance_before_repetition: Acceptance


def category_reports(keys: Iterable[Key], samples: Samples) -> dict[str, CategoryReport]:
    """One for each category, by name."""
    keys = set(keys)
    names = sorted({key.category for key in keys})
    return {name: category_report({k for k in keys if k.category == name}, samples) for name in names}


def group_reports(keys: Iterable[Key], samples: Samples) -> dict[str, CategoryReport]:
    """Of the categories that Spec-Bench takes together; none where there are fewer than two of them."""
    grouped = {key for key in keys if key.category in MULTI_TURN_CATEGORIES}
    if len({key.category for key in grouped}) < 2:
        return {}
    return {MULTI_TURN: category_report(grouped, samples)}


def category_report(keys: set[Key], samples: Samples) -> CategoryReport:
    """Of the requests that `keys` name."""
    of = {mode: {key: sample for key, sample in samples[mode].items() if key in keys} for mode in Mode}
    both = of[Mode.PLAIN].keys() & of[Mode.SPECULATIVE].keys()
    plain, speculative = (_rate([of[mode][key] for key in both]) for mode in (Mode.PLAIN, Mode.SPECULATIVE))
    drafted = list(of[Mode.SPECULATIVE].values())
    acceptance = acceptance_of(drafted)
    return CategoryReport(
        num_requests=len(keys),
        plain_tokens_per_s=_rate(of[Mode.PLAIN].values()),
        speculative_tokens_per_s=_rate(drafted),
        speedup=ratio(speculative, plain),
        acceptance_rate=acceptance.acceptance_rate,
        mean_acceptance_length=acceptance.mean_acceptance_length,
        num_compared=len(both),
        num_identical_outputs=num_identical(of) if both else None,
        num_repeating=sum(repetition_end(sample.token_ids) is not None for sample in drafted),
        acceptance=acceptance,
        acceptance_before_repetition=acceptance_before_repetition(drafted),
    )


def num_identical(samples: Samples) -> int:
    """Requests whose outputs are equal in both modes."""
    plain, speculative = samples[Mode.PLAIN], samples[Mode.SPECULATIVE]
    return sum(plain[key].token_ids == speculative[key].token_ids for key in plain.keys() & speculative.keys())


def _rate(samples: Iterable[Sample]) -> float | None:
    counted = list(samples)
    return ratio(sum(s.num_tokens for s in counted), sum(s.total_ns for s in counted) / 1e9)
