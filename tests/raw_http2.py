"""HTTP/2 written by hand, for peers that behave as no library does.

Owns: frames and a gRPC call's headers, as RFC 9113 and RFC 7541 lay them out. Must not know: gRPC's library.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator, Callable

from services.common.service import end_tasks

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


HELLO = PREFACE + frame(SETTINGS, 0, 0)


def call_headers(path: str, **metadata: str) -> bytes:
    """The header block of a call in plaintext, in literals without indexing: nothing has to be remembered."""
    literals = [(b"\x04", path), (b"\x01", "localhost"), (b"\x0f\x10", "application/grpc")]
    literals += [(_literal(b"\x00", name), value) for name, value in metadata.items()]
    return b"\x83\x86" + b"".join(_literal(*literal) for literal in literals) + b"\x00\x02te\x08trailers"


def _literal(head: bytes, text: str) -> bytes:
    return head + bytes([len(text)]) + text.encode()


def message(payload: bytes, declared: int | None = None, flag: int = 0) -> bytes:
    """As gRPC frames it; `declared`: its length, as it is told."""
    return bytes([flag]) + (len(payload) if declared is None else declared).to_bytes(4, "big") + payload


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each, until the connection is closed."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            yield head[3], head[4], int.from_bytes(head[5:], "big"), payload


def answer(writer: asyncio.StreamWriter, kind: int, flags: int, payload: bytes) -> None:
    """As a peer that lives has to."""
    if kind in (SETTINGS, PING) and not flags & ACK:
        writer.write(frame(kind, ACK, 0, payload if kind == PING else b""))


def ends_stream(kind: int, flags: int) -> bool:
    """Whether it is trailers, or a reset."""
    return kind == RST_STREAM or (kind == HEADERS and bool(flags & END_STREAM))


async def seconds_until_closed(
    port: int, data: bytes, *, tls: ssl.SSLContext | None = None, answers_pings: bool = False, patience_s: float = 30
) -> float:
    """Connects, sends `data`, reads. Raises TimeoutError if the server keeps the connection for `patience_s`."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection("localhost", port, ssl=tls)
    started = loop.time()
    try:
        writer.write(data)
        async with asyncio.timeout(patience_s):
            async for kind, flags, _, payload in frames(reader):
                if answers_pings:
                    answer(writer, kind, flags, payload)
    except ConnectionError:
        pass
    finally:
        writer.close()
    return loop.time() - started


async def stream_ends(reader: asyncio.StreamReader, stream: int) -> bool:
    """Returns once it has; False: the connection was closed before."""
    async for kind, flags, of, _ in frames(reader):
        if of == stream and ends_stream(kind, flags):
            return True
    return False


@contextlib.asynccontextmanager
async def calls(
    port: int,
    num_calls: int,
    headers: bytes,
    more: Callable[[int], bytes] = lambda stream: b"",
    *,
    answers_pings: bool = True,
) -> AsyncIterator[set[int]]:
    """Opens calls on a connection of its own, sends `more` for each stream and, until exit, nothing else but answers.

    The value: the streams that the server has ended.
    """
    reader, writer = await asyncio.open_connection("localhost", port)
    ended: set[int] = set()

    async def read_on() -> None:
        async for kind, flags, stream, payload in frames(reader):
            if answers_pings:
                answer(writer, kind, flags, payload)
            if ends_stream(kind, flags):
                ended.add(stream)

    writer.write(HELLO)
    for stream in range(1, 2 * num_calls, 2):
        writer.write(frame(HEADERS, END_HEADERS, stream, headers) + more(stream))
    reading = asyncio.create_task(read_on())
    try:
        yield ended
    finally:
        await end_tasks(reading)
        writer.close()
