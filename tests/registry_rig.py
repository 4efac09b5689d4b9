"""A registry under writes, replicated by the real Litestream, that is lost and restored again and again."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torchrelay import registry
from torchrelay.config import TrackingStore, write_json


@dataclass(frozen=True)
class Loss:
    """One loss and what came back. Times in seconds."""

    acknowledged: int
    restored: int
    recovery_point: float
    restore: float
    integrity: str


class Lost:
    """A database in `folder` with its backup in `place`."""

    def __init__(self, folder: Path, place: str, megabytes: int = 0) -> None:
        database = folder / "mlflow.db"
        self.store = TrackingStore(database=database, artifacts=str(folder / "artifacts"), backup=place)
        self.file = folder / "store.json"
        registry.claim(self.store)
        write_json(self.file, self.store)
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, filler TEXT)")
            connection.execute("CREATE TABLE ballast (content BLOB)")
            for _ in range(megabytes):
                connection.execute("INSERT INTO ballast VALUES (randomblob(1048576))")

    def lose(self, seconds: float) -> Loss:
        """Write for so long, lose every file of the database in the middle of it, and restore."""
        with self._replicated() as litestream, _Writer(self.store.database) as writer:
            time.sleep(seconds)
            lost_at = time.time()
            for path in self.store.database.parent.glob("*mlflow.db*"):
                if path.is_file():
                    path.unlink()
            litestream.kill()
        return self._restored(lost_at, [row for row in writer.acknowledged if row[1] < lost_at])

    def _restored(self, lost_at: float, acknowledged: list[tuple[int, float]]) -> Loss:
        database, place = self.store.database, str(self.store.backup)
        began = time.monotonic()
        registry.replace(database, registry.fetch(database, place, registry.latest(place)))
        took = time.monotonic() - began
        with closing(sqlite3.connect(database)) as connection:
            there = {number for (number,) in connection.execute("SELECT number FROM rows")}
            integrity = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
        missing = [at for number, at in acknowledged if number not in there]
        point = lost_at - min(missing) if missing else 0.0
        return Loss(len(acknowledged), len(there), point, took, integrity)

    @contextmanager
    def _replicated(self) -> Iterator["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "torchrelay.registry", "replicate", str(self.file)]
        with (self.file.parent / "litestream.log").open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        try:
            self._await_first()
            yield child
        finally:
            child.kill()
            child.wait()

    def _await_first(self) -> None:
        """Until this generation has anything in the backup."""
        place, end = str(self.store.backup), time.monotonic() + 60
        while registry.identity(self.store.database) not in registry.replicas(place):
            assert time.monotonic() < end, (self.file.parent / "litestream.log").read_text()[-2000:]
            time.sleep(0.2)


class _Writer:
    """Commits a row every few milliseconds, and remembers which and when."""

    def __init__(self, database: Path) -> None:
        self.acknowledged: list[tuple[int, float]] = []
        self._database = database
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _write(self) -> None:
        with closing(sqlite3.connect(self._database, timeout=20, isolation_level=None)) as connection:
            number = connection.execute("SELECT coalesce(max(number), 0) FROM rows").fetchone()[0]
            while not self._stop.is_set():
                number += 1
                try:
                    connection.execute("INSERT INTO rows VALUES (?, ?)", (number, "x" * 500))
                except sqlite3.Error:  # the file has gone
                    return
                self.acknowledged.append((number, time.time()))
                time.sleep(0.005)
