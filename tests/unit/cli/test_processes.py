"""Child processes: ready when they say so, stopped without remains, dead with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.cli.failure import CommandFailed
from services.cli.processes import Process, Ready, last_stage, ready_line

READY = 'print(\'{"event": "ready", "service": "x", "port": 7}\', flush=True)'


def python(code: str, log_dir: Path) -> Process:
    return Process("child", [sys.executable, "-c", code], log_dir, dict(os.environ))


def wait_gone(pid: int) -> None:
    """Until the process is gone or a zombie whose parent has not looked yet."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} still runs")


def test_ready_line_is_taken_whole_and_among_others():
    line = '{"event": "ready", "service": "target", "port": 5}'
    assert ready_line(f"noise\n{line}\n") == Ready("target", 5)
    assert ready_line(line) is None
    assert ready_line('{"event": "other"}\n[1]\n') is None


def test_a_process_is_ready_when_it_says_so_and_stops_when_told(tmp_path):
    process = python(f"import time; {READY}; time.sleep(60)", tmp_path)
    try:
        assert process.wait_ready(10) == Ready("x", 7)
        assert process.running
    finally:
        process.stop(5)
    assert not process.running


def test_what_is_shown_of_a_log_is_what_was_begun_last() -> None:
    assert last_stage("") == ""
    assert last_stage("noise\nLoading x ...\nLoading x: done in 0.1 s\n") == "Loading x"
    assert last_stage("Loading x ...\nPacking the weights ...\nChecking ...") == "Packing the weights"


def test_who_waits_for_a_process_hears_each_stage_once(tmp_path):
    go_on = tmp_path / "go on"
    code = (
        f"import os, sys, time\nprint('First ...', file=sys.stderr)\nwhile not os.path.exists({str(go_on)!r}): pass\n"
    )
    code += f"print('Second ...', file=sys.stderr)\n{READY}\ntime.sleep(60)"
    process, heard = python(code, tmp_path), []

    def hear(stage: str) -> None:
        heard.append(stage)
        go_on.touch()

    try:
        process.wait_ready(10, hear)
    finally:
        process.stop(5)
    assert heard == ["First", "Second"]


def test_a_process_that_ends_early_shows_the_end_of_its_log(tmp_path):
    process = python("import sys; sys.exit('no such model')", tmp_path)
    with pytest.raises(CommandFailed, match="ended") as caught:
        process.wait_ready(10)
    assert "no such model" in caught.value.detail


def test_a_process_that_is_never_ready_is_late(tmp_path):
    process = python("import time; time.sleep(60)", tmp_path)
    try:
        with pytest.raises(CommandFailed, match="not ready"):
            process.wait_ready(0.05)
    finally:
        process.stop(5)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path):
    code = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}; time.sleep(60)"
    process = python(code, tmp_path)
    process.wait_ready(10)
    process.stop(0.05)
    assert not process.running


def test_what_a_process_started_is_stopped_with_it(tmp_path):
    grandchild = (
        "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    ready = 'print(\'{"event": "ready", "port": %d}\' % c.pid, flush=True)'
    process = python(f"{grandchild}; {ready}; time.sleep(60)", tmp_path)
    pid = process.wait_ready(10).port
    process.stop(5)
    wait_gone(pid)


def test_an_interrupted_command_may_clean_up(tmp_path):
    half_done = tmp_path / "half done"
    child = (
        f"import pathlib, signal, sys, time; file = pathlib.Path({str(half_done)!r}); file.touch()\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.4), file.unlink(), sys.exit()))\n"
        "print('x', file=sys.stderr, flush=True); time.sleep(60)"
    )
    code = (
        "import sys; from services.cli.processes import output_of\n"
        f"try: output_of([sys.executable, '-c', {child!r}], 5.0)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()
        assert half_done.exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert not half_done.exists()


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, pathlib, sys, time\n"
        "from services.cli.processes import Process\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "p = Process('child', command, pathlib.Path(sys.argv[1]), os.environ)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    wait_gone(pid)
