"""Child processes of the command line: started with their logs in files, awaited until ready, stopped without remains.

Owns: the life of a process, and what to show when it fails. Must not know: what the processes serve.
Processes are to be started from the main thread: the kernel ends them with the thread that started them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.cli.failure import CommandFailed

_TETHER = Path(__file__).with_name("tether.py")
_POLL_S = 0.02
_NUM_SHOWN_LINES = 12


@dataclass(frozen=True, slots=True)
class Ready:
    """What a service's ready line says."""

    service: str
    port: int
    metrics_port: int = 0


def tethered(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` so that it ends with this process."""
    return [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *command]


def output_of(command: Sequence[str], stop_s: float) -> str:
    """Runs `command` to its end and returns its standard output; the rest of it shares this terminal.

    If this process is interrupted meanwhile, the command gets SIGTERM and `stop_s` to remove what it left half done.
    """
    with subprocess.Popen(tethered(command), stdout=subprocess.PIPE, text=True) as process:
        try:
            return process.communicate()[0]
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(stop_s)
            process.kill()
            raise


class Process:
    """A running child. Standard output and error go to `NAME.out` and `NAME.err` in the log directory."""

    def __init__(self, name: str, command: Sequence[str], log_dir: Path, env: Mapping[str, str]) -> None:
        """Starts it. `command[0]` is an absolute path. Raises CommandFailed where it cannot be started."""
        self.name = name
        self._out, self._err = log_dir / f"{name}.out", log_dir / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            try:
                self._popen = subprocess.Popen(
                    tethered(command),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=dict(env),
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandFailed(f"cannot start the {name}: {error.strerror}") from None

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def last_lines(self) -> str:
        """The end of its log, for people."""
        with contextlib.suppress(OSError):
            lines = (self._err.read_text(errors="replace") + self._out.read_text(errors="replace")).splitlines()
            return "\n".join(f"  {self.name}: {line}" for line in lines[-_NUM_SHOWN_LINES:])
        return ""

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Returns once `condition` holds. Raises CommandFailed, with the log's end, if the process ends or is late."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running:
                code = self._popen.returncode
                raise CommandFailed(f"the {self.name} ended (status {code}) {what}", detail=self.last_lines())
            if time.monotonic() >= deadline:
                message = f"the {self.name} was not ready after {timeout_s:g} s {what}"
                raise CommandFailed(message, detail=self.last_lines())
            time.sleep(_POLL_S)

    def wait_ready(self, timeout_s: float, on_stage: Callable[[str], None] = lambda stage: None) -> Ready:
        """Waits for the ready line on its standard output; `on_stage` hears what it is at, where its log says so.

        Raises CommandFailed as wait_until does.
        """
        found: list[Ready] = []
        told = ""

        def seen() -> bool:
            nonlocal told
            if (stage := last_stage(self._err.read_text(errors="replace"))) != told:
                told = stage
                on_stage(stage)
            if not found and (ready := ready_line(self._out.read_text(errors="replace"))):
                found.append(ready)
            return bool(found)

        self.wait_until(seen, timeout_s, "before it was ready")
        return found[0]

    def terminate(self) -> None:
        """Asks it to stop. Harmless when it has."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.terminate()

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, `timeout_s`, then SIGKILL to it and to whatever it started in its session."""
        self.terminate()
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()


def last_stage(log: str) -> str:
    """What was begun last, of the lines that a service's Reporter writes: "Loading x ..."; empty if there is none."""
    begun = [line for line in log.splitlines(keepends=True) if line.endswith(" ...\n")]
    return begun[-1].removesuffix(" ...\n") if begun else ""


def ready_line(output: str) -> Ready | None:
    """The ready line in a service's output, if it is there and complete."""
    for line in output.splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "ready":
            port, metrics_port = int(event.get("port", 0)), int(event.get("metrics_port", 0))
            return Ready(str(event.get("service", "")), port, metrics_port)
    return None
