"""Whether the session store keeps what it holds, looked at again and again: a failover may bring another server.

Owns: what the last look saw, and that no session begins in a store that evicts. Must not know: sessions, when to look.
"""

from __future__ import annotations

import logging
from typing import Protocol

from services.common.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)


class CheckedStore(Protocol):
    """What is needed of services.common.session_store.SessionStore."""

    async def check_server(self) -> None: ...


class StorePolicy:
    """Fit until a look says otherwise: a coordinator starts on no other store."""

    def __init__(self, store: CheckedStore) -> None:
        self._store = store
        self.unfit = False
        """Whether no session may begin now."""

    async def look(self) -> None:
        """Logs what has changed. Raises Unavailable where the store does not answer; then the last look holds."""
        try:
            await self._store.check_server()
        except ConfigError as error:
            if not self.unfit:
                log.error("no session begins here until this is mended: %s", error)
            self.unfit = True
        else:
            if self.unfit:
                log.warning("the session store evicts no more; sessions begin again")
            self.unfit = False

    def check(self) -> None:
        """Raises Unavailable STORE_UNAVAILABLE where a session may not begin now."""
        if self.unfit:
            message = "the session store may evict sessions: its maxmemory-policy is not noeviction"
            raise Unavailable("STORE_UNAVAILABLE", message, retry_after_ms=1000)
