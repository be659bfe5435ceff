"""Ports of servers that start later, or end and come back: nobody else is given them.

Owns: the reservation. Must not know: who serves there.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port of 127.0.0.1 that the system gives to nobody who asks for any port, from enter to exit. A server that asks
    for this one with SO_REUSEADDR, as servers do, gets it; while none does, connections to it are refused."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
