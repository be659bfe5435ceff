"""What signals do to a service that is still starting."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_thread_loads_ends_the_process_at_once(number):
    code = (
        "import asyncio, time\n"
        "from services.common.service import exit_on_signals\n"
        "def load(): print('loading', flush=True); time.sleep(60)\n"
        "async def serve():\n"
        "    with exit_on_signals(): await asyncio.to_thread(load)\n"
        "asyncio.run(serve())\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, error = process.communicate(timeout=5)
    assert (process.returncode, error) == (128 + number, b"")
