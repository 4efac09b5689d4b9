"""Decides whether an archive may come in. The signature is first: nothing unsigned is parsed further."""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from torchrelay.archive import mar
from torchrelay.archive.packing import torchserve_manifest
from torchrelay.archive.signing import check_signature
from torchrelay.config import Frozen
from torchrelay.errors import ArchiveError
from torchrelay.handover import Manifest

_LIMITS = {mar.MAR: mar.MAX_BYTES, mar.MANIFEST: 2**16, mar.SIGNATURE: 2**20}


class _Release(Frozen):
    """`release.json` inside the .mar."""

    component: str
    version: str
    environment: str
    run_id: str


def verify(folder: Path, public_key: Path, digest: str | None = None) -> Manifest:
    """The manifest of the archive in `folder`, once everything about it has been checked.

    `digest` is the sha256 of model.mar that the caller expects. Raises ArchiveError for a wrong signature, another
    digest, an unsafe or damaged .mar, or a .mar that is not the one its manifest tells of.
    """
    _check_files(folder)
    check_signature(folder, public_key)
    manifest = _manifest(folder / mar.MANIFEST)
    _check_digest(folder / mar.MAR, manifest, digest)
    mar.check(folder / mar.MAR)
    _check_agreement(folder / mar.MAR, manifest)
    return manifest


def _check_files(folder: Path) -> None:
    found = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    if set(found) != set(mar.FILES):
        names = ", ".join(sorted(found)) or "nothing"
        raise ArchiveError(f"{folder} holds {names}", f"exactly {', '.join(mar.FILES)}", mar.REPACK)
    for name, path in found.items():
        if path.is_symlink() or not path.is_file():
            raise ArchiveError(f"{path} is not a regular file", "regular files", mar.REPACK)
        if (size := path.stat().st_size) > _LIMITS[name]:
            raise ArchiveError(f"{path} has {size} bytes", f"at most {_LIMITS[name]}", mar.REPACK)


def _manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArchiveError(f"{path} is not a manifest: {error}", "the manifest of an archive", mar.REPACK) from error


def _check_digest(path: Path, manifest: Manifest, wanted: str | None) -> None:
    found = mar.digest(path)
    if found != manifest.digest:
        raise ArchiveError(f"{path} has the digest {found}", f"{manifest.digest}, as its manifest says", mar.REPACK)
    if wanted not in (None, found):
        raise ArchiveError(
            f"{path} is {manifest.component} version {manifest.version} with the digest {found}",
            f"the archive with the digest {wanted}",
            mar.REPACK,
        )


def _check_agreement(path: Path, manifest: Manifest) -> None:
    """The .mar must be what the manifest tells of, so that no archive passes for another."""
    _check_same(path, mar.RELEASE, _release(path), _Release(**manifest.model_dump(include=set(_Release.model_fields))))
    _check_same(path, mar.GOLDEN, hashlib.sha256(mar.read(path, mar.GOLDEN)).hexdigest(), manifest.golden)
    expected = torchserve_manifest(manifest.component, manifest.version)
    _check_same(path, mar.TORCHSERVE_MANIFEST, mar.read(path, mar.TORCHSERVE_MANIFEST), expected)


def _check_same(path: Path, name: str, found: object, expected: object) -> None:
    if found != expected:
        raise ArchiveError(f"{name} in {path} says {found}", f"{expected}, as its manifest says", mar.REPACK)


def _release(path: Path) -> _Release:
    try:
        return _Release.model_validate_json(mar.read(path, mar.RELEASE))
    except ValidationError as error:
        raise ArchiveError(f"{mar.RELEASE} in {path}: {error}", "a release", mar.REPACK) from error
