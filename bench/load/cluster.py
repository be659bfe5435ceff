"""A cluster of processes with simulated workers, as the load needs it.

Owns: further flags, several coordinators, proxies before the workers. Must not know: what is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from bench.proxy import ProxyThread
from services.cli.cluster import SIMULATED, Cluster, ClusterSpec

COORDINATOR = "coordinator"
_START_S = 30.0


def simulated(
    step_ms: float, token_ms: float, num_draft_tokens: int | None = 4, max_sequences: int = 256
) -> ClusterSpec:
    """One target and one draft, whose time does not depend on how many sequences take part."""
    return ClusterSpec(
        target=SIMULATED,
        drafter=SIMULATED,
        simulated_step_ms=step_ms,
        simulated_token_ms=token_ms,
        num_draft_tokens=num_draft_tokens,
        max_sequences=max_sequences,
    )


class LoadCluster(Cluster):
    """`flags` go to the services of that name; with `proxies`, one for each worker, coordinators go through these."""

    def __init__(
        self,
        spec: ClusterSpec,
        flags: Mapping[str, Sequence[str]] = MappingProxyType({}),
        *,
        num_coordinators: int = 1,
        proxies: Mapping[str, ProxyThread] = MappingProxyType({}),
    ) -> None:
        super().__init__(spec)
        self._flags = flags
        self._num_coordinators = num_coordinators
        self._proxies = proxies

    @property
    def coordinators(self) -> list[str]:
        """Names of the coordinators' processes."""
        return [COORDINATOR, *[f"{COORDINATOR}-{i}" for i in range(2, self._num_coordinators + 1)]]

    @property
    def addresses(self) -> list[str]:
        """Of the coordinators."""
        return [self.address_of(name) for name in self.coordinators]

    def _start_service(self, name: str, flags: list[str], threads: int) -> None:
        flags = [*flags, *self._flags.get(name, ())]
        super()._start_service(name, flags, threads)
        if name == COORDINATOR:
            for other in self.coordinators[1:]:
                super()._start_service(other, flags, threads)

    def _await_ready(self, name: str, timeout_s: float) -> None:
        super()._await_ready(name, timeout_s)
        if proxy := self._proxies.get(name):
            self._ports[name] = proxy.lead_to(self._ports[name])
        if name == COORDINATOR:
            for other in self.coordinators[1:]:
                super()._await_ready(other, _START_S)
