"""The identity of a vocabulary: equal token-to-id maps, padding rows ignored; and what its tokens stand for.

Owns: the digest that coordinator, draft and target compare, and the alphabet of byte-level BPE. Must not know: any
tokenizer library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def vocab_digest(token_to_id: Mapping[str, int]) -> str:
    """SHA-256 in hexadecimal over the (id, token) pairs in order of id."""
    digest = hashlib.sha256()
    for token, token_id in sorted(token_to_id.items(), key=lambda pair: (pair[1], pair[0])):
        data = token.encode("utf-8", "surrogatepass")
        digest.update(token_id.to_bytes(4, "little") + len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()


SIMULATED_EOS = 256
"""The end-of-sequence token of the simulated vocabulary."""


def simulated_vocab() -> dict[str, int]:
    """The vocabulary of simulated workers and of the tokenizer `simulated`: one token a byte, then `<eos>`."""
    return {**{f"<0x{byte:02X}>": byte for byte in range(256)}, "<eos>": SIMULATED_EOS}


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character (Radford et al. 2019, GPT-2): its inverse."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of byte-level BPE stands for; a token outside the alphabet stands for itself."""
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()
