"""A TCP proxy on loopback that delays, resets, or goes silent: the network's faults, for tests and measurements.

Owns: the connections through it. Must not know: what they carry. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator

_CHUNK_BYTES = 1 << 16
_MAX_HELD_CHUNKS = 1024


class TcpProxy:
    """Forwards to `host:port`. `delay_s` is that of each way; it holds for what arrives from now on."""

    def __init__(self, host: str, port: int, *, delay_s: float = 0.0) -> None:
        self.target = host, port
        self.delay_s = delay_s
        self.port = 0
        self.num_connections = 0
        """Accepted since the start."""
        self._open = asyncio.Event()
        self._open.set()
        self._refuses = False
        self._server: asyncio.Server | None = None
        self._pairs: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()
        if self._pairs:
            await asyncio.wait(list(self._pairs))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Breaks all connections with RST; new ones are taken as before."""
        for task, writers in list(self._pairs.items()):
            for writer in writers:
                if (sock := writer.get_extra_info("socket")) is not None:
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            task.cancel()

    def cut(self) -> None:
        """Breaks all connections, and every new one at once, until `mend`."""
        self._refuses = True
        self.reset()

    def silence(self) -> None:
        """Connections stay open, new ones too, but nothing passes until `mend`: half-open, as behind a pulled plug."""
        self._open.clear()

    def mend(self) -> None:
        self._refuses = False
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.num_connections += 1
        self._pairs[task] = (writer,)
        try:
            if self._refuses:
                return
            far_reader, far_writer = await asyncio.open_connection(*self.target)
            self._pairs[task] = (writer, far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, far_writer))
                both.create_task(self._pump(far_reader, writer))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            for end in self._pairs.pop(task):
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One way. What arrives is let out `delay_s` later, in order, without waiting for what arrived before."""
        loop = asyncio.get_running_loop()
        held: deque[tuple[float, bytes]] = deque()
        arrived, room = asyncio.Event(), asyncio.Event()

        async def let_out() -> None:
            while True:
                while not held:
                    arrived.clear()
                    await arrived.wait()
                due, data = held.popleft()
                room.set()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self._open.wait()
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(let_out())
            data = b"?"
            while data:
                while len(held) >= _MAX_HELD_CHUNKS:
                    room.clear()
                    await room.wait()
                data = await reader.read(_CHUNK_BYTES)
                held.append((loop.time() + self.delay_s, data))
                arrived.set()


@contextlib.asynccontextmanager
async def proxied(host: str, port: int, *, delay_s: float = 0.0) -> AsyncIterator[TcpProxy]:
    """A proxy from enter to exit."""
    proxy = TcpProxy(host, port, delay_s=delay_s)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.aclose()
