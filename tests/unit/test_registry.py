"""The registry's name, where its artifacts lie, and what is refused before anything changes."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from torchrelay import registry
from torchrelay.config import TrackingStore, write_json
from torchrelay.errors import ConfigError, StorageError


@pytest.fixture
def store(tmp_path: Path) -> TrackingStore:
    folder = tmp_path / "tracking"
    folder.mkdir()
    return TrackingStore(
        database=folder / "mlflow.db", artifacts=str(folder / "artifacts"), backup=str(tmp_path / "backup")
    )


def execute(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def replica(place: str, name: str, generation: int) -> None:
    file = Path(place) / "registry" / name / f"{generation:04}" / "ltx" / "0" / "1-1.ltx"
    file.parent.mkdir(parents=True)
    file.touch()


def test_a_database_is_made_in_wal_mode_and_named_once(store: TrackingStore) -> None:
    assert registry.claim(store) is True
    name = registry.identity(store.database)
    assert registry.claim(store) is False
    assert registry.identity(store.database) == name
    with closing(sqlite3.connect(store.database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_is_not_backed_up_needs_no_name(store: TrackingStore) -> None:
    registry.claim(store.model_copy(update={"backup": None}))
    assert registry.identity(store.database) is None
    registry.claim(store)
    assert registry.identity(store.database) is not None


@pytest.mark.parametrize("there", [True, False], ids=["made anew", "gone"])
def test_a_lost_registry_is_not_begun_anew_over_its_backup(store: TrackingStore, there: bool) -> None:
    replica(str(store.backup), "0000beef", 0)
    if there:
        execute(store.database, "CREATE TABLE runs (id)")
    with pytest.raises(ConfigError, match="0000beef") as caught:
        registry.claim(store)
    assert caught.value.next_command.startswith("make restore")
    assert store.database.is_file() is there


@pytest.mark.parametrize(
    ("before", "now", "setting"),
    [(None, "gs://b/artifacts", "null"), ("gs://a/x/artifacts", "gs://b/artifacts", "gs://a/x")],
)
def test_artifacts_stay_where_runs_look_for_them(
    store: TrackingStore, before: str | None, now: str, setting: str
) -> None:
    if before:
        described = store.model_copy(update={"artifacts": before})
        write_json(store.database.with_name("store.json"), described)
    wanted = store.model_copy(update={"artifacts": now, "backup": None})
    registry.claim(wanted)  # nothing was ever logged
    execute(store.database, "CREATE TABLE runs (id)", "INSERT INTO runs VALUES (1)")
    with pytest.raises(ConfigError, match="artifacts of 1 runs lie in") as caught:
        registry.check(wanted)
    assert caught.value.next_command.startswith(f"set bucket to {setting} in")


def test_a_folder_that_moved_as_a_whole_is_no_other_place(store: TrackingStore, tmp_path: Path) -> None:
    moved_from = TrackingStore(database=Path("/before/mlflow.db"), artifacts="/before/artifacts")
    write_json(store.database.with_name("store.json"), moved_from)
    execute(store.database, "CREATE TABLE runs (id)", "INSERT INTO runs VALUES (1)")
    registry.check(store)


def test_the_last_generation_is_found(store: TrackingStore) -> None:
    place = str(store.backup)
    for name, generation in (("0000beef", 0), ("0000beef", 11), ("0000beef", 2)):
        replica(place, name, generation)
    assert registry.latest(place).generation == 11
    assert registry.latest(place, generation=2).path == "registry/0000beef/0002"
    replica(place, "0000cafe", 0)
    assert registry.latest(place, "0000beef").generation == 11
    with pytest.raises(StorageError, match="backups of 2 registries") as caught:
        registry.latest(place)
    assert "REGISTRY=0000cafe" in caught.value.next_command


@pytest.mark.parametrize("name", [None, "0000beef"])
def test_no_replica_is_an_error(store: TrackingStore, name: str | None) -> None:
    with pytest.raises(StorageError, match="holds no backup of"):
        registry.latest(str(store.backup), name)


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("/b b", {"type": "file", "path": "/b b/registry/0000beef/0003"}),
        ("gs://b/p/backup", {"type": "gs", "bucket": "b", "path": "p/backup/registry/0000beef/0003"}),
    ],
)
def test_litestream_is_told_of_one_generation(place: str, target: dict[str, str]) -> None:
    config = registry.litestream_config(Path("/x.db"), place, registry.Replica(name="0000beef", generation=3))
    assert config["dbs"][0]["replica"] == {**target, "sync-interval": "1s"}


def test_a_nameless_database_is_not_replicated(store: TrackingStore) -> None:
    execute(store.database, "CREATE TABLE runs (id)")
    file = store.database.with_name("store.json")
    write_json(file, store)
    with pytest.raises(ConfigError, match="not the one that was backed up"):
        registry.replicate(file)
