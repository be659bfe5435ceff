"""The settings of where a service listens, and how securely. Shared by all services.

Owns: their names and defaults, and the rule that plaintext leaves this machine only where that was asked for.
Must not know: what a service does.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.addresses import is_loopback
from services.common.config import setting
from services.common.errors import ConfigError
from services.common.tls_files import TlsFiles

AUTO = "auto"
DEFAULT_PROBE_PORT = 8081


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """Settings that every service has. `check_security` raises ConfigError for what is contradictory."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    tls_cert: str = setting("", "This service's certificate chain (PEM file); read again when it changes.")
    tls_key: str = setting("", "The certificate's private key (PEM file).")
    tls_ca: str = setting("", "Certificate authorities that vouch for the other services (PEM file).")
    insecure: bool = setting(False, "Allow plaintext on other than loopback addresses.")
    probe_port: str = setting(
        AUTO, "Port of the health service in plaintext; auto: 8081, on a loopback host none; 0 takes a free one."
    )
    max_connections: int = setting(1000, "Most connections at once; further ones are closed.")

    @property
    def has_tls(self) -> bool:
        return bool(self.tls_cert)

    @property
    def probe_port_number(self) -> int | None:
        """None: no probe is served."""
        if self.probe_port == AUTO:
            return None if is_loopback(self.host) else DEFAULT_PROBE_PORT
        return int(self.probe_port)

    def check_security(self) -> None:
        """Raises ConfigError. Reads no files."""
        if self.probe_port != AUTO and not (self.probe_port.isdecimal() and int(self.probe_port) <= 65_535):
            raise ConfigError(f"probe_port: {self.probe_port!r} is neither a port nor {AUTO}")
        if not 1 <= self.max_connections <= 1_000_000:
            raise ConfigError(f"max_connections: {self.max_connections} is not between 1 and 1000000")
        given = [bool(self.tls_cert), bool(self.tls_key), bool(self.tls_ca)]
        if any(given) and not all(given):
            missing = ("tls_cert", "tls_key", "tls_ca")[given.index(False)]
            raise ConfigError(f"{missing}: TLS needs tls_cert, tls_key and tls_ca together")
        if not self.has_tls and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"host: {self.host} can be reached from other machines: give tls_cert, tls_key and tls_ca, or "
                "--insecure to serve in plaintext"
            )

    def load_tls(self) -> TlsFiles | None:
        """The files, checked; None without TLS. Raises ConfigError."""
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca) if self.has_tls else None
