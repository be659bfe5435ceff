"""All that one `outrider bench` measured, and the JSON that --json writes of it.

Owns: what belongs together in one report. Must not know: tables, plots.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

from services.cli.bench.acceptance import repetition_end
from services.cli.bench.distribution import DistributionCheck
from services.cli.bench.machine import Environment
from services.cli.bench.peers import PeerReport
from services.cli.bench.report import Report
from services.cli.bench.sample import Mode, Sample
from services.cli.bench.sweep import Case

JsonObject = dict[str, object]

DEFINITIONS = {
    "num_requests": "prompts; each was sent once in each mode",
    "failed_requests": "requests that ended with an error, of all modes",
    "tokens_per_s": "generated tokens of a mode over the wall time of its blocks; of a category: over the summed "
    "durations of its requests; prefill of cold prompts included, see ttft_ms",
    "ttft_ms": "from sending to the first message with tokens, at the client. Prompts are cold: each conversation has "
    "a cache salt of its own in each mode, so that a worker's prefix cache holds nothing of a first turn, and of a "
    "further one (--all-turns) what its own earlier turns left there",
    "tpot_ms": "from the first message with tokens to the last, over the tokens after the first message, a request",
    "itl_ms": "gap between consecutive messages with tokens; a speculative message may hold several tokens",
    "speedup": "speculative tokens_per_s over plain tokens_per_s; of a category: of the requests that succeeded in "
    "both modes",
    "num_compared": "requests that succeeded in both modes; num_identical_outputs are of these",
    "coordinator_cpu_ms_per_round": "all CPU time of the coordinator in a mode's blocks over its rounds; a plain round "
    "is one token",
    "decode_speedup": "plain over speculative decode_ms_per_token: prefill is not in it",
    "acceptance_rate": "accepted over drafted tokens",
    "mean_acceptance_length": "tokens of a verify step that had a draft, the target's own included",
    "acceptance_rate_per_position": "accepted at a position over verify steps",
    "conditional_acceptance_per_position": "alpha_i: accepted at a position over verified there with everything before "
    "accepted; positions that were not reached are left out",
    "alpha": "conditional acceptance: accepted over tokens verified with everything before accepted",
    "acceptance_before_repetition": "acceptance of the rounds that begin before the end of an output's first run of 16 "
    "tokens that occurred before in it",
    "coordinator_overhead_ms": "a round's wall time at the coordinator less the workers' own reported times",
    "formula": "predicted_speedup = (1 - alpha^(K+1)) / ((1 - alpha)(1 + K c)); by_position the same from alpha_i and "
    "the draft lengths as they were; without_cost at c = 0; c is a draft token's time over a plain decode step's",
    "limits": "means over rounds; speedup = tokens_per_round * plain_ms_per_token / (draft + verify + overhead) ms; "
    "extra rows free: a verify step as short as a plain decode step",
    "peers": "transformers' generate in a process of its own on the same prompt tokens, cold as well; tokens_per_s "
    "over the summed durations; mean_acceptance_length is tokens a forward of the target; with a failure, its reason, "
    "figures are of the requests before it",
}


@dataclass(frozen=True, slots=True)
class CaseReport:
    """One case, with the samples that its report was made of."""

    case: Case
    report: Report
    samples: tuple[Sample, ...]

    def of(self, mode: Mode) -> list[Sample]:
        return [sample for sample in self.samples if sample.mode is mode]


@dataclass(frozen=True, slots=True)
class Document:
    """A run. The first case is the one whose tables are shown in full. `configuration` says what all cases share."""

    cases: tuple[CaseReport, ...]
    configuration: dict[str, str]
    environment: Environment
    peers: tuple[PeerReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> CaseReport:
        return self.cases[0]


def as_object(document: Document) -> JsonObject:
    """The first case's report, its acceptance at the top level; then the others and what all share."""
    fields = _report(document.first.report) | {"case": _case(document.first.case)}
    fields["requests"] = [_request(sample) for sample in document.first.samples]
    if len(document.cases) > 1:
        fields["cases"] = [{"case": _case(entry.case)} | _report(entry.report) for entry in document.cases]
    if document.peers:
        fields["peers"] = [dataclasses.asdict(peer) for peer in document.peers]
    fields["notes"] = list(document.notes)
    fields["configuration"] = document.configuration
    fields["environment"] = dataclasses.asdict(document.environment)
    fields["definitions"] = DEFINITIONS
    return fields


def distribution_object(
    check: DistributionCheck, configuration: dict[str, str], environment: Environment
) -> JsonObject:
    """What --json writes of a distribution check."""
    return {
        "distribution": dataclasses.asdict(check.report)
        | {
            "equal": check.report.equal,
            "num_draft_tokens": check.num_draft_tokens,
            "num_accepted_tokens": check.num_accepted_tokens,
        },
        "configuration": configuration,
        "environment": dataclasses.asdict(environment),
    }


def _report(report: Report) -> JsonObject:
    fields = cast(JsonObject, dataclasses.asdict(report))
    fields |= cast(JsonObject, fields.pop("acceptance"))
    if report.limits is not None:
        fields["limits"] = dataclasses.asdict(report.limits) | {"shares": report.limits.shares}
    return {name: value for name, value in fields.items() if name not in ("formula", "limits") or value is not None}


def _case(case: Case) -> JsonObject:
    return dataclasses.asdict(case) | {"verification": case.verification.value}


def _request(sample: Sample) -> JsonObject:
    return {
        "conversation": sample.key.conversation,
        "turn": sample.key.turn,
        "category": sample.key.category,
        "mode": sample.mode.value,
        "num_prompt_tokens": len(sample.prompt_token_ids),
        "num_tokens": sample.num_tokens,
        "ttft_ms": _ms(sample.ttft_ns),
        "tpot_ms": _ms(sample.tpot_ns),
        "total_ms": _ms(sample.total_ns),
        "num_drafts": sample.statistics.num_drafts,
        "num_draft_tokens": sample.statistics.num_draft_tokens,
        "num_accepted_tokens": sample.statistics.num_accepted_tokens,
        "repetition_end": repetition_end(sample.token_ids),
    }


def _ms(ns: float | None) -> float | None:
    return None if ns is None else round(ns / 1e6, 3)
