"""Tables of what was measured under load.

Owns: their columns. Must not know: how figures come about, goals.
"""

from __future__ import annotations

from rich.table import Table

from bench.load.delay import DelayFigures
from bench.load.overload import OverloadFigures
from bench.load.sessions import SessionsFigures
from bench.load.slow_clients import SlowFigures
from services.cli.bench.report import Percentiles


def tables_of(figures: object) -> list[Table]:
    match figures:
        case OverloadFigures():
            return [_overload(figures)]
        case SlowFigures():
            return [_slow_clients(figures)]
        case SessionsFigures():
            return [_sessions(figures)]
        case DelayFigures():
            return [_delay(figures)]
    raise TypeError(f"no table for {figures!r}")


def _overload(figures: OverloadFigures) -> Table:
    table = Table(
        "", "requests/s", "finished", "refused", "TPOT ms", "TTFT ms", "refusal ms", "retry after ms", "RSS MiB"
    )
    table.title = f"{figures.num_places} places, {figures.finished_per_s} requests/s at capacity; p50 / p99"
    for name, phase in (("at capacity", figures.at_capacity), ("3 times that", figures.overload)):
        table.add_row(
            name,
            f"{phase.offered_per_s:.1f}",
            str(phase.num_finished),
            str(phase.num_refused),
            _both(phase.tpot_ms),
            _both(phase.ttft_ms),
            _both(phase.refusal_ms),
            _both(phase.retry_delay_ms),
            _memory(phase.max_rss_mib),
        )
    return table


def _slow_clients(figures: SlowFigures) -> Table:
    table = Table("others", "requests", "TPOT ms p50 / p99", "RSS MiB")
    table.title = f"{figures.num_others} clients that read, {figures.num_slow} that do not"
    phases = (("alone", figures.alone_tpot_ms), ("beside those who do not read", figures.beside_tpot_ms))
    for number, (name, tpot_ms) in enumerate(phases):
        table.add_row(name, str(figures.num_requests[number]), _both(tpot_ms), _memory(figures.max_rss_mib[number]))
    ends = ", ".join(f"{count} {reason}" for reason, count in figures.slow_ends.items())
    table.caption = f"who did not read ended with: {ends or 'nothing'}"
    return table


def _sessions(figures: SessionsFigures) -> Table:
    table = Table(
        "coordinators", "rounds", "rounds/s a session", "gap ms p50 / p99", "CPU ms a round", "failed", "files"
    )
    table.title = f"{figures.num_sessions} sessions, a connection each"
    for run in figures.runs:
        table.add_row(
            str(run.num_coordinators),
            str(run.num_rounds),
            f"{run.rounds_per_s_a_session:.3f}",
            _both(run.gap_ms),
            "?" if run.cpu_ms_per_round is None else f"{run.cpu_ms_per_round:.4f}",
            str(run.num_failed),
            f"{run.max_fds} of {figures.max_fds_allowed}",
        )
    return table


def _delay(figures: DelayFigures) -> Table:
    table = Table("at once", "K", "tokens/s", "planned", "ratio", "without: tokens/s", "planned")
    table.title = f"{figures.delay_ms:g} ms each way between coordinator and workers"
    for cell in figures.cells:
        table.add_row(
            str(cell.num_sequences),
            str(cell.num_draft_tokens),
            f"{cell.tokens_per_s:.2f}",
            f"{cell.planned_per_s:.2f}",
            f"{cell.ratio:.3f}",
            f"{cell.undelayed_per_s:.2f}",
            f"{cell.undelayed_planned_per_s:.2f}",
        )
    trips = ", ".join(f"{name} {before} and {after}" for name, (before, after) in figures.round_trip_ms.items())
    table.caption = f"ms of a call through the proxy, without and with the delay: {trips}"
    return table


def _both(percentiles: Percentiles) -> str:
    return " / ".join("-" if value is None else f"{value:.4g}" for value in (percentiles.p50, percentiles.p99))


def _memory(rss_mib: dict[str, float]) -> str:
    return ", ".join(f"{name} {mib:.0f}" for name, mib in rss_mib.items())
