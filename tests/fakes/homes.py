"""Sessions whose home is the address that a test wants."""

from __future__ import annotations

import uuid

from services.client.connections import home_of


def session_at(place: int, num_addresses: int = 2) -> str:
    """A new session's id."""
    while home_of(session_id := str(uuid.uuid4()), num_addresses) != place:
        pass
    return session_id
