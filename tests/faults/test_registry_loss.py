"""The registry's file is lost under writes, again and again, and comes back from its replica."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bucket_rig import BUCKET, bucket
from registry_rig import Lost
from tests.conftest import free_port_base
from torchrelay import registry
from torchrelay.errors import StorageError

RECOVERY_POINT_S, RESTORE_S = 5.0, 60.0
pytestmark = pytest.mark.real


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where backups go."""
    if request.param == "folder":
        yield str(tmp_path / "a backup")
        return
    with bucket(tmp_path / "bucket", free_port_base(1)) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        yield f"gs://{BUCKET}/a/backup"


def lose(folder: Path, place: str, times: int) -> None:
    lost = Lost(folder, place)
    for _ in range(times):
        loss = lost.lose(3)
        assert loss.acknowledged > 20
        assert loss.restored > 0
        assert loss.integrity == "ok"
        assert loss.recovery_point <= RECOVERY_POINT_S
        assert loss.restore <= RESTORE_S


def test_what_was_acknowledged_before_the_recovery_point_is_never_lost(tmp_path: Path, place: str) -> None:
    (tmp_path / "a state").mkdir()
    lose(tmp_path / "a state", place, 5)


def test_an_earlier_time_can_be_asked_for_and_the_later_state_stays(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    place = str(tmp_path / "backup")
    lost = Lost(tmp_path / "state", place)
    first = lost.lose(4)
    between = datetime.now(UTC)
    later = lost.lose(4)
    database, name = lost.store.database, registry.latest(place).name
    generation = registry.Replica(name=name, generation=1)
    with pytest.raises(StorageError, match="Litestream could not read"):
        registry.fetch(database, place, generation, f"{between - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}")
    assert rows(database) == later.restored > first.restored
    earlier = registry.fetch(database, place, registry.Replica(name=name, generation=0))
    registry.replace(database, earlier)
    assert rows(database) == first.restored
    found = registry.identity(database)
    assert found is not None and found.generation == 2
    now = f"{datetime.now(UTC) + timedelta(seconds=1):%Y-%m-%dT%H:%M:%SZ}"
    registry.replace(database, registry.fetch(database, place, generation, now))
    assert rows(database) == later.restored


def rows(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("SELECT count(*) FROM rows").fetchone()[0])


@pytest.mark.whole
@pytest.mark.timeout(3600)
def test_a_hundred_times(tmp_path: Path, place: str) -> None:
    (tmp_path / "state").mkdir()
    lose(tmp_path / "state", place, 50)
