"""Certificates for tests: an authority, and files as services are given them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from services.client import Access


@dataclass(frozen=True, slots=True)
class Files:
    """Paths of a certificate, its key and the authorities that its holder trusts."""

    cert: str
    key: str
    ca: str

    @property
    def settings(self) -> dict[str, str]:
        """For a service."""
        return {"tls_cert": self.cert, "tls_key": self.key, "tls_ca": self.ca}

    @property
    def access(self) -> Access:
        """For a client."""
        return Access(tls_ca=self.ca, tls_cert=self.cert, tls_key=self.key)


def write(path: Path, data: bytes) -> None:
    """Replaces a file at once, as a mounted secret is."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    temporary.replace(path)


def authorities(*cas: trustme.CA) -> bytes:
    return b"".join(ca.cert_pem.bytes() for ca in cas)


def write_leaf(directory: Path, leaf: trustme.LeafCert) -> None:
    """Key first: between the two, the pair does not fit, as it may be seen for a moment anywhere."""
    write(directory / "tls.key", leaf.private_key_pem.bytes())
    write(directory / "tls.crt", b"".join(pem.bytes() for pem in leaf.cert_chain_pems))


def files(directory: Path, leaf: trustme.LeafCert, *trusted: trustme.CA) -> Files:
    """Writes the three files of one peer."""
    directory.mkdir(parents=True, exist_ok=True)
    write_leaf(directory, leaf)
    write(directory / "ca.crt", authorities(*trusted))
    return Files(str(directory / "tls.crt"), str(directory / "tls.key"), str(directory / "ca.crt"))


def expired(ca: trustme.CA, name: str) -> trustme.LeafCert:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    return ca.issue_cert(name, not_before=yesterday - datetime.timedelta(days=9), not_after=yesterday)


def uri_files(directory: Path, ca: trustme.CA, uri: str) -> Files:
    """A certificate whose only name is a URI, as SPIFFE's are, written with its key."""
    issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    issuer_key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
        .sign(issuer_key, hashes.SHA256())  # type: ignore[arg-type]
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "tls.key").write_bytes(key.private_bytes(*pem))
    (directory / "ca.crt").write_bytes(ca.cert_pem.bytes())
    return Files(str(directory / "tls.crt"), str(directory / "tls.key"), str(directory / "ca.crt"))
