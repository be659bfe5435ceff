"""The identity of a vocabulary: equal token-to-id maps, padding rows ignored.

Owns: the digest that coordinator, draft and target compare. Must not know: any tokenizer library.
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
