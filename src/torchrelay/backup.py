"""Files that are kept a second time: artifacts that lie in a local folder, and private keys, encrypted.

Artifacts never change once they are written, so a copy is made of what the backup lacks, and nothing is ever deleted
there. Keys leave the machine as one archive in the age format, for a recipient whose private half is elsewhere.
"""

import hashlib
import io
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from torchrelay.config import BackupPlan, Frozen, Settings, write_file
from torchrelay.errors import ConfigError, StorageError
from torchrelay.registry import identity, names, transactions, unsent
from torchrelay.storage import Store, is_bucket, open_store

ARTIFACTS = "artifacts"
KEYS = "keys"
_ENDING = ".tar.age"
_PART = ".torchrelay-part"
_LATE_S = 15.0


class Copied(Frozen):
    """What one round did."""

    artifacts: int = Field(0, description="How many files were copied.")
    keys: str | None = Field(None, description="Name of the new archive of keys, where they had changed.")


def back_up(plan: BackupPlan, state: Path) -> Copied:
    """Copy what the backup lacks. `state` is a folder for what was seen last."""
    copied = _copy_artifacts(plan) if plan.artifacts else 0
    return Copied(artifacts=copied, keys=_back_up_keys(plan, state / "keys.seen"))


# What there is


class Status(Frozen):
    """One kind of thing, and how much of it is in the backup."""

    name: str
    ok: bool
    found: str
    next_command: str = ""


def status(here: Settings, database: Path, supervised: bool, running: bool) -> list[Status]:
    """Registry, artifacts and keys. `supervised`: whether the site is up; `running`: whether Litestream is."""
    if here.backups is None:
        said = "none are made: neither `bucket` nor `backup.folder` is set"
        return [Status(name="backups", ok=True, found=said, next_command="docs/runbooks/backups.md")]
    registry = _registry_status(here.backups, database, supervised, running)
    return [registry, _artifacts_status(here, here.backups), _keys_status(here, here.backups)]


def _registry_status(place: str, database: Path, supervised: bool, running: bool) -> Status:
    replica = identity(database)
    if replica is None:
        there = names(place)
        what = "has no name" if database.is_file() else "is not there"
        found = f"{database} {what}; {place} holds {', '.join(there) or 'no registry'}"
        return Status(name="registry", ok=not there, found=found, next_command="make restore" if there else "make up")
    held = transactions(database, place, replica)
    behind = unsent(database, held.last if held else None)
    where = f"{place}/{replica.path}"
    if held is None:
        found = f"nothing in {where} yet"
    else:
        late = f"; {len(behind)} transactions are not there yet" if behind else ""
        found = f"up to transaction {held.last}, of {held.at:%F %T} UTC, in {where}{late}"
    down = supervised and not running
    stuck = bool(behind) and time.time() - min(behind) > _LATE_S
    ok = held is not None and not down and not (stuck and supervised)
    found += "; Litestream does not run" if down else ""
    return Status(name="registry", ok=ok, found=found, next_command="make up, then read the log registry-backup.log")


def _artifacts_status(here: Settings, place: str) -> Status:
    if is_bucket(here.artifacts):
        return Status(name="artifacts", ok=True, found=f"kept in {here.artifacts}, and nowhere else")
    source, target = Path(here.artifacts), Path(place) / ARTIFACTS
    missing = list(missing_files(source, target))
    late = [path for path in missing if time.time() - (source / path).stat().st_mtime > _LATE_S]
    found = f"{len(missing)} files are not in {target} yet" if missing else f"all in {target}"
    return Status(name="artifacts", ok=not late, found=found, next_command="make up, then read the log backup.log")


def _keys_status(here: Settings, place: str) -> Status:
    archives = key_archives(open_store(place))
    if here.backup.recipient is None:
        found = f"left out: backup.recipient is not set (old archives: {len(archives)})"
        return Status(name="keys", ok=True, found=found, next_command="make recovery-key FILE=<on another machine>")
    found = f"{archives[-1]} in {place}" if archives else f"none in {place} yet"
    return Status(name="keys", ok=bool(archives), found=found, next_command="make up, then read the log backup.log")


# Artifacts


def missing_files(source: Path, target: Path) -> Iterator[Path]:
    """Files below `source` that are not as large and as old below `target`, as paths relative to either."""
    for folder, _, files in os.walk(source):
        for name in files:
            path = Path(folder) / name
            relative = path.relative_to(source)
            if not name.endswith(_PART) and _differs(path, target / relative):
                yield relative


def restore_artifacts(place: str, target: Path) -> int:
    """Copy back what `target` lacks; how many files. What is there stays as it is."""
    source = Path(place) / ARTIFACTS
    lost = [relative for relative in missing_files(source, target) if not (target / relative).exists()]
    return sum(_copy(source / relative, target / relative) for relative in lost)


def _copy_artifacts(plan: BackupPlan) -> int:
    if plan.artifacts is None or is_bucket(plan.place):
        return 0
    try:
        source, target = plan.artifacts, Path(plan.place) / ARTIFACTS
        return sum(_copy(source / relative, target / relative) for relative in missing_files(source, target))
    except OSError as error:
        raise StorageError(
            f"{plan.place}: {error.strerror}: {error.filename}",
            "a folder with room that can be written",
            f"make room in {plan.place}, or set another backup.folder in config/local.yaml",
        ) from error


def _differs(path: Path, copy: Path) -> bool:
    try:
        ours = path.stat()
    except FileNotFoundError:  # deleted since it was listed
        return False
    try:
        theirs = copy.stat()
    except FileNotFoundError:
        return True
    return (ours.st_size, ours.st_mtime_ns) != (theirs.st_size, theirs.st_mtime_ns)


def _copy(path: Path, copy: Path) -> int:
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = copy.with_name(f".{copy.name}.{os.getpid()}{_PART}")
    try:
        with path.open("rb") as source, aside.open("wb") as file:
            before = os.fstat(source.fileno())
            shutil.copyfileobj(source, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
        aside.replace(copy)
    except FileNotFoundError:
        if path.exists():
            raise
        return 0
    finally:
        aside.unlink(missing_ok=True)
    return 1


# Keys


def make_identity(file: Path) -> str:
    """Write a new age identity to `file`, mode 0600, and give its public half, the recipient."""
    from pyrage import x25519

    identity = x25519.Identity.generate()
    recipient = str(identity.to_public())
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{file} is there already", "a new file", "make recovery-key FILE=<another name>") from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(f"# public key: {recipient}\n{identity}\n")
        out.flush()
        os.fsync(out.fileno())
    return recipient


def key_archives(store: Store) -> list[str]:
    """Names of the archives of keys in this place, oldest first."""
    return [name for name in store.names(KEYS) if name.endswith(_ENDING)]


def restore_keys(place: str, identity: Path, target: Path) -> list[str]:
    """Write the keys of the newest archive that `target` lacks; their names. Keys that are there stay as they are."""
    store = open_store(place)
    archives = key_archives(store)
    if not archives:
        raise StorageError(
            f"{place} holds no keys",
            f"{KEYS}/…{_ENDING}, written where backup.recipient is set",
            "make restore without IDENTITY; docs/runbooks/keys.md says what a lost key means",
        )
    with tarfile.open(fileobj=io.BytesIO(_decrypted(store.read(archives[-1]), identity, archives[-1]))) as archive:
        wanted = [member for member in archive if member.isfile() and not (target / member.name).exists()]
        for member in wanted:
            _write_key(target, member, archive)
    return [member.name for member in wanted]


def _write_key(target: Path, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    path = target / member.name
    if not path.resolve().is_relative_to(target.resolve()):
        raise StorageError(f"the archive of keys names {member.name}", "a name below the key folder", "make doctor")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = archive.extractfile(member)
    write_file(path, content.read() if content else b"", mode=member.mode & 0o644)


def _decrypted(content: bytes, identity: Path, name: str) -> bytes:
    import pyrage

    try:
        lines = identity.read_text(encoding="utf-8").splitlines()
        known = [pyrage.x25519.Identity.from_str(line) for line in lines if line.startswith("AGE-SECRET-KEY-")]
        return bytes(pyrage.decrypt(content, known))
    except (OSError, pyrage.DecryptError, pyrage.IdentityError) as error:
        raise StorageError(
            f"{identity} does not open {name}: {error}",
            "the age identity that belongs to backup.recipient",
            "make restore IDENTITY=<that file>",
        ) from error


def _back_up_keys(plan: BackupPlan, seen: Path) -> str | None:
    """Encrypt and store the keys if they, or their recipient, are not what was stored last."""
    if plan.recipient is None or not (packed := _packed(plan.keys)):
        return None
    digest = hashlib.sha256(f"{plan.place}\0{plan.recipient}\0".encode() + packed).hexdigest()
    if seen.is_file() and seen.read_text(encoding="utf-8") == digest:
        return None
    name = f"{KEYS}/{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}{_ENDING}"
    open_store(plan.place).write(name, _encrypted(packed, plan.recipient))
    write_file(seen, digest.encode(), mode=0o600)
    return name


def _encrypted(content: bytes, recipient: str) -> bytes:
    import pyrage

    try:
        return bytes(pyrage.encrypt(content, [pyrage.x25519.Recipient.from_str(recipient)]))
    except pyrage.RecipientError as error:
        raise ConfigError(
            f"backup.recipient {recipient}: {error}", "a public age key", "make recovery-key, and set what it prints"
        ) from error


def _packed(keys: Path) -> bytes:
    """The key folder as a tar archive, the same bytes for the same keys; empty where there are none."""
    files = sorted(path for path in keys.glob("*/*") if path.is_file() and not path.name.startswith("."))
    if not files:
        return b""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in files:
            member = tarfile.TarInfo(path.relative_to(keys).as_posix())
            content = path.read_bytes()
            member.size, member.mode = len(content), path.stat().st_mode & 0o777
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
