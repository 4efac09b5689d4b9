"""Signs archives, and checks signatures, with OpenSSF model signing: a Sigstore bundle by a P-256 key, offline.

Importing `model_signing` takes about half a second, so it happens where it is used.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrelay.archive.keys import public_half, public_keys
from torchrelay.archive.mar import REPACK, SIGNATURE
from torchrelay.config import write_file
from torchrelay.errors import ArchiveError


def sign(folder: Path, private_key: Path) -> Path:
    """Sign everything in `folder` into its model.sig, and return that file's path."""
    public_half(private_key)  # refuses a key that cannot or must not be used
    from model_signing import hashing, signing

    files = hashing.Config()  # type: ignore[no-untyped-call]
    files.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signer = signing.Config()  # type: ignore[no-untyped-call]
    signer.use_elliptic_key_signer(private_key=private_key).set_hashing_config(files)
    with tempfile.TemporaryDirectory() as aside:
        signer.sign(folder, Path(aside) / SIGNATURE)
        write_file(folder / SIGNATURE, (Path(aside) / SIGNATURE).read_bytes())
    return folder / SIGNATURE


def put_signature(folder: Path, signature: bytes) -> None:
    """Replace the archive's model.sig. Written beside the folder, which may hold nothing else."""
    descriptor, name = tempfile.mkstemp(prefix=".signature.", dir=folder.parent)
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(signature)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o644)
        aside.replace(folder / SIGNATURE)
    finally:
        aside.unlink(missing_ok=True)


def check_signature(folder: Path, public_key: Path) -> None:
    """An ArchiveError unless model.sig is by a key in `public_key`, over exactly the other files in `folder`.

    The file lists one key, or two while the one takes the place of the other.
    """
    if not public_key.is_file():
        raise ArchiveError(f"there is no public key {public_key}", "the key that archives are signed with", "make up")
    hint = _check_bundle(folder / SIGNATURE)
    with _the_one(public_key, hint) as key:
        _check_by(folder, key, public_key)


@contextmanager
def _the_one(public_key: Path, hint: str) -> Iterator[Path]:
    """A file with the key that the signature names, of several; which it then must really be by."""
    keys = public_keys(public_key.read_bytes())
    if len(keys) == 1:
        yield public_key
        return
    named = next((key for key in keys if hashlib.sha256(key).hexdigest() == hint), keys[0])
    with tempfile.NamedTemporaryFile(suffix=".pub") as aside:
        aside.write(named)
        aside.flush()
        yield Path(aside.name)


def _check_by(folder: Path, key: Path, listed: Path) -> None:
    """The same, for the one key in `key`; errors name the file that lists it."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    verifier = verifying.Config()  # type: ignore[no-untyped-call]
    try:
        verifier.use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, AttributeError) as error:
        raise ArchiveError(f"{listed} is not a P-256 public key: {error}", "a PEM file", "make up") from error
    try:
        verifier.verify(folder, folder / SIGNATURE)
    except (InvalidSignature, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        # What breaks inside the library on a malformed bundle is as much a refusal as what it refuses itself.
        raise ArchiveError(
            f"{folder} is not signed by {listed}: {str(error).strip() or 'the signature does not match'}",
            "a signature by that key over exactly these files",
            REPACK,
        ) from error


def _check_bundle(signature: Path) -> str:
    """The key that the signature names: the SHA-256 of its PEM, in hex.

    The file must be the very text that its meaning is written as: no spare bits, no room for anything else.
    """
    from sigstore_models.bundle.v1 import Bundle

    try:
        text = signature.read_text(encoding="utf-8")
        bundle = Bundle.from_json(text)
        key = bundle.verification_material.public_key
        hint = key.hint if key is not None else ""
        canonical = bundle.to_json() == text and bool(hint)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArchiveError(f"{signature} is not a signature: {error}", "a Sigstore bundle", REPACK) from error
    if not canonical:
        raise ArchiveError(f"{signature} has been altered", "a Sigstore bundle as it was written", REPACK)
    return hint or ""
