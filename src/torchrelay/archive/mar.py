"""The .mar: a zip whose bytes depend on nothing but its content, and the checks that any .mar must pass.

TorchServe unpacks by the zip's local headers, Python by its central directory. A zip that says one thing to one
and another thing to the other could smuggle code past a check, so only the exact bytes that `write` would
produce for the same members are accepted.
"""

import hashlib
import json
import re
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from torchrelay.errors import ArchiveError
from torchrelay.handover import GoldenSet

MAR = "model.mar"
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
FILES = (MAR, MANIFEST, SIGNATURE)

TORCHSERVE_MANIFEST = "MAR-INF/MANIFEST.json"
BASE_HANDLER = "torchrelay_handler.py"
WEIGHTS = "model.safetensors"
GOLDEN = "golden.json"
RELEASE = "release.json"
REQUIRED = frozenset({TORCHSERVE_MANIFEST, BASE_HANDLER, "handler.py", "model.py", WEIGHTS, GOLDEN, RELEASE})

MAX_MEMBERS = 128
MAX_BYTES = 8 * 2**30
MAX_RATIO = 1.0
"""Bytes of content per byte of archive: members are stored, so there can never be more content than archive."""
MAX_JSON_BYTES = 64 * 2**20
REPACK = "package the version again: make deploy-dev"

_MODULE = re.compile(r"[A-Za-z_]\w*\.py", re.ASCII)
_MEMORY = 64 * 2**20
_BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OverflowError, EOFError, OSError)
_BROKEN_ZIP = (*_BROKEN, struct.error, zipfile.LargeZipFile)


@dataclass(frozen=True)
class Member:
    """One file of a .mar: how many bytes it has, and how to read them."""

    size: int
    open: Callable[[], IO[bytes]]

    @classmethod
    def of(cls, content: bytes) -> "Member":
        """A member from memory."""
        return cls(len(content), partial(BytesIO, content))

    @classmethod
    def at(cls, path: Path) -> "Member":
        """A member from a file, whose time, owner and mode do not matter."""
        return cls(path.stat().st_size, lambda: path.open("rb"))


def write(file: IO[bytes], members: Mapping[str, Member]) -> None:
    """Write `members` as a zip into the seekable `file`: the same names and bytes give the same zip, anywhere."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            member = members[name]
            with archive.open(_entry(name, member.size), "w") as sink, member.open() as source:
                shutil.copyfileobj(source, sink, 2**20)


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(mar: Path) -> None:
    """Refuse a .mar that is damaged, tries to write elsewhere, is a bomb, or is not laid out as `write` does."""
    with _opened(mar) as archive:
        entries = archive.infolist()
        _check_names(mar, [entry.filename for entry in entries])
        _check_entries(mar, entries)
        _check_sizes(mar, entries)
        _check_canonical(mar, archive)
        _check_weights(mar, archive)


def unpack(mar: Path, target: Path) -> None:
    """Check `mar` and unpack it into the new folder `target`; nothing is written outside it."""
    check(mar)
    try:
        target.mkdir(parents=True)
    except FileExistsError as error:
        raise ArchiveError(f"{target} exists already", "a new folder to unpack into", f"rm -r {target}") from error
    with _opened(mar) as archive:
        archive.extractall(target)


def read(mar: Path, name: str) -> bytes:
    """The bytes of one small member, such as `release.json`."""
    with _opened(mar) as archive:
        if name not in archive.namelist():
            raise ArchiveError(f"{mar} has no {name}", f"{name} inside the archive", REPACK)
        if archive.getinfo(name).file_size > MAX_JSON_BYTES:
            raise ArchiveError(f"{name} in {mar} is too large", f"at most {MAX_JSON_BYTES} bytes", REPACK)
        return archive.read(name)


def golden_set(mar: Path) -> GoldenSet:
    """The golden inputs and outputs that travel inside the archive."""
    try:
        return GoldenSet.model_validate_json(read(mar, GOLDEN))
    except ValidationError as error:
        raise ArchiveError(f"{GOLDEN} in {mar}: {error}", "instances, predictions and a tolerance", REPACK) from error


def check_weights_header(origin: str, size: int, file: IO[bytes]) -> None:
    """Refuse weights that are not in the safetensors format (a pickle could run code when it is loaded)."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    try:
        header = json.loads(file.read(length)) if 8 + length <= size and length <= MAX_JSON_BYTES else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ArchiveError(f"{origin} is not in the safetensors format", "weights saved by safetensors", REPACK)


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.file_size = size
    return entry


@contextmanager
def _opened(mar: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(mar) as archive:
            yield archive
    except FileNotFoundError as error:
        raise ArchiveError(f"{mar} does not exist", "a model archive", REPACK) from error
    except _BROKEN_ZIP as error:
        raise ArchiveError(f"{mar} is damaged: {error}", "a whole zip file", REPACK) from error


def _check_names(mar: Path, names: list[str]) -> None:
    if len(names) > MAX_MEMBERS:
        raise ArchiveError(f"{mar} has {len(names)} members", f"at most {MAX_MEMBERS}", REPACK)
    if len(set(names)) != len(names):
        raise ArchiveError(f"{mar} names a member twice", "every name once", REPACK)
    if missing := sorted(REQUIRED - set(names)):
        raise ArchiveError(f"{mar} lacks {', '.join(missing)}", f"all of {', '.join(sorted(REQUIRED))}", REPACK)
    if odd := [name for name in names if name not in REQUIRED and not _MODULE.fullmatch(name)]:
        raise ArchiveError(
            f"{mar} holds {', '.join(map(repr, odd[:5]))}",
            "Python modules at the top level beside what every archive has; no folders, no absolute or upward paths",
            REPACK,
        )


def _check_entries(mar: Path, entries: list[zipfile.ZipInfo]) -> None:
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind != stat.S_IFREG:
            what = "a symbolic link" if kind == stat.S_IFLNK else "not a regular file"
            raise ArchiveError(f"{entry.filename} in {mar} is {what}", "regular files only", REPACK)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ArchiveError(f"{entry.filename} in {mar} is compressed or encrypted", "stored members", REPACK)


def _check_sizes(mar: Path, entries: list[zipfile.ZipInfo]) -> None:
    total = sum(entry.file_size for entry in entries)
    limit = min(MAX_BYTES, int(mar.stat().st_size * MAX_RATIO))
    if total > limit:
        raise ArchiveError(f"{mar} would unpack to {total} bytes", f"at most {limit}, as it is not compressed", REPACK)


def _check_canonical(mar: Path, archive: zipfile.ZipFile) -> None:
    """Reading every member for the rebuilt copy checks its CRC on the way."""
    members = {e.filename: Member(e.file_size, partial(archive.open, e)) for e in archive.infolist()}
    with tempfile.SpooledTemporaryFile(max_size=_MEMORY) as rebuilt, mar.open("rb") as original:
        write(rebuilt, members)
        rebuilt.seek(0)
        while chunk := original.read(2**20):
            if chunk != rebuilt.read(len(chunk)):
                break
        else:
            if not rebuilt.read(1):
                return
    raise ArchiveError(f"{mar} is not laid out as its content says", "the exact bytes of a packed archive", REPACK)


def _check_weights(mar: Path, archive: zipfile.ZipFile) -> None:
    with archive.open(WEIGHTS) as file:
        check_weights_header(f"{WEIGHTS} in {mar}", archive.getinfo(WEIGHTS).file_size, file)
