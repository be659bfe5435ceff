"""A report's tables for people.

Owns: their form, on the terminal and, as rows of texts, in the HTML report. Must not know: how the numbers came about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from rich.console import Console
from rich.table import Table

from services.cli.bench.acceptance import Acceptance
from services.cli.bench.categories import CategoryReport
from services.cli.bench.document import CaseReport, Document
from services.cli.bench.formula import FormulaCheck
from services.cli.bench.limits import Limits
from services.cli.bench.peers import PeerReport
from services.cli.bench.report import ModeReport, Percentiles, Report
from services.cli.terminal import whole

_NAME_WIDTH = 14


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts. Its first column holds names, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def print_document(document: Document, console: Console) -> None:
    """The tables of the first case; then the figures that have no column, one line each; then what compares cases."""
    report = document.first.report
    if len(document.cases) > 1:
        console.print(f"first case: {document.first.case.label}", soft_wrap=True)
    for grid in grids(document):
        if grid.rows:
            console.print(_table(grid))
    for line in (*figures(report), *([formula_line(report.formula)] if report.formula else []), *document.notes):
        console.print(line, soft_wrap=True)


def grids(document: Document) -> Iterator[Grid]:
    """All tables, some without rows."""
    report = document.first.report
    yield mode_grid(report)
    yield category_grid(report)
    yield position_grid(report)
    yield limit_grid(report.limits)
    yield case_grid(document.cases)
    yield peer_grid(document.peers, report)


def _table(grid: Grid) -> Table:
    columns = [whole(name) for name in grid.header]
    columns[0].min_width = min(_NAME_WIDTH, max(len(row[0]) for row in grid.rows))
    table = Table(*columns, title=grid.title, title_justify="left", caption=grid.note or None, caption_justify="left")
    for row in grid.rows:
        table.add_row(*row)
    return table


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def figures(report: Report) -> tuple[str, ...]:
    """What has no column, in sentences."""
    acceptance, overhead = report.acceptance, report.coordinator_overhead_ms
    before = report.acceptance_before_repetition
    compared = (
        f"speed-up {number(report.speedup)} (decode phase {number(report.decode_speedup)})",
        f"identical outputs {identical_of(report.overall)}, failed requests {report.failed_requests}",
    )
    if report.speculative is None:
        return compared
    return (
        *compared,
        f"acceptance rate {number(acceptance.acceptance_rate)}, "
        f"mean acceptance length {number(acceptance.mean_acceptance_length)}, "
        f"conditional acceptance {number(acceptance.alpha)}; before outputs repeat themselves "
        f"({report.overall.num_repeating} of {report.speculative.num_requests} do): {number(before.acceptance_rate)}, "
        f"{number(before.mean_acceptance_length)}, {number(before.alpha)}",
        f"coordinator overhead a round: p50 {number(overhead.p50)} ms, p99 {number(overhead.p99)} ms",
    )


def identical_of(part: CategoryReport) -> str:
    return "-" if part.num_identical_outputs is None else f"{part.num_identical_outputs}/{part.num_compared}"


def formula_line(formula: FormulaCheck) -> str:
    given = "" if formula.cost_ratio_given else " as measured"
    by_position = (
        f"; from alpha by position and the draft lengths as they were {formula.by_position:.3f} "
        f"({formula.relative_error_by_position:+.1%})"
        if formula.by_position is not None
        else ""
    )
    return (
        f"decode speed-up measured {formula.measured_speedup:.3f}, by the formula {formula.predicted_speedup:.3f} "
        f"({formula.relative_error:+.1%}) with the realised alpha {formula.alpha:.3f}, "
        f"K={formula.num_draft_tokens}, c={formula.cost_ratio:g}{given}{by_position}"
    )


def mode_grid(report: Report) -> Grid:
    modes = (report.plain, report.speculative)
    latencies = (("ttft_ms", "TTFT ms"), ("tpot_ms", "TPOT ms"), ("itl_ms", "ITL ms"), ("total_ms", "total ms"))
    rows = [
        ("tokens/s", *(number(mode.tokens_per_s) if mode else "-" for mode in modes)),
        *((title, *(_percentiles(mode, name) for mode in modes)) for name, title in latencies),
        (
            "coordinator CPU ms a round",
            *(number(mode.coordinator_cpu_ms_per_round if mode else None, 3) for mode in modes),
        ),
        ("requests", *(str(mode.num_requests) if mode else "-" for mode in modes)),
    ]
    few = any(mode and mode.num_requests < 100 for mode in modes)
    note = "p99 of fewer than 100 requests is near the slowest" if few else ""
    return Grid("milliseconds are p50 / p99", ("", "plain", "speculative"), tuple(rows), note)


def _percentiles(mode: ModeReport | None, name: str) -> str:
    if mode is None:
        return "-"
    percentiles = cast(Percentiles, getattr(mode, name))
    return f"{number(percentiles.p50, 1)} / {number(percentiles.p99, 1)}"


def category_grid(report: Report) -> Grid:
    header = ("category", "n", "plain", "spec", "speed-up", "rate", "len", "len*", "equal")
    parts = {**report.categories, **report.groups, "overall": report.overall}
    rows = tuple((name, *_category_row(part)) for name, part in parts.items())
    return Grid("by category", header, rows, _CATEGORY_NOTE)


_CATEGORY_NOTE = (
    "plain, spec: tokens/s. rate: accepted of drafted. len: mean acceptance length; * before an output repeats itself. "
    "equal: outputs identical with and without speculation, of those compared"
)


def _category_row(part: CategoryReport) -> tuple[str, ...]:
    return (
        str(part.num_requests),
        number(part.plain_tokens_per_s, 1),
        number(part.speculative_tokens_per_s, 1),
        number(part.speedup),
        number(part.acceptance_rate),
        number(part.mean_acceptance_length),
        number(part.acceptance_before_repetition.mean_acceptance_length),
        identical_of(part),
    )


def position_grid(report: Report) -> Grid:
    """Conditional acceptance by position, of each category."""
    parts = {**report.categories, **report.groups, "overall": report.overall}
    accepted = {name: part.acceptance for name, part in parts.items()}
    accepted["overall*"] = report.acceptance_before_repetition
    width = max((len(a.conditional_acceptance_per_position) for a in accepted.values()), default=0)
    rows = tuple((name, *_positions(a, width)) for name, a in accepted.items()) if width else ()
    header = ("conditional acceptance", "all", *(str(i + 1) for i in range(width)))
    return Grid("by position in the draft", header, rows, "* before an output repeats itself; - was not reached")


def _positions(acceptance: Acceptance, width: int) -> tuple[str, ...]:
    values = acceptance.conditional_acceptance_per_position
    return (number(acceptance.alpha), *(number(values[i]) if i < len(values) else "-" for i in range(width)))


def limit_grid(limits: Limits | None) -> Grid:
    """Where a round's time goes, and what each part keeps the speed-up from."""
    header = ("a round's time", "ms", "share", "speed-up if it were free")
    if limits is None:
        return Grid("what limits the speed-up", header, ())
    shares, free_overhead = limits.shares, number(limits.speedup_if_overhead_free)
    rows = (
        ("draft", number(limits.draft_ms), f"{shares['draft']:.0%}", number(limits.speedup_if_draft_free)),
        ("verify", number(limits.verify_ms), f"{shares['verify']:.0%}", number(limits.speedup_if_extra_rows_free)),
        ("wire + coordinator", number(limits.overhead_ms), f"{shares['overhead']:.0%}", free_overhead),
        ("all", number(limits.round_ms), "100%", number(limits.speedup_if_all_free)),
        ("every draft token accepted", "-", "-", number(limits.speedup_if_all_accepted)),
    )
    note = (
        f"{limits.num_rounds} rounds of {limits.tokens_per_round:.2f} tokens, {limits.mean_draft_len:.2f} drafted; "
        f"plain {limits.plain_ms_per_token:.2f} ms a token; speed-up by this account {limits.speedup:.2f}. A free "
        "verify step takes a plain decode step's time."
    )
    return Grid("what limits the speed-up", header, rows, note)


def case_grid(cases: tuple[CaseReport, ...]) -> Grid:
    """The cases side by side; no rows for a single one."""
    header = ("case", "plain", "spec", "speed-up", "alpha", "len", "len*", "formula", "by pos.")
    rows = tuple((entry.case.label, *_case_row(entry.report)) for entry in cases) if len(cases) > 1 else ()
    note = (
        "plain, spec: tokens/s. In parentheses: speed-up of the decode phase, which the formula predicts, draft cost "
        "included; by pos.: from alpha by position. len: mean acceptance length; * before an output repeats itself"
    )
    return Grid("cases", header, rows, note)


def _case_row(report: Report) -> tuple[str, ...]:
    formula = report.formula
    return (
        number(report.plain.tokens_per_s if report.plain else None),
        number(report.speculative.tokens_per_s if report.speculative else None),
        f"{number(report.speedup)} ({number(report.decode_speedup)})",
        number(report.acceptance.alpha),
        number(report.acceptance.mean_acceptance_length),
        number(report.acceptance_before_repetition.mean_acceptance_length),
        number(formula.predicted_speedup if formula else None),
        number(formula.by_position if formula else None),
    )


def peer_grid(peers: tuple[PeerReport, ...], report: Report) -> Grid:
    """The peers beside Outrider's own modes, tokens/s over the summed durations of the requests in both."""
    header = ("", "tok/s", "ms/token", "TTFT ms", "tok/forward", "equal")
    rows: list[tuple[str, ...]] = []
    overall = report.overall
    for name, mode, rate in (
        ("outrider, plain", report.plain, overall.plain_tokens_per_s),
        ("outrider, speculative", report.speculative, overall.speculative_tokens_per_s),
    ):
        if mode is not None:
            length = report.limits.tokens_per_round if report.limits and mode is report.speculative else None
            ms, first = number(mode.decode_ms_per_token), number(mode.ttft_ms.p50)
            rows.append((name, number(rate), ms, first, number(length), ""))
    rows += [_peer_row(peer) for peer in peers]
    failures = [f"{peer.name} failed: {peer.failure}" for peer in peers if peer.failure]
    note = "ms/token: of the decode phase. TTFT: p50. equal: identical to Outrider's output, token for token"
    return Grid("peers", header, tuple(rows) if peers else (), ". ".join((note, *failures)))


def _peer_row(peer: PeerReport) -> tuple[str, ...]:
    if peer.failure:
        return (peer.name, "failed", "-", "-", "-", "-")
    identical = "-" if peer.num_identical_outputs is None else f"{peer.num_identical_outputs}/{peer.num_requests}"
    times = number(peer.tokens_per_s), number(peer.decode_ms_per_token), number(peer.ttft_ms.p50)
    return (f"{peer.name} ({peer.version})", *times, number(peer.mean_acceptance_length), identical)
