"""For all tests: a real Redis, one a test process (bundled, or another: tests.fakes.redis_process), and Triton's
interpreter where no device is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from redis import Redis

from tests.fakes.redis_process import RedisProcess, running

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
def redis_server() -> Iterator[RedisProcess]:
    """A server of this test process's own. Use `redis_url` unless the test is about the server itself."""
    with tempfile.TemporaryDirectory(prefix="outrider-redis-") as directory, running(Path(directory)) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisProcess) -> str:
    """The address of a server that holds nothing."""
    with Redis.from_url(redis_server.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.flushall()
    return redis_server.url
