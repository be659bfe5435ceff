"""Errors as the command line shows them: one line with the reason, and what to do about it; never a traceback.

Owns: that translation and the exit codes: 1 for what went wrong, 2 for wrong usage, 130 and 143 for signals.
Must not know: any command.
"""

from __future__ import annotations

from services.common.errors import OutriderError, ResourceExhausted, Unavailable

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class CommandFailed(Exception):
    """A command cannot go on. The message is one line; `detail` may be several, such as the end of a log."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; unwinds like KeyboardInterrupt, so that context managers clean up."""


def describe(error: OutriderError, address: str | None = None) -> str:
    """One line: the server's sentence, its reason, and a hint where trying again may help."""
    message = " ".join(error.message.split())
    where = f" at {address}" if address else ""
    if error.reason == "UNIMPLEMENTED":
        return f"what serves{where} is no coordinator, or an older one: {message}"
    if isinstance(error, Unavailable) and error.reason == "STREAM_BROKEN":
        return f"cannot reach the coordinator{where} (is `outrider up` running?): {message}"
    hint = ""
    if error.retry_after_ms:
        hint = f"; try again in {error.retry_after_ms / 1e3:g} s"
    elif isinstance(error, Unavailable | ResourceExhausted):
        hint = "; trying again later may help"
    return f"{message} [{error.reason}]{hint}"
