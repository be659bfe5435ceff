"""A service's EndpointSlices (discovery.k8s.io/v1) as addresses of workers.

Owns: which endpoints of which slices count, and when they drain. Must not know: HTTP, threads. Pure.

Conditions (Kubernetes API reference, EndpointSlice v1): `ready` unset means true, `serving` unset means as `ready`,
`terminating` unset means false. An endpoint that terminates or does not serve drains: nothing new, what runs is moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.coordinator.discovery import Endpoint, Endpoints

Slice = Mapping[str, Any]
"""As decoded from JSON; of the server's making."""


class SliceTable:
    """The slices of one service by name, replaced by a list, changed by the events of a watch."""

    def __init__(self, port: str) -> None:
        """`port`: a number, which is taken as it is, or the name of one of the slices' ports."""
        self._port = port
        self._slices: dict[str, Endpoints] = {}

    def replace(self, items: Sequence[Slice]) -> None:
        """A list's items are all there are."""
        self._slices = {_name(item): self._endpoints(item) for item in items}

    def change(self, event: str, item: Slice) -> None:
        """Of ADDED, MODIFIED and DELETED; others change nothing."""
        if event == "DELETED":
            self._slices.pop(_name(item), None)
        elif event in ("ADDED", "MODIFIED"):
            self._slices[_name(item)] = self._endpoints(item)

    @property
    def endpoints(self) -> Endpoints:
        """Of all slices. One that stands in several, as while they are rearranged, drains where it does in all."""
        draining: dict[str, bool] = {}
        for endpoints in self._slices.values():
            for endpoint in endpoints:
                draining[endpoint.address] = draining.get(endpoint.address, True) and endpoint.draining
        return frozenset(Endpoint(address, drains) for address, drains in draining.items())

    def _endpoints(self, item: Slice) -> Endpoints:
        port = self._port_of(item)
        if port is None:
            return Endpoints()
        return frozenset(
            Endpoint(f"[{address}]:{port}" if ":" in address else f"{address}:{port}", _drains(endpoint))
            for endpoint in item.get("endpoints") or ()
            for address in endpoint.get("addresses") or ()
        )

    def _port_of(self, item: Slice) -> int | None:
        if self._port.isdecimal():
            return int(self._port)
        ports = [port.get("port") for port in item.get("ports") or () if port.get("name") == self._port]
        return ports[0] if ports else None


def _name(item: Slice) -> str:
    return str(item["metadata"]["name"])


def _drains(endpoint: Mapping[str, Any]) -> bool:
    conditions = endpoint.get("conditions") or {}
    ready = conditions.get("ready") is not False
    serving = conditions.get("serving")
    return bool(conditions.get("terminating")) or not (ready if serving is None else serving)
