"""API keys: their text, their hashes, and the file that lists them.

Owns: how a key is made, stored and recognised. Must not know: requests, limits' enforcement, the command line.

    key     outrider-<key id, 12 hex digits>-<256 random bits, base64url>
    stored  the key id and SHA-256 of the whole key

A hash made slow on purpose (scrypt) protects secrets that people choose; nobody finds 256 random bits by trying, at any
speed, and a slow hash at every request would let anybody exhaust the server by sending wrong keys.

A file has owners by name; an owner has limits and one or more keys, so that a new key can be handed out before the old
one is removed. Sessions, caches and limits belong to the owner.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import ConfigError

log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile(r"outrider-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = "0" * 64
_VERSION = 1
_MAX_FILE_BYTES = 16 << 20
RESERVED_NAMES = ("anonymous",)
"""Owners that no key may have."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an owner may use of all coordinators together; 0: as much as there is."""

    requests_per_s: float = 0.0
    tokens_per_min: int = 0
    max_sessions: int = 0


@dataclass(frozen=True, slots=True)
class KeyHash:
    """A key as it is stored."""

    key_id: str
    sha256: str
    created: str


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """A client, or whoever shares its sessions."""

    name: str
    limits: Limits = Limits()
    keys: tuple[KeyHash, ...] = ()


class KeyRing:
    """All owners, by name."""

    def __init__(self, owners: Iterable[KeyOwner] = ()) -> None:
        self.owners = {owner.name: owner for owner in owners}
        self._by_id = {key.key_id: (owner, key.sha256) for owner in self.owners.values() for key in owner.keys}

    def owner_of(self, key: str) -> KeyOwner | None:
        """Whose key it is. The time that it takes tells nothing of the secret, nor whether the key's id is known."""
        match = _KEY.fullmatch(key)
        owner, stored = self._by_id.get(match[1] if match else "", (None, _NO_DIGEST))
        return owner if hmac.compare_digest(digest_of(key), stored) else None


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(created: str) -> tuple[str, KeyHash]:
    """A key, which is shown once and kept nowhere, and what is stored of it."""
    key_id = secrets.token_hex(6)
    key = f"outrider-{key_id}-{secrets.token_urlsafe(32)}"
    return key, KeyHash(key_id, digest_of(key), created)


def check_name(name: str) -> None:
    """Raises ConfigError for what cannot be an owner's name."""
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"name: {name!r} must have at most 64 of a-z, 0-9, dot, dash and underscore, and not be "
            f"{' or '.join(RESERVED_NAMES)}"
        )


def read_ring(path: Path) -> KeyRing:
    """Raises ConfigError, which names the file and what is wrong but quotes nothing that could be a key."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"api_keys_file: {path}: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"api_keys_file: {path} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        document = json.loads(data)
        if document["version"] != _VERSION:
            raise ConfigError(f"api_keys_file: {path} is of version {document['version']}, not {_VERSION}")
        owners = [_owner(name, fields) for name, fields in document["owners"].items()]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ConfigError(f"api_keys_file: {path} is not a file of `outrider keys`") from None
    ids = [key.key_id for owner in owners for key in owner.keys]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"api_keys_file: {path} has a key id twice")
    return KeyRing(owners)


def write_ring(path: Path, ring: KeyRing) -> None:
    """Replaces the file at once, readable by its owner only. Raises OSError."""
    owners = {
        owner.name: dataclasses.asdict(owner.limits) | {"keys": [dataclasses.asdict(key) for key in owner.keys]}
        for owner in ring.owners.values()
    }
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"version": _VERSION, "owners": owners}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _owner(name: str, fields: Mapping[str, Any]) -> KeyOwner:
    check_name(name)
    keys = tuple(KeyHash(str(key["key_id"]), str(key["sha256"]), str(key["created"])) for key in fields["keys"])
    if not all(_DIGEST.fullmatch(key.sha256) for key in keys):
        raise ValueError
    limits = Limits(float(fields["requests_per_s"]), int(fields["tokens_per_min"]), int(fields["max_sessions"]))
    check_limits(limits)
    return KeyOwner(name, limits, keys)


def check_limits(limits: Limits) -> None:
    """Raises ConfigError naming the limit that is out of range."""
    for field in dataclasses.fields(limits):
        if not 0 <= (value := getattr(limits, field.name)) <= 1e12:
            raise ConfigError(f"{field.name}: {value} is not between 0 and 1e12")


class KeyFile:
    """The ring in a file, read again when the file changes. One event loop or thread.

    A changed file that cannot be read or understood is left aside, with a warning: the keys known so far stay valid.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._state = self._fingerprint()
        self._ring = read_ring(path)

    def current(self) -> KeyRing:
        state = self._fingerprint()
        if state != self._state:
            self._state = state
            try:
                self._ring = read_ring(self._path)
                log.info("%s: %d owners of API keys", self._path, len(self._ring.owners))
            except ConfigError as error:
                log.warning("changed API keys are not taken over: %s", error)
        return self._ring

    def _fingerprint(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
