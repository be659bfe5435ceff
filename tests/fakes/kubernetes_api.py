"""A small Kubernetes API server: one resource, EndpointSlices, with list and watch over real HTTP.

Owns: objects with rising resourceVersions, their history, and the faults that a test asks for. As an API server does,
it answers a watch with what came after its resourceVersion, by selector and namespace, ends it after timeoutSeconds,
sends bookmarks where they are allowed, and answers 410 Gone, as a status or as an event, where history is compacted.
"""

from __future__ import annotations

import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "a-token"  # noqa: S105
_POLL_S = 0.02


def endpoint_slice(name: str, *addresses: str, service: str = "drafts", namespace: str = "ns", **more: Any) -> dict:
    """`more`: conditions of all endpoints, and `ports`."""
    ports = more.pop("ports", [{"name": "grpc", "port": 50052}])
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": more} for address in addresses],
        "ports": ports,
    }


@dataclass
class KubernetesApi:
    """The server's state. Its methods may be called from any thread."""

    version: int = 100
    objects: dict[str, dict] = field(default_factory=dict)
    history: list[tuple[int, str, dict]] = field(default_factory=list)
    oldest: int = 0
    """Watches from before this are gone."""
    gone_as_event: bool = False
    token: str = TOKEN
    """The only one that is taken."""
    refuse: int = 0
    """A status that every request is answered with."""
    lists: int = 0
    watches: list[int] = field(default_factory=list)
    """The resourceVersions that were watched from."""
    num_open: int = 0
    cuts: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.changed = threading.Condition()

    def apply(self, item: dict) -> None:
        with self.changed:
            kind = "MODIFIED" if item["metadata"]["name"] in self.objects else "ADDED"
            self._record(kind, item)
            self.objects[item["metadata"]["name"]] = self.history[-1][2]

    def delete(self, name: str) -> None:
        with self.changed:
            self._record("DELETED", self.objects.pop(name))

    def bookmark(self) -> None:
        """Raises the version with nothing of interest changed, and tells the watches."""
        with self.changed:
            self._record("BOOKMARK", {"metadata": {}})

    def compact(self) -> None:
        """Forgets the history: watches from earlier versions are gone."""
        with self.changed:
            self.version += 1
            self.oldest = self.version

    def cut(self) -> None:
        """Breaks all connections of watches off."""
        with self.changed:
            self.cuts += 1
            self.changed.notify_all()

    def _record(self, kind: str, item: dict) -> None:
        self.version += 1
        copy = json.loads(json.dumps(item))
        copy["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, kind, copy))
        self.changed.notify_all()

    @contextmanager
    def serving(self, tls: ssl.SSLContext | None = None) -> Iterator[KubernetesApi]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": _POLL_S})
        thread.start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            self.cut()
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(api: KubernetesApi) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            parts = url.path.split("/")
            if parts[:5] != ["", "apis", "discovery.k8s.io", "v1", "namespaces"] or parts[6:] != ["endpointslices"]:
                self._status(404, "NotFound")
            elif self.headers.get("Authorization", "").partition(" ")[2] != api.token:
                self._status(401, "Unauthorized")
            elif api.refuse:
                self._status(api.refuse, "Forbidden")
            elif query.get("watch") in ("true", "True", "1"):
                self._watch(parts[5], query)
            else:
                self._list(parts[5], query)

        def _list(self, namespace: str, query: dict[str, str]) -> None:
            with api.changed:
                api.lists += 1
                items = [o for o in api.objects.values() if _selected(o, namespace, query)]
                body = {"kind": "EndpointSliceList", "metadata": {"resourceVersion": str(api.version)}, "items": items}
            self._send(200, body)

        def _watch(self, namespace: str, query: dict[str, str]) -> None:
            version = int(query["resourceVersion"])
            with api.changed:
                api.watches.append(version)
                cuts, gone = api.cuts, version < api.oldest
                api.num_open += 1
            try:
                if gone and not api.gone_as_event:
                    self._status(410, "Expired")
                    return
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                if gone:
                    self._event("ERROR", {"kind": "Status", "code": 410, "message": "too old", "reason": "Expired"})
                else:
                    self._events(version, namespace, query, cuts)
            except OSError:
                self.close_connection = True  # the client has gone
            finally:
                with api.changed:
                    api.num_open -= 1

        def _events(self, version: int, namespace: str, query: dict[str, str], cuts: int) -> None:
            deadline = time.monotonic() + float(query["timeoutSeconds"])
            while True:
                with api.changed:
                    news = [entry for entry in api.history if entry[0] > version]
                    if not news and api.cuts == cuts:
                        api.changed.wait(min(_POLL_S, max(0.0, deadline - time.monotonic())))
                    if api.cuts != cuts:
                        self.close_connection = True
                        return
                for version, kind, item in news:  # noqa: B007  # the next ones come after it
                    bookmark = kind == "BOOKMARK" and query.get("allowWatchBookmarks") in ("true", "True")
                    if bookmark or (kind != "BOOKMARK" and _selected(item, namespace, query)):
                        self._event(kind, item)
                if time.monotonic() >= deadline:
                    self.wfile.write(b"0\r\n\r\n")
                    return

        def _event(self, kind: str, item: dict) -> None:
            line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
            for piece in (line[:7], line[7:]):  # a chunk is not a line
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()
            if kind == "ERROR":
                self.wfile.write(b"0\r\n\r\n")

        def _status(self, code: int, reason: str) -> None:
            self._send(code, {"kind": "Status", "status": "Failure", "code": code, "reason": reason})

        def _send(self, code: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _selected(item: dict, namespace: str, query: dict[str, str]) -> bool:
    wanted = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part)
    labels = item["metadata"].get("labels", {})
    return item["metadata"].get("namespace") == namespace and wanted.items() <= labels.items()


def kubeconfig(url: str, token: str = TOKEN) -> str:
    """A kubeconfig's text, for a server without TLS."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": token}}],
        }
    )
