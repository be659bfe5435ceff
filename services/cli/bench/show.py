"""A report for people, and as JSON.

Owns: both forms. Must not know: how the numbers came about.
"""

from __future__ import annotations

import dataclasses
from typing import cast

from rich.console import Console
from rich.table import Table

from services.cli.bench.machine import Environment
from services.cli.bench.report import FormulaCheck, ModeReport, Percentiles, Report
from services.cli.terminal import whole

JsonObject = dict[str, object]

_DEFINITIONS = {
    "num_requests": "prompts; each was sent once in each mode",
    "failed_requests": "requests that ended with an error, of all modes",
    "tokens_per_s": "generated tokens of a mode over the wall time of its blocks",
    "ttft_ms": "from sending to the first message with tokens, at the client",
    "tpot_ms": "from the first message with tokens to the last, over the tokens after the first message, a request",
    "itl_ms": "gap between consecutive messages with tokens; a speculative message may hold several tokens",
    "speedup": "speculative tokens_per_s over plain tokens_per_s",
    "decode_speedup": "plain over speculative decode_ms_per_token: prefill is not in it",
    "acceptance_rate": "accepted over drafted tokens",
    "mean_acceptance_length": "tokens of a verify step that had a draft, the target's own included",
    "acceptance_rate_per_position": "accepted at a position over verify steps",
    "alpha": "conditional acceptance: accepted over tokens verified with everything before accepted",
    "coordinator_overhead_ms": "a round's wall time at the coordinator less the workers' own reported times",
}


def as_object(report: Report, environment: Environment, formula: FormulaCheck | None = None) -> JsonObject:
    """The report as --json writes it; the acceptance fields stand at the top level."""
    fields = cast(JsonObject, dataclasses.asdict(report))
    fields |= cast(JsonObject, fields.pop("acceptance"))
    if formula is not None:
        fields["formula"] = dataclasses.asdict(formula)
    fields["environment"] = dataclasses.asdict(environment)
    fields["definitions"] = _DEFINITIONS
    return fields


def print_report(report: Report, console: Console, formula: FormulaCheck | None = None) -> None:
    """The tables: modes, then categories; then the figures that have no column, one line each."""
    console.print(_mode_table(report))
    console.print(_category_table(report))
    for line in (*_figures(report), *([_formula_line(formula)] if formula is not None else [])):
        console.print(line, soft_wrap=True)


def _figures(report: Report) -> tuple[str, ...]:
    identical = "not compared" if report.num_identical_outputs is None else f"{report.num_identical_outputs}"
    acceptance, overhead = report.acceptance, report.coordinator_overhead_ms
    return (
        f"speed-up {number(report.speedup)} (decode phase {number(report.decode_speedup)})",
        f"identical outputs {identical} of {report.num_requests}, failed requests {report.failed_requests}",
        f"acceptance rate {number(acceptance.acceptance_rate)}, "
        f"mean acceptance length {number(acceptance.mean_acceptance_length)}, "
        f"by position {' '.join(number(rate) for rate in acceptance.acceptance_rate_per_position) or '-'}",
        f"coordinator overhead a round: p50 {number(overhead.p50)} ms, p99 {number(overhead.p99)} ms",
    )


def _formula_line(formula: FormulaCheck) -> str:
    return (
        f"decode speed-up measured {formula.measured_speedup:.3f}, by the formula {formula.predicted_speedup:.3f} "
        f"({formula.relative_error:+.1%}) with the realised alpha {formula.alpha:.3f}, "
        f"K={formula.num_draft_tokens}, c={formula.cost_ratio:g}"
    )


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mode_table(report: Report) -> Table:
    table = Table("", "plain", "speculative", title="milliseconds are p50 / p99", title_justify="left")
    modes = (report.plain, report.speculative)
    table.add_row("tokens/s", *(number(mode.tokens_per_s) if mode else "-" for mode in modes))
    for name, title in (("ttft_ms", "TTFT ms"), ("tpot_ms", "TPOT ms"), ("itl_ms", "ITL ms"), ("total_ms", "total ms")):
        table.add_row(title, *(_percentiles(mode, name) for mode in modes))
    table.add_row(
        "coordinator CPU ms a round",
        *(number(mode.coordinator_cpu_ms_per_round if mode else None, 3) for mode in modes),
    )
    table.add_row("requests", *(str(mode.num_requests) if mode else "-" for mode in modes))
    return table


def _percentiles(mode: ModeReport | None, name: str) -> str:
    if mode is None:
        return "-"
    percentiles = cast(Percentiles, getattr(mode, name))
    return f"{number(percentiles.p50, 1)} / {number(percentiles.p99, 1)}"


def _category_table(report: Report) -> Table:
    table = Table(whole("category"), "requests", "speed-up", "acceptance", "length", "identical")
    for category, part in report.categories.items():
        identical = "-" if part.num_identical_outputs is None else str(part.num_identical_outputs)
        table.add_row(
            category,
            str(part.num_requests),
            number(part.speedup),
            number(part.acceptance_rate),
            number(part.mean_acceptance_length),
            identical,
        )
    return table
