"""How a training run shows itself on standard error: a bar on a terminal, a line a minute elsewhere.

Owns: the form. Must not know: what is counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_S = 60.0
Show = Callable[[int, str], None]
"""Takes the tokens done so far, and a remark."""


@contextmanager
def progress(description: str, total: int, done: int = 0, console: Console | None = None) -> Iterator[Show]:
    """Shows tokens of `total`, of which `done` were there before, their rate, and the latest remark."""
    console = console or Console(file=sys.stderr)
    started = time.monotonic()

    def rate(now_done: int) -> str:
        return f"{(now_done - done) / max(time.monotonic() - started, 1e-9):,.0f} tokens/s"

    if not console.is_terminal:
        yield _lines(console, description, total, rate)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[remark]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=done, remark="")
        yield lambda now_done, remark: bar.update(task, completed=now_done, remark=f"{rate(now_done)}  {remark}")


def _lines(console: Console, description: str, total: int, rate: Callable[[int], str]) -> Show:
    last = [float("-inf")]

    def show(now_done: int, remark: str) -> None:
        if time.monotonic() - last[0] >= LINE_S or now_done >= total:
            last[0] = time.monotonic()
            line = f"{description}: {now_done:,} of {total:,} tokens, {rate(now_done)}  {remark}".rstrip()
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return show
