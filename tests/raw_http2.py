"""HTTP/2 written by hand, for peers that behave as no library does.

Owns: frames and a gRPC call's headers, as RFC 9113 and RFC 7541 lay them out. Must not know: gRPC's library.
"""

from __future__ import annotations

import asyncio
import ssl
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


HELLO = PREFACE + frame(SETTINGS, 0, 0)


def call_headers(path: str) -> bytes:
    """The header block of a call in plaintext, in literals without indexing: nothing has to be remembered."""
    literals = [(b"\x04", path), (b"\x01", "localhost"), (b"\x0f\x10", "application/grpc")]
    block = b"\x83\x86" + b"".join(head + bytes([len(text)]) + text.encode() for head, text in literals)
    return block + b"\x00\x02te\x08trailers"


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
            received = b""
            while part := await reader.read(65_536):
                received += part
                while answers_pings and len(received) >= (size := 9 + int.from_bytes(received[:3], "big")):
                    kind, flags, payload, received = received[3], received[4], received[9:size], received[size:]
                    if kind in (SETTINGS, PING) and not flags & ACK:
                        writer.write(frame(kind, ACK, 0, payload if kind == PING else b""))
    except ConnectionError:
        pass
    finally:
        writer.close()
    return loop.time() - started
