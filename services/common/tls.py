"""gRPC credentials made of TLS files.

Owns: when each side takes over changed files: a server at every handshake, a channel never.
Must not know: services, roles, which peer may call what.
"""

from __future__ import annotations

import grpc

from services.common.errors import ConfigError
from services.common.tls_files import TlsFiles, TlsMaterial


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """A server's, with the newest certificate at every handshake. Where `files` has a CA, clients need a certificate
    that it vouches for. Raises ConfigError without a certificate."""
    material, version = files.current()
    if material.cert is None:
        raise ConfigError("tls_cert: a server needs a certificate and its key")

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal version
        newest, newest_version = files.current()
        if newest_version == version:
            return None
        version = newest_version
        return _server_configuration(newest)

    return grpc.dynamic_ssl_server_credentials(
        _server_configuration(material),
        fetch,  # type: ignore[arg-type]  # None is allowed, and means no change
        require_client_authentication=files.has_ca,
    )


def _server_configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key or b"", material.cert or b"")], material.ca)


def channel_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """A client's, as the files are now: a channel keeps what it was made with."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.cert)
