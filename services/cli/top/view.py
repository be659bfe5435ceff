"""How `outrider top` looks: tables and a line of history.

Owns: columns, colours, how figures are written. Must not know: how they came about, calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.cli.bench.show import number
from services.cli.terminal import printable
from services.cli.top.rates import ClusterView, CoordinatorRow, PoolRow, WorkerRow

_BARS = " ▁▂▃▄▅▆▇█"
_BAR_LEN = 6
_NOTHING = "–"
_FULL, _NEARLY_FULL = 0.95, 0.8
_STATES = {"up": "green", "draining": "yellow", "down": "red", "unreachable": "red"}
Row = TypeVar("Row")


def render(view: ClusterView, history: Sequence[float], width: int) -> RenderableType:
    """The whole screen, `width` columns wide. `history` are tokens/s of the looks before, oldest first."""
    parts: list[RenderableType] = [_headline(view, history), _coordinator_table(view.coordinators, width)]
    if view.workers:
        parts.append(_worker_table(view.workers, width))
    if view.pools:
        parts.append(_pool_table(view.pools, width))
    troubles = [(f"{row.role} {row.address}", row.trouble) for row in view.workers]
    troubles += [(row.address, row.trouble) for row in view.coordinators]
    parts += [Text(f"{name}: {printable(trouble)}", "red") for name, trouble in troubles if trouble]
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """A bar a value, the highest one full."""
    top = max(values, default=0.0)
    if top <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)


def bar(share: float) -> Text:
    """A share from 0 to 1 as a bar and per cent; yellow and red where it gets full."""
    share = min(1.0, max(0.0, share))
    filled = round(share * _BAR_LEN)
    style = "red" if share > _FULL else "yellow" if share > _NEARLY_FULL else "green"
    return Text.assemble(("█" * filled, style), ("░" * (_BAR_LEN - filled), "dim"), f" {100 * share:3.0f} %")


def _headline(view: ClusterView, history: Sequence[float]) -> Text:
    running = sum(row.num_running for row in view.coordinators)
    waiting = sum(row.num_waiting for row in view.coordinators)
    since = f"over {view.interval_s:.1f} s" if view.interval_s else "first look"
    return Text.assemble(
        (f"{_figure(view.tokens_per_s)} tokens/s", "bold"),
        f"  {sparkline(history)}  {running} requests running, {waiting} waiting  ",
        (f"({since})", "dim"),
    )


def _coordinator_table(rows: Sequence[CoordinatorRow], width: int) -> Table:
    columns: tuple[_Column[CoordinatorRow], ...] = (
        _Column("coordinator", lambda row: row.address, is_name=True),
        _Column("state", lambda row: _state("unreachable" if row.trouble else "draining" if row.draining else "up")),
        _Column("running", lambda row: str(row.num_running)),
        _Column("waiting", lambda row: str(row.num_waiting)),
        _Column("tokens/s", lambda row: _figure(row.tokens_per_s)),
        _Column("rounds/s", lambda row: _figure(row.rounds_per_s), 120),
        _Column("calls/s", lambda row: _figure(row.calls_per_s), 120),
        _Column("failed/s", lambda row: _figure(row.failed_calls_per_s)),
        _Column("accepted", lambda row: _figure(row.acceptance_rate, 3)),
        _Column("length", lambda row: _figure(row.mean_acceptance_len), 90),
        _Column("CPU ms/round", lambda row: _figure(row.cpu_ms_per_round, 3), 100),
    )
    return _table(columns, rows, width)


def _worker_table(rows: Sequence[WorkerRow], width: int) -> Table:
    columns: tuple[_Column[WorkerRow], ...] = (
        _Column("worker", lambda row: f"{row.role} {row.pool}".strip(), is_name=True),
        _Column("address", lambda row: row.address, is_name=True),
        _Column("model", _model, 140, is_name=True),
        _Column("state", lambda row: _state(row.state)),
        _Column("seqs", lambda row: str(row.num_sequences)),
        _Column("queue", lambda row: str(row.num_queued)),
        _Column("batch", lambda row: _figure(row.batch)),
        _Column("rows", lambda row: _figure(row.rows), 100),
        _Column("step ms", lambda row: _figure(row.step_ms), 100),
        _Column("wait ms", lambda row: _figure(row.queue_ms), 120),
        _Column("busy", lambda row: _per_cent(row.busy)),
        _Column("tokens/s", lambda row: _figure(row.tokens_per_s)),
        _Column("KV blocks", lambda row: bar(row.num_used_blocks / row.num_blocks) if row.num_blocks else _NOTHING),
        _Column("hits", lambda row: _per_cent(row.prefix_hit_rate), 120),
        _Column("memory", _memory, 120),
    )
    return _table(columns, rows, width)


def _pool_table(rows: Sequence[PoolRow], width: int) -> Table:
    columns: tuple[_Column[PoolRow], ...] = (
        _Column("draft pool", lambda row: row.name, is_name=True),
        _Column("ready", lambda row: Text("yes", "green") if row.ready else Text("no", "red")),
        _Column("weight", lambda row: f"{row.weight:g}"),
        _Column("accepted", lambda row: _figure(row.acceptance_rate, 3)),
        _Column("length", lambda row: _figure(row.mean_acceptance_len)),
        _Column("since start", lambda row: _figure(row.total_acceptance_rate, 3)),
        _Column("drafted/s", lambda row: _figure(row.draft_tokens_per_s)),
    )
    return _table(columns, rows, width)


class _Column(NamedTuple, Generic[Row]):
    """A header and its cells. It is left out on terminals narrower than `min_width`."""

    header: str
    cell: Callable[[Row], str | Text]
    min_width: int = 0
    is_name: bool = False


def _table(columns: Sequence[_Column[Row]], rows: Sequence[Row], width: int) -> Table:
    """Names to the left, whole; figures to the right."""
    shown = [column for column in columns if column.min_width <= width]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in shown:
        if column.is_name:
            table.add_column(column.header, overflow="fold", min_width=len(column.header))
        else:
            table.add_column(column.header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*[column.cell(row) for column in shown])
    return table


def _model(row: WorkerRow) -> str:
    return printable(" ".join(part for part in (row.drafter, row.model) if part)) or _NOTHING


def _memory(row: WorkerRow) -> str:
    return f"{row.memory_used_bytes / 2**30:.1f} GiB" if row.memory_total_bytes else _NOTHING


def _per_cent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.0f} %"


def _state(state: str) -> Text:
    return Text(state, _STATES[state])


def _figure(value: float | None, digits: int = 1) -> str:
    return _NOTHING if value is None else number(value, digits)
