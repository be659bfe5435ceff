"""Where workers are: the addresses that a setting names, now and after each change.

Owns: the setting's forms, and static lists and DNS behind them. Must not know: links, roles, models.

    host:port                           there from the start on
    dns:///name:port                    all addresses of the name, resolved again and again
    kubernetes://namespace/service:port the service's EndpointSlices (services.coordinator.kubernetes_discovery)
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import ConfigError

log = logging.getLogger(__name__)

DNS = "dns:///"
KUBERNETES = "kubernetes://"

_HOST_PORT = re.compile(r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d+)")
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SERVICE_PORT = re.compile(rf"(?P<namespace>{_LABEL})/(?P<service>{_LABEL}):(?P<port>\d+|{_LABEL})")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One worker's address. `draining`: it gets nothing new, and what it has is moved."""

    address: str
    draining: bool = False


Endpoints = frozenset[Endpoint]


class Discovery(Protocol):
    """Names workers."""

    def watch(self) -> AsyncGenerator[Endpoints]:
        """All endpoints, now and after each change. Failures are logged and retried, never raised.

        What fails or finds nothing yields nothing, so that the last known ones hold. Close the iterator to end it.
        """
        ...


class StaticDiscovery:
    """One address that never changes."""

    def __init__(self, address: str) -> None:
        self._endpoints = frozenset({Endpoint(address)})

    async def watch(self) -> AsyncGenerator[Endpoints]:
        yield self._endpoints


class DnsDiscovery:
    """All addresses of a name."""

    def __init__(self, host: str, port: int, interval_s: float) -> None:
        self._host = host
        self._port = port
        self._interval_s = interval_s

    async def watch(self) -> AsyncGenerator[Endpoints]:
        known, trouble = Endpoints(), ""
        while True:
            try:
                found = await self._resolve()
                if found and found != known:
                    known = found
                    yield known
                trouble = ""
            except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
                if str(error) != trouble:
                    trouble = str(error)
                    log.warning("%s%s cannot be resolved: %s; what is known holds", DNS, self._host, trouble)
            await asyncio.sleep(self._interval_s)

    async def _resolve(self) -> Endpoints:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        return frozenset(Endpoint(_join(str(address[0]), self._port)) for *_, address in infos)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Source:
    """One part of a setting, parsed: what it names, and nothing done about it yet."""

    scheme: str
    """`` (static), DNS or KUBERNETES."""
    host: str
    """Host or name; of Kubernetes the service."""
    port: str
    """A number; of Kubernetes it may be the port's name."""
    namespace: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}{self.namespace + '/' if self.namespace else ''}{self.host}:{self.port}"

    def discovery(self, dns_interval_s: float) -> Discovery:
        """What watches it."""
        if self.scheme == DNS:
            return DnsDiscovery(self.host.strip("[]"), int(self.port), dns_interval_s)
        if self.scheme == KUBERNETES:
            try:  # its client is an extra, and loads slowly
                from services.coordinator.kubernetes_discovery import KubernetesDiscovery
            except ImportError as error:
                raise ConfigError(f"{self} needs pip install 'outrider[kubernetes]': {error}") from error
            return KubernetesDiscovery(self.namespace, self.host, self.port)
        return StaticDiscovery(str(self))


def parse_source(setting: str, text: str) -> Source:
    """Raises ConfigError naming the setting where `text` has none of the forms."""
    if text.startswith(KUBERNETES):
        if match := _SERVICE_PORT.fullmatch(text.removeprefix(KUBERNETES)):
            return Source(KUBERNETES, match["service"], _checked_port(setting, text, match["port"]), match["namespace"])
        raise ConfigError(f"{setting}: {text!r} is not {KUBERNETES}NAMESPACE/SERVICE:PORT")
    scheme = DNS if text.startswith(DNS) else ""
    if match := _HOST_PORT.fullmatch(text.removeprefix(scheme)):
        return Source(scheme, match["host"], _checked_port(setting, text, match["port"]))
    raise ConfigError(f"{setting}: {text!r} is not HOST:PORT, {DNS}NAME:PORT or {KUBERNETES}NAMESPACE/SERVICE:PORT")


def _checked_port(setting: str, text: str, port: str) -> str:
    if port.isdecimal() and not 1 <= int(port) <= 65_535:
        raise ConfigError(f"{setting}: {text!r}: the port is not between 1 and 65535")
    return port
