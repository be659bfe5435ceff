"""How a client proves who it is, and whom it trusts.

Owns: those values and their rules. Must not know: channels, calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.common.addresses import is_local
from services.common.errors import ConfigError
from services.common.tls_files import TlsFiles


@dataclass(frozen=True, slots=True)
class Access:
    """TLS where `tls_ca` is given: a PEM file, or `system` for the well-known authorities; with `tls_cert` and
    `tls_key` the client shows a certificate of its own. All files are read again when they change."""

    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    api_key: str = field(default="", repr=False)
    insecure: bool = False
    """Whether the API key may be sent to other machines in plaintext."""

    def load_tls(self) -> TlsFiles | None:
        """None without TLS. Raises ConfigError."""
        if not self.tls_ca:
            if self.tls_cert or self.tls_key:
                raise ConfigError("tls_ca: a client certificate needs it; `system` takes the well-known authorities")
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca)

    def metadata(self, addresses: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """What goes along with every call. Raises ConfigError where that must not go to one of `addresses`."""
        if not self.api_key:
            return ()
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("api_key: it must be printable ASCII text")
        remote = next((address for address in addresses if not is_local(address)), None)
        if remote and not self.tls_ca and not self.insecure:
            raise ConfigError(f"tls_ca: the API key would go to {remote} in plaintext; give it, or --insecure")
        return (("authorization", f"Bearer {self.api_key}"),)
