"""Samples with known answers, for the tests of what `outrider bench` makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from services.cli.bench.document import CaseReport, Document
from services.cli.bench.load import Block
from services.cli.bench.machine import Environment
from services.cli.bench.report import FormulaTerms, build_report
from services.cli.bench.sample import Key, Mode, Sample
from services.cli.bench.sweep import Case
from services.client import Round, Statistics
from services.common.values import VerificationMethod

MS = 1_000_000


def a_round(offset: int, drafted: int, accepted: int, draft_ms: float = 2.0, verify_ms: float = 12.0) -> Round:
    return Round(offset, drafted, accepted, draft_ms, verify_ms)


def statistics(rounds: Sequence[Round], overhead_ms: float = 1.0) -> Statistics:
    """As the coordinator counts these rounds."""
    drafted = [r for r in rounds if r.num_draft_tokens]
    width = max((r.num_draft_tokens for r in drafted), default=0)
    return Statistics(
        num_drafts=len(drafted),
        num_draft_tokens=sum(r.num_draft_tokens for r in drafted),
        num_accepted_tokens=sum(r.num_accepted_tokens for r in drafted),
        num_accepted_tokens_per_pos=tuple(sum(r.num_accepted_tokens > i for r in drafted) for i in range(width)),
        num_verified_tokens_per_pos=tuple(
            sum(min(r.num_accepted_tokens + 1, r.num_draft_tokens) > i for r in drafted) for i in range(width)
        ),
        num_rounds=len(rounds),
        overhead_ms=(overhead_ms,) * len(rounds),
        rounds=tuple(rounds),
    )


def speculative(index: int, rounds: Sequence[Round], category: str = "qa", **fields: object) -> Sample:
    """A first token, then the rounds' tokens, 15 ms a round."""
    counts = [1, *(r.num_accepted_tokens + 1 for r in rounds)]
    arrivals = tuple((MS * (10 + 15 * i), count) for i, count in enumerate(counts))
    sample = Sample(
        Key(index, 0, category), Mode.SPECULATIVE, 0, arrivals, tuple(range(sum(counts))), statistics(rounds)
    )
    return dataclasses.replace(sample, **fields)  # type: ignore[arg-type]


def plain(index: int, num_tokens: int, category: str = "qa") -> Sample:
    """10 ms a token."""
    arrivals = tuple((10 * MS * (i + 1), 1) for i in range(num_tokens))
    return Sample(Key(index, 0, category), Mode.PLAIN, 0, arrivals, tuple(range(num_tokens)), Statistics())


def both(index: int, rounds: Sequence[Round], category: str) -> list[Block]:
    sample = speculative(index, rounds, category)
    other = plain(index, sample.num_tokens, category)
    return [Block(s.mode, (s,), s.total_ns) for s in (other, sample)]


def case_report(
    blocks: Sequence[Block], num_draft_tokens: int = 4, drafter: str = "ngram", temperature: float = 0.0
) -> CaseReport:
    case = Case(drafter, num_draft_tokens, temperature, VerificationMethod.COUPLED)
    report = build_report(blocks, terms=FormulaTerms(num_draft_tokens, None))
    samples = tuple(o for block in blocks for o in block.outcomes if isinstance(o, Sample))
    return CaseReport(case, report, samples)


def document(*cases: CaseReport, **fields: object) -> Document:
    environment = Environment("outrider bench <b>&", "a processor", 2, 8.0, "3.11", {"outrider": "0.1"}, "c0ffee")
    configuration = {"target": "<script>alert(1)</script>", "prompts": "2 of mine.jsonl"}
    return dataclasses.replace(Document(cases, configuration, environment), **fields)  # type: ignore[arg-type]
