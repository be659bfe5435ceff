"""Progress on standard error: a bar on a terminal, one line at start and end elsewhere.

Owns: how long-running preparation is shown. Must not know: what is being prepared.
Standard output stays free for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Advance(Protocol):
    """Takes the amount done so far, in the unit of the bar's total; the total where it was not known before."""

    def __call__(self, done: float, *, total: float | None = None, stage: str = "") -> None:
        """`stage`: what is being done of the task; each has a total of its own."""


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
            yield lambda done, *, total=None, stage="": None
            self.note(f"{description}: done in {time.monotonic() - started:.1f} s")
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(description, total=total)
            known = total

            def advance(done: float, *, total: float | None = None, stage: str = "") -> None:
                shown = f"{description}: {stage}" if stage else description
                progress.update(task, completed=done, total=total or known, description=shown)

            yield advance
            progress.update(task, total=known or 1, completed=known or 1, description=description)
