"""The signing key of a perimeter: made at first use, outside the checkout; `rotation` replaces it.

signing.pub holds the public half of signing.pem, and during a rotation a second key that is trusted as well.
"""

import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torchrelay.config import write_file
from torchrelay.errors import ArchiveError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


PRIVATE = "signing.pem"
PUBLIC = "signing.pub"
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----\n.*?-----END PUBLIC KEY-----\n", re.DOTALL)


class KeyPair(NamedTuple):
    """Where the two halves of a P-256 key lie, in PEM."""

    private: Path
    public: Path


def ensure_key(folder: Path) -> KeyPair:
    """The key pair in `folder` (signing.pem, signing.pub), made if there is none.

    The public file may list other keys as well, which are trusted while this one takes the place of another.

    Of several processes that come first at the same time, one makes the key and all use it. Raises ArchiveError
    when others could read the private key, or when the two halves do not belong together.
    """
    keys = KeyPair(folder / PRIVATE, folder / PUBLIC)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not keys.private.exists():
        make_key(keys.private)
    expected = public_half(keys.private)
    if not keys.public.exists():
        write_file(keys.public, expected)
    if expected not in public_keys(keys.public.read_bytes()):
        raise ArchiveError(
            f"{keys.public} does not belong to {keys.private}",
            "the public half of the private key",
            f"rm {keys.public}, then run the command again: it is derived anew",
        )
    return keys


def key_digest(folder: Path) -> str:
    """A hash of the public key in `folder`, "none" where there is none yet; archives are redone when it changes."""
    public = folder / PUBLIC
    if not public.is_file():
        return "none"
    return hashlib.sha256(public_keys(public.read_bytes())[0]).hexdigest()[:16]


def public_keys(content: bytes) -> list[bytes]:
    """The keys that a signing.pub lists, each in PEM, its own first; whatever else it holds is one key, and no good."""
    found: list[bytes] = _PEM.findall(content)
    return found if found and b"".join(found) == content else [content]


def public_half(private: Path) -> bytes:
    """The public key in PEM that belongs to `private`.

    Raises ArchiveError when that is no P-256 key, or when anyone but its owner may read or replace it.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    _refuse_shared(private)
    try:
        key = serialization.load_pem_private_key(private.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise _unusable(private, f"is not a private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _unusable(private, "is a key of another kind")
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _unusable(private: Path, what: str) -> ArchiveError:
    return ArchiveError(f"{private} {what}", "a P-256 key in PEM, without a password", f"restore {private}")


def _refuse_shared(private: Path) -> None:
    if not private.is_file():
        raise ArchiveError(f"there is no private key {private}", "a P-256 key in PEM", "make deploy-dev makes one")
    if (mode := stat.S_IMODE(private.stat().st_mode)) & 0o077:
        raise ArchiveError(f"{private} has mode {mode:04o}", "mode 0600: its owner alone", f"chmod 600 {private}")
    if (mode := stat.S_IMODE(private.parent.stat().st_mode)) & 0o022:
        raise ArchiveError(f"{private.parent} has mode {mode:04o}", "mode 0700", f"chmod 700 {private.parent}")


def make_key(private: Path) -> None:
    """Make the private key `private`, unless somebody else makes it first.

    Written whole under another name, then linked: the link fails if somebody else was first.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    descriptor, name = tempfile.mkstemp(prefix=".signing.", dir=private.parent)  # O_EXCL, mode 0600
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_private_pem(ec.generate_private_key(ec.SECP256R1())))
            file.flush()
            os.fsync(file.fileno())
        _link(aside, private)
    finally:
        aside.unlink()


def _link(aside: Path, private: Path) -> None:
    try:
        private.hardlink_to(aside)
    except FileExistsError:
        return  # another process was first; its key counts


def _private_pem(key: "EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
