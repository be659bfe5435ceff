"""The figures as a table, a JSON file and a plot.

Owns: how they are shown. Must not know: how they were taken.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from bench.engine.figures import Measured, figures, quantiles
from services.cli.bench.machine import Environment

matplotlib.use("Agg")
from matplotlib import pyplot


def show(measured: Measured, num_threads: int, console: Console) -> None:
    """Prints steps and rates beside the memory's limit, then the figures."""
    console.print(
        f"{measured.dtype}, {num_threads} threads; memory reads {measured.bandwidth / 1e9:.1f} GB/s, the weights' "
        f"{measured.weight_bytes / 1e6:.0f} MB in {measured.limit_ms:.1f} ms"
    )
    table = Table("sequences", "rows of each", "ms a step", "share of the memory's limit", title="Steps")
    for sequences, rows in sorted(measured.step_ms):
        share = measured.step_share(sequences, rows)
        table.add_row(str(sequences), str(rows), f"{measured.step(sequences, rows):.1f}", f"{share:.2f}")
    console.print(table)
    table = Table("engine", "dtype", "sequences", "tokens/s", "share of the memory's limit", title="Plain decoding")
    for sequences in sorted(measured.tokens_per_s):
        rate = measured.rate(sequences)
        share = f"{measured.rate_share(rate, sequences):.2f}"
        table.add_row("outrider", measured.dtype, str(sequences), f"{rate:.1f}", share)
    for peer in measured.peers:
        share = f"{measured.rate_share(peer.rate):.2f}" if peer.dtype == measured.dtype else ""
        table.add_row(peer.name, peer.dtype, "1", f"{peer.rate:.1f}", share)
    console.print(table)
    _show_processes(measured, console)
    table = Table("figure", "value", title="Figures")
    for name, value in asdict(figures(measured)).items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)


def _show_processes(measured: Measured, console: Console) -> None:
    table = Table("engine", "sequences", "tokens/s, prefill included", title="Requests that come together")
    for sequences in sorted(measured.burst_tokens_per_s):
        table.add_row("outrider", str(sequences), f"{measured.burst_rate(sequences):.1f}")
    if rates := measured.continuous.get("tokens_per_s"):
        table.add_row("transformers, continuous batching", "16", f"{statistics.median(rates):.1f}")
    console.print(table)
    for name, reason in measured.failed_peers.items():
        console.print(f"transformers, {name}: no figure: {reason}")
    if measured.sharing:
        table = Table("role", "rows", "steps/s alone", "beside the other", "ratio", title="A core each")
        for role, found in measured.sharing.items():
            row = (f"{found['rows']:.0f}", f"{found['alone']:.1f}", f"{found['beside']:.1f}", f"{found['ratio']:.2f}")
            table.add_row(role, *row)
        console.print(table)
    for threads, found in measured.lag.items():
        if "busy_p99_ms" in found:
            late = f"{found['busy_p50_ms']:.2f} ms (p50), {found['busy_p99_ms']:.2f} ms (p99)"
            console.print(
                f"A target worker's event loop is late by {late} during forwards of {threads or 'all'} threads; "
                f"idle {found['idle_p99_ms']:.2f} ms (p99)"
            )


def write(measured: Measured, environment: Environment, num_threads: int, directory: Path) -> None:
    """Writes engine.json and engine.png."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {
        **asdict(figures(measured)),
        "steps": [
            {"sequences": n, "rows": rows, "ms": measured.step(n, rows), "share_of_limit": measured.step_share(n, rows)}
            for n, rows in sorted(measured.step_ms)
        ],
        "rates": [
            {"sequences": n, "tokens_per_s": (rate := measured.rate(n)), "share_of_limit": measured.rate_share(rate, n)}
            for n in sorted(measured.tokens_per_s)
        ],
        "peers": [
            {"name": peer.name, "dtype": peer.dtype, "tokens_per_s": peer.rate, "rounds": peer.tokens_per_s}
            for peer in measured.peers
        ],
        "bursts": [
            {"sequences": n, "tokens_per_s": measured.burst_rate(n)} for n in sorted(measured.burst_tokens_per_s)
        ],
        "continuous_batching_peer": measured.continuous,
        "failed_peers": measured.failed_peers,
        "sharing_cores_steps_per_s": measured.sharing,
        "event_loop_lag": measured.lag,
        "gaps_ms": {
            "alone": quantiles(measured.alone_gaps_ms),
            "beside_prefill": quantiles(measured.beside_prefill_gaps_ms),
        },
        "cold_ttft_ms": measured.cold_ttft_ms,
        "hit_ttft_ms": measured.hit_ttft_ms,
        "dtype": measured.dtype,
        "num_threads": num_threads,
        "weight_bytes": measured.weight_bytes,
        "read_gb_per_s": measured.bandwidth / 1e9,
        "limit_ms": measured.limit_ms,
        "environment": asdict(environment),
    }
    (directory / "engine.json").write_text(json.dumps(_rounded(found), indent=2) + "\n")
    _plot(measured, directory / "engine.png")


def _plot(measured: Measured, file: Path) -> None:
    figure, (steps, rates) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    shapes = sorted(measured.step_ms)
    steps.bar([f"{n} x {rows}" for n, rows in shapes], [measured.step(*shape) for shape in shapes])
    steps.axhline(measured.limit_ms, color="grey", linestyle="--", label="reading the weights once")
    steps.set(title="One step", xlabel="sequences x rows", ylabel="ms")
    steps.legend()
    bars = {f"outrider\n{n} at once": measured.rate(n) for n in sorted(measured.tokens_per_s)}
    bars |= {f"{peer.name}\n{peer.dtype}": peer.rate for peer in measured.peers}
    rates.bar(list(bars), list(bars.values()))
    rates.axhline(1e3 / measured.limit_ms, color="grey", linestyle="--", label="limit of one sequence")
    rates.set(title="Plain decoding", ylabel="tokens/s")
    rates.tick_params(axis="x", labelsize="small")
    rates.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _rounded(value: object) -> object:
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list():
            return [_rounded(item) for item in value]
    return value
