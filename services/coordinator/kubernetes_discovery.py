"""Workers behind a Kubernetes service: its EndpointSlices, listed once and watched from then on.

Owns: the list and the watch, resumed after they break, on a thread of its own, since the client blocks.
Must not know: what slices mean (services.coordinator.endpoint_slices), links. Credentials and addresses of the API
server are the `kubernetes` package's affair: the pod's service account, else the kubeconfig.

A watch goes on from the newest resourceVersion that it has seen, bookmarks included. It starts over with a list when
the server says that this one is gone (410), be it as the answer's status or as an event. Whatever fails is tried again,
later each time; meanwhile what is known holds. It needs `list` and `watch` on endpointslices in the namespace.

Tested against a server of the tests' own that speaks list and watch over HTTP, never against a real API server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

from services.common.errors import ConfigError
from services.coordinator.discovery import KUBERNETES, Endpoints
from services.coordinator.endpoint_slices import SliceTable

if TYPE_CHECKING:
    import urllib3

log = logging.getLogger(__name__)

WATCH_S = 300
"""After which the server ends a watch, to be resumed."""
_CONNECT_TIMEOUT_S, _LIST_TIMEOUT_S = 5.0, 30.0
_WATCH_SLACK_S = 30.0
"""A watch that is silent for longer than it should last is half-open."""
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 10.0
_SHORT_S = 1.0
"""A watch that ends before this is not resumed at once: a server or proxy may end them all."""
_JOIN_S = 2.0


class _Expired(Exception):
    """The resourceVersion is too old to watch from."""


class KubernetesDiscovery:
    """A service's endpoints (Discovery). `port`: a number, or the name of one of the slices' ports."""

    def __init__(
        self,
        namespace: str,
        service: str,
        port: str,
        *,
        connect: Callable[[], client.ApiClient] | None = None,
        watch_s: float = WATCH_S,
    ) -> None:
        """Raises ConfigError where there are no credentials. `connect` makes a client; by default as configured."""
        self._namespace = namespace
        self._service = service
        self._port = port
        self._client = (connect or _configured_client)()
        self._watch_s = watch_s

    def __str__(self) -> str:
        return f"{KUBERNETES}{self._namespace}/{self._service}:{self._port}"

    async def watch(self) -> AsyncGenerator[Endpoints]:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Endpoints] = asyncio.Queue()

        def tell(endpoints: Endpoints) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to tell
                loop.call_soon_threadsafe(news.put_nowait, endpoints)

        watcher = _Watcher(str(self), self._client, self._namespace, self._service, SliceTable(self._port), tell)
        watcher.start(self._watch_s)
        try:
            while True:
                yield await news.get()
        finally:
            await asyncio.to_thread(watcher.stop)


class _Watcher:
    """One thread's list and watch."""

    def __init__(
        self,
        name: str,
        api: client.ApiClient,
        namespace: str,
        service: str,
        table: SliceTable,
        tell: Callable[[Endpoints], None],
    ) -> None:
        self._name = name
        self._api = client.DiscoveryV1Api(api)
        self._namespace = namespace
        self._selector = f"kubernetes.io/service-name={service}"
        self._table = table
        self._tell = tell
        self._told = Endpoints()
        self._version = ""
        """The newest resourceVersion; empty: to be listed anew."""
        self._trouble = ""
        self._num_failures = 0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._thread: threading.Thread | None = None

    def start(self, watch_s: float) -> None:
        self._thread = threading.Thread(target=self._run, args=(watch_s,), name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, waking it from a read; one that is connecting ends when that does."""
        with self._lock:
            self._stopping.set()
            if self._response is not None:
                with contextlib.suppress(OSError, ValueError, RuntimeError):  # it has ended by itself
                    self._response.shutdown()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _run(self, watch_s: float) -> None:
        while not self._stopping.is_set():
            began_s = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self._watch(watch_s)
            except _Expired:
                self._version = ""
            except Exception as error:  # the client, urllib3, json and the server's answers raise all sorts
                self._failed(error)
            if time.monotonic() - began_s >= _SHORT_S:
                self._num_failures = 0
            self._pause()

    def _list(self) -> None:
        with self._answer(_LIST_TIMEOUT_S) as response:
            listed = json.loads(response.read(decode_content=True))
        self._table.replace(listed.get("items") or ())
        self._version = str(listed["metadata"]["resourceVersion"])
        self._news()

    def _watch(self, watch_s: float) -> None:
        """Takes events until the server ends the watch."""
        options = {
            "watch": True,
            "resource_version": self._version,
            "allow_watch_bookmarks": True,
            "timeout_seconds": max(1, round(watch_s)),
        }
        with self._answer(watch_s + _WATCH_SLACK_S, **options) as response:
            for event in _events(response):
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            if item.get("code") == 410:
                raise _Expired
            raise ValueError(f"the watch says: {item.get('code')} {item.get('message')}")
        self._table.change(kind, item)
        self._version = str(item["metadata"]["resourceVersion"])
        self._news()

    @contextlib.contextmanager
    def _answer(self, timeout_s: float, **options: Any) -> Iterator[urllib3.BaseHTTPResponse]:
        """Of one request; `stop` can break it off. Raises _Expired for 410."""
        try:
            response = self._api.list_namespaced_endpoint_slice(
                self._namespace,
                label_selector=self._selector,
                _preload_content=False,
                _request_timeout=(_CONNECT_TIMEOUT_S, timeout_s),
                **options,
            )
        except ApiException as error:
            if error.status == 410:
                raise _Expired from None
            raise
        with self._lock:
            self._response = response
        try:
            if self._stopping.is_set():
                raise InterruptedError("stopping")
            yield response
        finally:
            with self._lock:
                self._response = None
            response.close()
            response.release_conn()

    def _news(self) -> None:
        """Tells of a change. No endpoints at all are taken for a failure: a service without workers serves nobody."""
        if self._trouble:
            log.info("%s is watched again", self._name)
        self._trouble = ""
        endpoints = self._table.endpoints
        if not endpoints and self._told:
            log.warning("%s has no endpoints any more; the last known ones hold", self._name)
        elif endpoints != self._told:
            self._told = endpoints
            self._tell(endpoints)

    def _failed(self, error: Exception) -> None:
        trouble = _in_words(error)
        if trouble != self._trouble and not self._stopping.is_set():
            self._trouble = trouble
            log.warning("%s cannot be watched: %s; what is known holds", self._name, trouble)

    def _pause(self) -> None:
        backoff_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(self._num_failures, 16))
        self._num_failures += 1
        self._stopping.wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  # jitter


def _events(response: urllib3.BaseHTTPResponse) -> Iterator[dict[str, Any]]:
    """One JSON object a line. Raises where the connection breaks off within one."""
    rest = b""
    for chunk in response.stream(4096, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield json.loads(line)
    if rest.strip():
        raise ValueError("the watch ended within an event")


def _in_words(error: Exception) -> str:
    if isinstance(error, ApiException):
        hint = {401: "the credentials are refused", 403: "needs list and watch on endpointslices"}.get(error.status, "")
        return f"{error.status} {error.reason}" + (f" ({hint})" if hint else "")
    return f"{type(error).__name__}: {error}"


def _configured_client() -> client.ApiClient:
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            configuration = client.Configuration()
            config.load_incluster_config(client_configuration=configuration)
            return client.ApiClient(configuration)
        return config.new_client_from_config(config_file=os.environ.get("KUBECONFIG"))
    except (ConfigException, OSError) as error:
        raise ConfigError(f"{KUBERNETES} needs a pod's service account or a kubeconfig: {error}") from error
