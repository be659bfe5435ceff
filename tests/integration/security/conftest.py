"""A whole cluster under mutual TLS inside the test's process, simulated models behind real handshakes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trustme

from services.client import Access, OutriderClient
from services.common.worker_server import RunningWorker
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import RunningCoordinator, running_coordinator
from services.draft.config import DraftConfig
from services.draft.server import running_draft
from services.target.config import TargetConfig
from services.target.server import running_target
from tests.certificates import Files, files

TARGET = TargetConfig(port=0, model="simulated", simulated_step_ms=0.0, drain_s=0.0)
DRAFT = DraftConfig(port=0, model="simulated", drafter="simulated", simulated_token_ms=0.0, drain_s=0.0)


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def other_ca() -> trustme.CA:
    return trustme.CA()


class Peers:
    """The files of every part, made when they are first asked for."""

    def __init__(self, directory: Path, ca: trustme.CA) -> None:
        self.directory = directory
        self.ca = ca

    def named(self, *names: str, issuer: trustme.CA | None = None, folder: str = "") -> Files:
        leaf = (issuer or self.ca).issue_cert(*names)
        return files(self.directory / (folder or names[0]), leaf, self.ca)

    @property
    def coordinator(self) -> Files:
        """With the name under which clients know it."""
        return self.named("coordinator", "localhost")


@pytest.fixture
def peers(tmp_path: Path, ca: trustme.CA) -> Peers:
    return Peers(tmp_path / "tls", ca)


@dataclass(frozen=True, slots=True)
class SecureCluster:
    """Running services and the files they were started with."""

    coordinator: RunningCoordinator
    target: RunningWorker
    draft: RunningWorker
    access: Access

    @property
    def address(self) -> str:
        return f"localhost:{self.coordinator.port}"

    def client(self, access: Access | None = None) -> OutriderClient:
        return OutriderClient(self.address, access=access or self.access)


StartSecure = Callable[..., contextlib.AbstractAsyncContextManager[SecureCluster]]


@pytest.fixture
def start_secure(redis_url: str, peers: Peers) -> StartSecure:
    """`start_secure(target=..., **coordinator settings)`."""

    @contextlib.asynccontextmanager
    async def start(target: TargetConfig = TARGET, **settings: Any) -> AsyncIterator[SecureCluster]:
        own = peers.coordinator
        async with contextlib.AsyncExitStack() as stack:
            running_t = await stack.enter_async_context(
                running_target(replace(target, **peers.named("target").settings))
            )
            running_d = await stack.enter_async_context(running_draft(replace(DRAFT, **peers.named("draft").settings)))
            values: dict[str, Any] = {
                "port": 0,
                "redis_url": redis_url,
                "tokenizer": "simulated",
                "targets": f"127.0.0.1:{running_t.port}",
                "drafts": f"127.0.0.1:{running_d.port}",
                **own.settings,
            }
            coordinator = await stack.enter_async_context(running_coordinator(CoordinatorConfig(**values | settings)))
            assert await coordinator.wait_ready(10)
            yield SecureCluster(coordinator, running_t, running_d, Access(tls_ca=own.ca))

    return start
