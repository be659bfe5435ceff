"""Progress on standard error: a bar on a terminal, one line at start and end elsewhere.

Owns: how long-running preparation is shown. Must not know: what is being prepared.
Standard output stays free for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[float], None]
"""Takes the amount done so far, in the unit of the bar's total."""


class Reporter:
    """Shows one task at a time. `quiet` shows nothing, for tests and embedding."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet)

    def note(self, sentence: str) -> None:
        self._console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        """Shows `description` while the block runs. The yielded function takes the amount done; no total: a spinner."""
        if not self._console.is_terminal:
            started = time.monotonic()
            self.note(f"{description} ...")
            yield lambda done: None
            self.note(f"{description}: done in {time.monotonic() - started:.1f} s")
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(description, total=total)
            yield lambda done: progress.update(task, completed=done)
            progress.update(task, total=total or 1, completed=total or 1)
