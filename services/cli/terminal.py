"""What the command line writes, and how: colours by a token's origin, progress, tables.

Owns: the consoles and the decision whether there is a terminal to colour for. Must not know: calls, processes.
Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import Self, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from services.client import Chunk
from services.common.values import TokenOrigin

_COLOURS = {TokenOrigin.DRAFT: "green", TokenOrigin.TARGET: "yellow"}


def results() -> Console:
    """Standard output: tables and texts that the user asked for."""
    return Console(highlight=False)


def notices() -> Console:
    """Standard error: progress and remarks."""
    return Console(stderr=True, highlight=False)


def whole(header: str) -> Column:
    """A table's column for what people copy, such as names: wrapped where there is no room, never shortened."""
    return Column(header, overflow="fold")


def is_coloured(stream: TextIO | None = None) -> bool:
    """Whether to colour what goes to `stream`: a terminal, and NO_COLOR (no-color.org) does not forbid it."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters but line feed and tab are replaced."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def write_text(chunk: Chunk, *, coloured: bool) -> None:
    """Writes a chunk's text at once: the draft's accepted tokens in green, the target's own in yellow.

    A character that several tokens make up has the colour of the token that completes it. Text held back until the end
    belongs to no token and stays plain.
    """
    if not coloured:
        text = printable(chunk.text) if sys.stdout.isatty() else chunk.text
        click.echo(text, nl=False, color=True)
        return
    styled = [click.style(printable(t.text), fg=_COLOURS[t.origin]) for t in chunk.tokens if t.text]
    click.echo("".join(styled) + printable(chunk.trailing_text), nl=False, color=True)


def legend() -> str:
    """What the colours of write_text mean."""
    draft = click.style("accepted from the draft", fg=_COLOURS[TokenOrigin.DRAFT])
    target = click.style("the target's own", fg=_COLOURS[TokenOrigin.TARGET])
    return f"{draft}  {target}"


class Stages:
    """What a start waits for, each with a running bar and its time; gone when the block ends or `stop` is called.

    Nothing is shown before the first stage, so that what runs before may draw bars of its own.
    """

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def show(self, stage: str) -> None:
        """Goes on to `stage`."""
        if not self._progress.console.is_terminal:
            return
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(stage, total=None)
        self._progress.start()

    def stop(self) -> None:
        if self._progress.live.is_started:  # else rich writes an empty line
            self._progress.stop()


def progress_bar(console: Console) -> Progress:
    """A bar of requests done, gone when it ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)
