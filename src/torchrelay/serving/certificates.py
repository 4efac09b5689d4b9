"""What stands in certificate files: until when, for which names."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from torchrelay.errors import ConfigError

RENEW_DAYS = 30


@dataclass(frozen=True)
class Certificate:
    """The first certificate of a PEM file."""

    path: Path
    ends: datetime
    names: frozenset[str]

    def ends_within(self, days: float) -> bool:
        """Whether it is over by then; one that is over already is."""
        return self.ends < datetime.now(UTC) + timedelta(days=days)

    def uncovered(self, names: tuple[str, ...]) -> list[str]:
        """Those of the names that a caller would not believe it."""
        return [name for name in names if not self._covers(_plain(name))]

    def _covers(self, name: str) -> bool:
        """A wildcard stands for exactly one label."""
        return name in self.names or f"*.{name.partition('.')[2]}" in self.names


def read_certificate(path: Path) -> Certificate:
    """Read the first certificate of a file; ConfigError where there is none."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificate: {error}", "a certificate (PEM)", "make up") from error
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Certificate(path, found.not_valid_after_utc, frozenset())
    every = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return Certificate(path, found.not_valid_after_utc, frozenset(map(_plain, every)))


def _plain(name: str) -> str:
    """One spelling of a name: an IPv6 address has several, and case does not count."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()
