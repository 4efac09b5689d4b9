"""A CA of a test's own, what it signs, and callers who go by it."""

import http.client
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

SERVER, CLIENT = Usage.SERVER_AUTH, Usage.CLIENT_AUTH


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Signs what it is asked to; `certificate` is what callers trust."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.certificate = folder / f"{name}.crt"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        built = self._builder(self._name, self._key, 3650)
        built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self._own = built.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self.certificate.write_bytes(self._own.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, name: str, names: tuple[str, ...] = (), days: float = 90, usage: x509.ObjectIdentifier = SERVER
    ) -> Pair:
        """A new key and its certificate; both replace what stood there, the key first."""
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"a {name}")])
        built = self._builder(subject, key, days).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            built = built.add_extension(x509.SubjectAlternativeName([_general(one) for one in names]), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        signed = built.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        replace(pair.key, private)
        replace(pair.certificate, signed.public_bytes(serialization.Encoding.PEM))
        return pair

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: float) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        built = x509.CertificateBuilder(issuer_name=self._name, subject_name=subject, public_key=key.public_key())
        built = built.serial_number(x509.random_serial_number())
        built = built.not_valid_before(now - timedelta(days=100)).not_valid_after(now + timedelta(days=days))
        return built.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def replace(path: Path, content: bytes) -> None:
    """Write aside and rename, as Ansible does."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_bytes(content)
    aside.chmod(0o600)
    aside.replace(path)


def trusting(authority: Path, client: Pair | None = None) -> ssl.SSLContext:
    """A caller who believes this CA alone, as strictly as OpenSSL can, and shows a certificate if it has one."""
    context = ssl.create_default_context(cafile=authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if client:
        context.load_cert_chain(client.certificate, client.key)
    return context


def https(port: int, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    """A connection to this port of loopback, not open yet."""
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)


def shown(port: int, context: ssl.SSLContext, name: str = "127.0.0.1") -> str:
    """The certificate that a new caller under this name is shown and believes."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")
