"""The registry's own files: the database, its replica by Litestream, and whether the two belong together.

A database that is backed up has a name, a number in its header (`application_id`), which a restore keeps; one that was
made anew in the place of a lost one has none. Its replica lies under `registry/<name>/<generation>` in the place of the
backups. The generation (`user_version`) goes up with each restore, so that nothing ever writes into what was restored
from, and so that a lost database is never replicated over a good backup.

The role `tracking` calls `python -m torchrelay.registry check|claim STORE`, the supervisor `… replicate FILE`.
"""

import json
import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from torchrelay.config import Frozen, Json, TrackingStore, read_json, write_file
from torchrelay.errors import ConfigError, StorageError, TorchrelayError
from torchrelay.storage import bucket_parts, google_environment, is_bucket, open_store

LITESTREAM = Path(sys.executable).with_name("litestream")
FOLDER = "registry"
# What an older state may be restored from; SYNC is the recovery point as far as it is ours.
RETENTION = "168h"
SNAPSHOT = "24h"
SYNC = "1s"
_NAMES = 2**31 - 1
_LOOK_S = 60
_RESTORE_S = 3600
_BUSY_S = 20


class Replica(Frozen):
    """One generation of a database in the place of the backups."""

    name: str = Field(description="Of the database: eight hex digits.")
    generation: int

    @property
    def path(self) -> str:
        """Where it lies below the place of the backups."""
        return f"{FOLDER}/{self.name}/{self.generation:04}"


class Transactions(Frozen):
    """What a replica holds."""

    last: str = Field(description="Number of the last transaction, in hex.")
    at: datetime = Field(description="When that was replicated.")


# What the role asks


def check(store: TrackingStore) -> None:
    """Whether the tracking server may be set up so. Changes nothing; the error says what to do instead."""
    _check_artifacts(store)
    if store.backup and not identity(store.database) and (there := names(store.backup)):
        state = "has lost its name, as one that was made anew" if store.database.is_file() else "is not there"
        raise ConfigError(
            f"{store.database} {state}, and {store.backup} holds a backup of registry {', '.join(there)}",
            "the registry that is backed up there, or a place for backups that is empty",
            "make restore (to begin anew instead: another bucket or backup.folder in config/local.yaml)",
        )


def _check_artifacts(store: TrackingStore) -> None:
    """Versions name their files relative to the artifact store: in another one they would be gone without a word."""
    described = store.database.with_name("store.json")
    local = str(store.database.with_name("artifacts"))
    before = local
    if described.is_file() and not (there := read_json(TrackingStore, described, "make up")).beside:
        before = there.artifacts
    if before == store.artifacts or not (runs := _runs(store.database)):
        return
    setting = "null" if not is_bucket(before) else before.removesuffix("/artifacts")
    raise ConfigError(
        f"the artifacts of {runs} runs lie in {before}, and the settings say {store.artifacts}",
        "the place that they were written to, as long as there are runs",
        f"set bucket to {setting} in config/local.yaml (TORCHRELAY_BUCKET), or take another state folder",
    )


def _runs(database: Path) -> int:
    with _reading(database) as connection:
        if connection is None:
            return 0
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone():
            return 0
        return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])


def claim(store: TrackingStore) -> bool:
    """Make the database in WAL mode if there is none, and name it if it is backed up; whether anything changed."""
    check(store)
    changed = not store.database.is_file()
    with closing(sqlite3.connect(store.database, timeout=_BUSY_S, isolation_level=None)) as connection:
        # The mode is a property of the file and stays, whoever opens it later; MLflow never sets it.
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if mode != "wal":
            changed = True
            mode = connection.execute("PRAGMA journal_mode=wal").fetchone()[0]
        if mode != "wal":
            raise ConfigError(
                f"{store.database} stays in journal mode {mode}", "WAL", "make down, then the same command again"
            )
        if store.backup and not _number(connection, "application_id"):
            changed = True
            connection.execute(f"PRAGMA application_id={secrets.randbelow(_NAMES) + 1}")
    return changed


# The replica


def identity(database: Path) -> Replica | None:
    """The replica that this database belongs to; None if it has no name, or is not there."""
    with _reading(database) as connection:
        number = _number(connection, "application_id") if connection else 0
        generation = _number(connection, "user_version") if connection else 0
    return Replica(name=f"{number:08x}", generation=generation) if number else None


def names(place: str) -> list[str]:
    """Names of the databases that have a replica in this place."""
    return sorted({replica.name for replica in replicas(place)})


def replicas(place: str) -> list[Replica]:
    """Every generation of every database there, in order."""
    parts = {tuple(name.split("/")[1:3]) for name in open_store(place).names(FOLDER) if name.endswith(".ltx")}
    return [Replica(name=name, generation=int(generation)) for name, generation in sorted(parts)]


def latest(place: str, name: str | None = None, generation: int | None = None) -> Replica:
    """The last generation in this place, of the database with this name; StorageError where it is not clear."""
    found = [one for one in replicas(place) if generation in (None, one.generation)]
    known = sorted({one.name for one in found})
    if not found or (name and name not in known):
        raise StorageError(
            f"{place} holds no backup of {f'registry {name}' if name else 'a registry'}"
            + (f", but of {', '.join(known)}" if known else ""),
            "a replica that Litestream wrote there",
            "make backup-status, and correct bucket or backup.folder in config/local.yaml",
        )
    if name is None and len(known) > 1:
        raise StorageError(
            f"{place} holds backups of {len(known)} registries: {', '.join(known)}",
            "to be told which",
            f"make restore REGISTRY={known[-1]} (or one of the others)",
        )
    return [one for one in found if name in (None, one.name)][-1]


def transactions(database: Path, place: str, replica: Replica) -> Transactions | None:
    """What the replica holds, by Litestream's own word; None if there is nothing."""
    with _described(database, place, replica) as file:
        words = ("ltx", "-config", str(file), "-no-expand-env", "-level", "all", "-json", str(database))
        said = _litestream(place, _LOOK_S, *words)
    rows = json.loads(said or "[]") or []
    last = max(rows, key=lambda row: str(row["max_txid"]), default=None)
    if last is None:
        return None
    same = [row["timestamp"] for row in rows if row["max_txid"] == last["max_txid"]]
    return Transactions(last=str(last["max_txid"]), at=min(same))


def unsent(database: Path, last: str | None) -> list[float]:
    """When Litestream took up each transaction after `last` on this machine: what is on its way, or stuck."""
    files = database.with_name(f".{database.name}-litestream").glob("ltx/0/*.ltx")
    return [path.stat().st_mtime for path in files if path.stem.rpartition("-")[2] > (last or "")]


def fetch(database: Path, place: str, replica: Replica, at: str | None = None) -> Path:
    """The replica's last state (or that of the time `at`) as a file beside `database`, which stays as it is.

    SQLite has found it whole, it belongs to the next generation, and it is on the disk.
    """
    aside = database.with_name(f".{database.name}.restored")
    aside.parent.mkdir(parents=True, exist_ok=True)
    _remove(aside)
    with _described(database, place, replica) as file:
        when = ("-timestamp", at) if at else ()
        words = ("restore", "-config", str(file), "-no-expand-env", "-o", str(aside), *when, str(database))
        _litestream(place, _RESTORE_S, *words)
    generation = max(one.generation for one in replicas(place) if one.name == replica.name) + 1
    _finish(aside, generation)
    return aside


def replace(database: Path, restored: Path) -> Path | None:
    """Rename `restored` to `database`; what was there is kept, and its new name returned.

    Nobody may have the database open.
    """
    kept = database.with_name(f"{database.name}.before-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    there = database.is_file()
    for ending in ("-wal", "-shm", ""):
        old = database.with_name(f"{database.name}{ending}")
        if old.is_file():
            old.replace(kept.with_name(f"{kept.name}{ending}"))
    shutil.rmtree(database.with_name(f".{database.name}-litestream"), ignore_errors=True)
    restored.replace(database)
    _sync_folder(database.parent)
    return kept if there else None


def _finish(aside: Path, generation: int) -> None:
    with closing(sqlite3.connect(aside, timeout=_BUSY_S, isolation_level=None)) as connection:
        said = connection.execute("PRAGMA integrity_check").fetchone()[0]
        if said != "ok":
            raise StorageError(
                f"what was restored is damaged: {said}",
                "a database that SQLite finds whole",
                "make restore AT=<an earlier time, as 2026-01-31T12:00:00Z>",
            )
        connection.execute(f"PRAGMA user_version={generation}")
        connection.execute("PRAGMA journal_mode=wal")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def litestream_config(database: Path, place: str, replica: Replica) -> Json:
    """Litestream's configuration (JSON is YAML as well) for this database and its replica."""
    if is_bucket(place):
        bucket, prefix = bucket_parts(place)
        target: Json = {"type": "gs", "bucket": bucket, "path": f"{prefix}/{replica.path}".strip("/")}
    else:
        target = {"type": "file", "path": f"{place}/{replica.path}"}
    return {
        "dbs": [{"path": str(database), "replica": {**target, "sync-interval": SYNC}}],
        "snapshot": {"interval": SNAPSHOT, "retention": RETENTION},
    }


def replicate(file: Path) -> None:
    """Become Litestream, for the database and the place in `file`, unless the two do not belong together."""
    store = read_json(TrackingStore, file, "make up")
    if store.backup is None:
        raise ConfigError(f"{file} names no place for backups", "one", "make up")
    found = identity(store.database)
    if found is None:
        raise ConfigError(
            f"{store.database} has no name: it is not the one that was backed up",
            "the registry that the role tracking named",
            "make restore",
        )
    if not is_bucket(store.backup):
        Path(store.backup).mkdir(mode=0o700, parents=True, exist_ok=True)
    config = store.database.with_name("litestream.yml")
    write_file(config, json.dumps(litestream_config(store.database, store.backup, found), indent=2).encode())
    os.execv(LITESTREAM, [str(LITESTREAM), "replicate", "-config", str(config), "-no-expand-env"])  # noqa: S606


@contextmanager
def _described(database: Path, place: str, replica: Replica) -> Iterator[Path]:
    """A file that tells Litestream of this replica."""
    with tempfile.TemporaryDirectory(prefix="torchrelay-") as folder:
        file = Path(folder) / "litestream.yml"
        write_file(file, json.dumps(litestream_config(database, place, replica)).encode())
        yield file


def _litestream(place: str, patience_s: int, *words: str) -> str:
    """Run Litestream and give what it printed; it tries again by itself, so its patience is limited here."""
    try:
        done = subprocess.run(
            [str(LITESTREAM), *words],
            env={**os.environ, **google_environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _litestream_failed(place, f"no end within {patience_s} s") from error
    if done.returncode:
        raise _litestream_failed(place, done.stderr)
    return done.stdout


def _litestream_failed(place: str, said: str) -> StorageError:
    return StorageError(
        f"Litestream could not read the backup in {place}: {' '.join(said.split())[-300:]}",
        "a replica that can be read, and that reaches back to the time that was asked for",
        "make backup-status, then make doctor",
    )


@contextmanager
def _reading(database: Path) -> Iterator[sqlite3.Connection | None]:
    """A connection that can only read; None where there is no database."""
    if not database.is_file():
        yield None
        return
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as connection:
        yield connection


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _remove(database: Path) -> None:
    for ending in ("", "-wal", "-shm", ".tmp"):
        database.with_name(f"{database.name}{ending}").unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    """`check STORE`, `claim STORE` (JSON of a TrackingStore; prints whether it changed something), `replicate FILE`."""
    verb, word = sys.argv[1:]
    try:
        if verb == "replicate":
            replicate(Path(word))
        elif verb == "claim":
            print("changed" if claim(TrackingStore.model_validate_json(word)) else "as it was")  # noqa: T201
        else:
            check(TrackingStore.model_validate_json(word))
    except TorchrelayError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
