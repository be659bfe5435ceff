"""Hosts and addresses: which of them leave this machine.

Owns: that question. Must not know: what is sent there.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from services.common.errors import ConfigError

_PROTECTED = ("rediss", "rediss+sentinel", "unix")


def is_loopback(host: str) -> bool:
    """Whether what is sent to or accepted at `host` stays on this machine. A name other than localhost may not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """The host of HOST:PORT, [IPv6]:PORT or HOST."""
    host, _, port = address.rpartition(":")
    return (
        host.strip("[]") if host and port.isdigit() and not (":" in host and "[" not in host) else address.strip("[]")
    )


def is_local(address: str) -> bool:
    """Whether an address of the form HOST:PORT or unix:PATH stays on this machine."""
    return address.startswith("unix:") or is_loopback(host_of(address))


def is_protected_url(url: str) -> bool:
    """Whether a Redis URL asks for TLS or stays on this machine. Raises ConfigError for what is no URL."""
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may be a part of the password
        raise ConfigError("redis_url: not a URL of the form redis://, rediss:// or unix://") from None
    hosts = parts.netloc.rpartition("@")[2].split(",")  # Sentinels may be several
    local = all(is_loopback(host_of(host)) for host in hosts if host)
    return parts.scheme in _PROTECTED or local
