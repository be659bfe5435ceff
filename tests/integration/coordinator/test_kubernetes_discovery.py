"""EndpointSlices over real HTTP: listed, watched, and watched again whatever breaks."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from kubernetes.config import incluster_config

from services.common.errors import ConfigError
from services.common.service import wait_until
from services.coordinator.discovery import Endpoint, Endpoints, parse_source
from services.coordinator.kubernetes_discovery import KubernetesDiscovery
from tests.fakes.kubernetes_api import TOKEN, KubernetesApi, endpoint_slice, kubeconfig

A, B, C = (Endpoint(f"10.0.0.{n}:50052") for n in (1, 2, 3))


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """A server that the environment's kubeconfig names, with one slice of two endpoints."""
    with KubernetesApi().serving() as api:
        (tmp_path / "config").write_text(kubeconfig(api.url))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        api.apply(endpoint_slice("s1", "10.0.0.1", "10.0.0.2"))
        yield api


@asynccontextmanager
async def watching(watch_s: float = 300, port: str = "grpc") -> AsyncIterator[AsyncGenerator[Endpoints]]:
    async with aclosing(KubernetesDiscovery("ns", "drafts", port, watch_s=watch_s).watch()) as changes:
        yield changes


async def following(changes: AsyncGenerator[Endpoints]) -> Endpoints:
    return await asyncio.wait_for(anext(changes), 10)


async def watched(api: KubernetesApi, num_watches: int) -> None:
    """Returns once so many watches have begun, and one is open."""
    assert await wait_until(lambda: len(api.watches) >= num_watches and api.num_open == 1, 10, 0.01)


async def test_slices_are_listed_then_watched_by_their_service(api: KubernetesApi) -> None:
    api.apply(endpoint_slice("other", "10.9.9.9", service="targets"))
    api.apply(endpoint_slice("elsewhere", "10.9.9.8", namespace="another"))
    async with watching() as changes:
        assert await following(changes) == {A, B}
        await watched(api, 1)
        api.apply(endpoint_slice("s2", "10.0.0.3"))
        assert await following(changes) == {A, B, C}
        api.apply(endpoint_slice("other", "10.9.9.7", service="targets"))
        api.apply(endpoint_slice("s1", "10.0.0.1"))
        assert await following(changes) == {A, C}
        api.delete("s2")
        assert await following(changes) == {A}
    assert api.lists == 1


async def test_a_terminating_endpoint_drains(api: KubernetesApi) -> None:
    async with watching() as changes:
        await following(changes)
        api.apply(endpoint_slice("s1", "10.0.0.1", ready=False, serving=True, terminating=True))
        assert await following(changes) == {Endpoint(A.address, draining=True)}


@pytest.mark.parametrize("how", ["timeout", "cut"])
async def test_a_watch_that_ends_is_resumed_where_it_stood(api: KubernetesApi, how: str) -> None:
    async with watching(watch_s=1 if how == "timeout" else 300) as changes:
        await following(changes)
        await watched(api, 1)
        api.bookmark()
        if how == "cut":
            assert await wait_until(lambda: api.num_open == 1, 10)
            api.apply(endpoint_slice("s2", "10.0.0.3"))
            assert await following(changes) == {A, B, C}
            api.cut()
        seen = api.version
        await watched(api, 2)
        api.apply(endpoint_slice("s1", "10.0.0.1"))
        assert await following(changes) in ({A}, {A, C})
    assert api.watches[1] == seen
    assert api.lists == 1


@pytest.mark.parametrize("as_event", [True, False])
async def test_a_version_that_is_gone_is_listed_anew(api: KubernetesApi, as_event: bool) -> None:
    api.gone_as_event = as_event
    async with watching() as changes:
        await following(changes)
        await watched(api, 1)
        api.delete("s1")  # with no watch open, nobody is told; the list is what tells
        api.compact()
        api.apply(endpoint_slice("s3", "10.0.0.3"))
        api.compact()
        api.cut()
        while (now := await following(changes)) != {C}:
            assert now == {A, B, C} or now == {A, B}
    assert api.lists >= 2


async def test_what_is_known_holds_while_the_server_refuses_and_where_nothing_is_left(
    api: KubernetesApi, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching() as changes:
        assert await following(changes) == {A, B}
        await watched(api, 1)
        api.refuse = 403
        api.cut()
        assert await wait_until(lambda: "403" in caplog.text, 10)
        assert "needs list and watch on endpointslices" in caplog.text
        api.refuse = 0
        api.delete("s1")
        assert await wait_until(lambda: "no endpoints any more" in caplog.text, 20)
        api.apply(endpoint_slice("s1", "10.0.0.3"))
        assert await following(changes) == {C}  # the empty set in between was never told


async def test_refused_credentials_are_logged_and_tried_again(
    api: KubernetesApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config").write_text(kubeconfig(api.url, token="wrong"))  # noqa: S106
    async with watching() as changes:
        first = asyncio.create_task(following(changes))
        assert await wait_until(lambda: "401" in caplog.text, 10)
        assert caplog.text.count("401") == 1
        first.cancel()
        await asyncio.wait([first])


@pytest.mark.parametrize("state", ["idle", "refused", "unreachable"])
async def test_it_ends_cleanly_and_at_once_whatever_the_watch_is_doing(
    api: KubernetesApi, state: str, tmp_path: Path
) -> None:
    if state == "unreachable":
        (tmp_path / "config").write_text(kubeconfig("http://127.0.0.1:1"))
    api.refuse = 403 if state == "refused" else 0
    before = threading.active_count()
    async with watching() as changes:
        first = asyncio.create_task(following(changes))
        if state == "idle":
            await first
            await watched(api, 1)
        else:
            await asyncio.wait([first], timeout=0.3)
        first.cancel()
        await asyncio.wait([first])
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 2.0
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("kubernetes://")], (before, names)


def test_without_a_kubeconfig_the_start_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="kubeconfig"):
        parse_source("drafts", "kubernetes://ns/drafts:grpc").discovery(5.0)


class ServiceAccount:
    """What is mounted into a pod: a token that the kubelet writes anew, and the API server's authority."""

    def __init__(self, directory: Path, ca: trustme.CA) -> None:
        self.token, self.ca = directory / "token", directory / "ca.crt"
        self.token.write_text(TOKEN)
        self.ca.write_bytes(ca.cert_pem.bytes())


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[KubernetesApi, ServiceAccount]]:
    """An API server over TLS, and the surroundings of a pod of its cluster; a kubeconfig leads elsewhere."""
    ca, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    account = ServiceAccount(tmp_path, ca)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(account.token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(account.ca))
    (tmp_path / "config").write_text(kubeconfig("http://127.0.0.1:1"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with KubernetesApi().serving(context) as api:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", api.url.rpartition(":")[2])
        api.apply(endpoint_slice("s1", "10.0.0.1", "10.0.0.2"))
        yield api, account


async def test_in_a_pod_its_service_account_is_used_over_tls(pod: tuple[KubernetesApi, ServiceAccount]) -> None:
    api, _ = pod
    async with watching() as changes:
        assert await following(changes) == {A, B}
        await watched(api, 1)
        api.apply(endpoint_slice("s2", "10.0.0.3"))
        assert await following(changes) == {A, B, C}


class Unhesitating(incluster_config.InClusterConfigLoader):
    """Reads the token for every request, not once a minute."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._token_refresh_period = timedelta(0)


async def test_a_token_that_was_written_anew_is_taken_up(
    pod: tuple[KubernetesApi, ServiceAccount], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounted tokens live for an hour; the server takes old ones no more."""
    api, account = pod
    monkeypatch.setattr(incluster_config, "InClusterConfigLoader", Unhesitating)
    async with watching() as changes:
        assert await following(changes) == {A, B}
        await watched(api, 1)
        api.token = "the-next-one"  # noqa: S105
        account.token.write_text(api.token)
        api.apply(endpoint_slice("s2", "10.0.0.3"))
        api.compact()
        api.cut()
        while await following(changes) != {A, B, C}:
            pass
        await watched(api, 2)


async def test_a_server_of_another_authority_gets_no_token(
    pod: tuple[KubernetesApi, ServiceAccount], caplog: pytest.LogCaptureFixture
) -> None:
    api, account = pod
    account.ca.write_bytes(trustme.CA().cert_pem.bytes())
    async with watching() as changes:
        waiting = asyncio.ensure_future(anext(changes))
        assert await wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text, 10)
        assert (api.lists, api.watches) == (0, [])
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize("missing", ["token", "ca"])
def test_a_pod_without_a_service_account_cannot_start(pod: tuple[KubernetesApi, ServiceAccount], missing: str) -> None:
    getattr(pod[1], missing).unlink()
    with pytest.raises(ConfigError, match="service account"):
        KubernetesDiscovery("ns", "drafts", "grpc")
