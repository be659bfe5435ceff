"""The HTML report's plots, as SVG to be put into a page.

Owns: which plots there are and their form. Must not know: the page. Needs matplotlib (the extra `bench`).
Text stays text, colours are safe for the colour-blind (Wong 2011), and nothing outside the SVG is referred to.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from services.cli.bench.document import CaseReport, Document
from services.cli.bench.sample import Mode, Sample

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "outrider",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, "#56b4e9")
_MODE_COLOURS = {Mode.PLAIN: "#777777", Mode.SPECULATIVE: _BLUE}


@dataclass(frozen=True, slots=True)
class Plot:
    """`svg` is an element without a document around it."""

    title: str
    svg: str


def plots(document: Document) -> Iterator[Plot]:
    """Those that there are figures for."""
    with matplotlib.rc_context(_STYLE):
        first = document.first
        if first.report.acceptance.num_drafts:
            yield _plot("Acceptance by position in the draft", lambda axes: _positions(document.cases, axes))
        if any(len(line) > 1 for _, line in _lines(document.cases)):
            yield _plot("Acceptance by draft length K", lambda axes: _acceptance_by_length(document.cases, axes))
        if first.report.formula:
            yield _plot("Decode speed-up: measured and by the formula", lambda axes: _formula(document.cases, axes))
        if first.report.limits:
            yield _plot("Where a round's time goes", lambda axes: _shares(document.cases, axes))
        if len(first.report.categories) > 1 and first.report.speedup:
            yield _plot("Speed-up by category", lambda axes: _categories(first, axes))
        for name, title, values in _LATENCIES:
            if any(values(sample) for sample in first.samples):
                yield _plot(title, lambda axes, values=values, name=name: _distribution(first, name, values, axes))  # type: ignore[misc]


def _plot(title: str, draw: Callable[[Axes], None]) -> Plot:
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    document = buffer.getvalue()
    return Plot(title, document[document.index("<svg") :])


def _lines(cases: Sequence[CaseReport]) -> list[tuple[str, list[CaseReport]]]:
    """Cases that differ in their draft length alone, in its order; those with a length and with drafts."""
    measured = [entry for entry in cases if entry.case.num_draft_tokens and entry.report.acceptance.num_drafts]
    measured.sort(key=lambda e: (e.case.who, e.case.sampling, e.case.num_draft_tokens or 0))
    grouped = groupby(measured, key=lambda e: f"{e.case.who} {e.case.sampling}".strip())
    return [(name, list(group)) for name, group in grouped]


def _positions(cases: Sequence[CaseReport], axes: Axes) -> None:
    for entry, colour in zip(cases, _COLOURS * len(cases), strict=False):
        whole, before = entry.report.acceptance, entry.report.acceptance_before_repetition
        lines = [(whole, "-", ""), (before, ":", ", before repetition")]
        for acceptance, line, suffix in lines if entry.report.overall.num_repeating else lines[:1]:
            values = acceptance.conditional_acceptance_per_position
            label = f"{entry.case.label}{suffix}" if len(cases) <= 3 or not suffix else None
            axes.plot(range(1, len(values) + 1), values, line, marker="o", markersize=3, color=colour, label=label)
    axes.set(xlabel="position", ylabel="conditional acceptance", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _acceptance_by_length(cases: Sequence[CaseReport], axes: Axes) -> None:
    for (name, line), colour in zip(_lines(cases), _COLOURS * len(cases), strict=False):
        lengths = [entry.case.num_draft_tokens or 0 for entry in line]
        axes.plot(
            lengths,
            [entry.report.acceptance.mean_acceptance_length or 1 for entry in line],
            marker="o",
            color=colour,
            label=name,
        )
        if any(entry.report.overall.num_repeating for entry in line):
            before = [entry.report.acceptance_before_repetition.mean_acceptance_length or 1 for entry in line]
            axes.plot(lengths, before, ":", color=colour, label=f"{name}, before repetition")
    axes.set(xlabel="K, draft tokens a round", ylabel="mean acceptance length")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=1)


def _formula(cases: Sequence[CaseReport], axes: Axes) -> None:
    """Measured against the four predictions: by K for one line of cases, else case by case."""
    checked = [(entry, entry.report.formula) for entry in cases if entry.report.formula]
    places = range(len(checked))
    series = (
        ("measured", [f.measured_speedup for _, f in checked], "o-", _BLUE),
        ("formula, one alpha", [f.predicted_speedup for _, f in checked], "s--", _ORANGE),
        ("formula, alpha by position", [f.by_position for _, f in checked], "^--", _GREEN),
        ("one alpha, no draft cost", [f.predicted_without_cost for _, f in checked], "s:", _RED),
        ("by position, no draft cost", [f.by_position_without_cost for _, f in checked], "^:", _PURPLE),
    )
    for label, values, style, colour in series:
        known = [float("nan") if value is None else value for value in values]
        axes.plot(places, known, style, color=colour, label=label, markersize=4)
    axes.axhline(1, color="black", linewidth=0.8)
    labels = [entry.case.label.replace(", ", "\n") for entry, _ in checked]
    axes.set_xticks(places, labels, fontsize="x-small", rotation=0 if len(labels) < 5 else 45)
    axes.set(ylabel="speed-up")
    axes.set_ylim(bottom=0)


def _shares(cases: Sequence[CaseReport], axes: Axes) -> None:
    limited = [(entry.case.label, entry.report.limits) for entry in cases if entry.report.limits]
    labels = [label for label, _ in limited]
    left = [0.0] * len(limited)
    for part, colour in (("draft", _ORANGE), ("verify", _BLUE), ("overhead", _RED)):
        widths = [getattr(limits, f"{part}_ms") for _, limits in limited]
        axes.barh(labels, widths, left=left, color=colour, label="wire + coordinator" if part == "overhead" else part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    plain = sum(limits.plain_ms_per_token for _, limits in limited) / len(limited)
    axes.axvline(plain, color="black", linestyle="--", linewidth=0.9, label="a plain token")
    axes.set(xlabel="ms a round")
    axes.invert_yaxis()


def _categories(entry: CaseReport, axes: Axes) -> None:
    parts = entry.report.categories
    axes.barh(list(parts), [part.speedup or 0 for part in parts.values()], color=_BLUE)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="speed-up of the requests' durations")
    axes.tick_params(axis="y", labelsize="x-small")
    axes.invert_yaxis()


def _distribution(entry: CaseReport, name: str, values: Callable[[Sample], Sequence[float]], axes: Axes) -> None:
    """The share of measurements that took at most so long."""
    for mode in Mode:
        measured = sorted(ms for sample in entry.of(mode) for ms in values(sample))
        if measured:
            axes.ecdf(measured, color=_MODE_COLOURS[mode], label=f"{mode.value} ({len(measured)})")
    axes.set(xlabel=f"{name}, ms", ylabel="share at most", ylim=(0, 1.02))
    axes.set_xlim(left=0)


_LATENCIES: tuple[tuple[str, str, Callable[[Sample], Sequence[float]]], ...] = (
    ("TTFT", "Time to the first token", lambda s: [] if s.ttft_ns is None else [s.ttft_ns / 1e6]),
    ("TPOT", "Time a token, by request", lambda s: [] if s.tpot_ns is None else [s.tpot_ns / 1e6]),
    ("ITL", "Gap between messages with tokens", lambda s: [gap / 1e6 for gap in s.itl_ns]),
)
