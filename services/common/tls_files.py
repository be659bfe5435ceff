"""TLS files, read again when they change.

Owns: when a file's content is taken over. Must not know: gRPC (services.common.tls makes its credentials), services.
Invariant: what is in use is always a whole: a certificate with its own key, and readable authorities. A half-written
change is left aside until it is one.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass

from services.common.errors import ConfigError

log = logging.getLogger(__name__)
SYSTEM = "system"
"""In the place of a CA file: the certificate authorities that gRPC brings along."""


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """PEM data; None where no file was named."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


class TlsFiles:
    """A certificate chain, its key and the authorities to trust, each optional. Safe for use by several threads."""

    def __init__(self, cert: str = "", key: str = "", ca: str = "") -> None:
        """Raises ConfigError naming the file that is missing, unreadable or does not fit the others."""
        if bool(cert) != bool(key):
            raise ConfigError(f"tls_{'key' if cert else 'cert'}: a certificate and its key are only of use together")
        self._cert, self._key = cert, key
        self._ca = "" if ca == SYSTEM else ca
        self._lock = threading.Lock()
        self._version = 1
        self._complained: object = None
        self._state = self._fingerprint()
        self._material = self._load()

    @property
    def has_ca(self) -> bool:
        return bool(self._ca)

    @property
    def version(self) -> int:
        """Grows with every change that was taken over. Looks at the files."""
        return self.current()[1]

    def current(self) -> tuple[TlsMaterial, int]:
        """The newest material that is a whole, and its version."""
        with self._lock:
            self._refresh()
            return self._material, self._version

    def _refresh(self) -> None:
        state: object = None
        try:
            state = self._fingerprint()
            if state == self._state:
                return
            material = self._load()
            if self._fingerprint() != state:
                return  # changed while it was read; the next look will see
        except ConfigError as error:
            if state != self._complained or state is None:
                log.warning("changed TLS files are not taken over: %s", error)
            self._complained = state
            return
        self._state, self._material, self._version = state, material, self._version + 1
        log.info("changed TLS files are taken over")

    def _fingerprint(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_stat(path) for path in (self._cert, self._key, self._ca) if path)

    def _load(self) -> TlsMaterial:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca = _read(self._ca)
        if ca is not None:
            try:
                context.load_verify_locations(cadata=ca.decode("ascii", "replace"))
            except (ssl.SSLError, ValueError):
                raise ConfigError(f"tls_ca: {self._ca} holds no certificates in PEM form") from None
        cert, key = _read(self._cert), _read(self._key)
        if cert is not None:
            try:
                context.load_cert_chain(self._cert, self._key, password="")  # never ask on the terminal
            except (ssl.SSLError, ValueError, OSError):
                raise ConfigError(f"tls_key: {self._key} is no key of the certificate in {self._cert}") from None
        return TlsMaterial(cert, key, ca)


def _stat(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: str) -> bytes | None:
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
