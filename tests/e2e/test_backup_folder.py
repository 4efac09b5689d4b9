"""A laptop's site with its backups in a folder: the registry's file goes while all runs, and comes back."""

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import free_port_base
from torchrelay import backup, config, doctor, nodes, registry
from torchrelay.cli import verbs
from torchrelay.errors import TorchrelayError
from torchrelay.serving.supervisor import Supervisor
from torchrelay.tracking import Tracking

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site") / "state"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "INVENTORY", "VARIANT"):
            patch.delenv(f"TORCHRELAY_{name}", raising=False)
        patch.setenv("TORCHRELAY_ROOT", str(ROOT))
        patch.setenv("TORCHRELAY_STATE", str(folder))
        patch.setenv("TORCHRELAY_KEYS", str(folder.parent / "keys"))
        patch.setenv("TORCHRELAY_PORT_BASE", str(free_port_base()))
        patch.setenv("TORCHRELAY_BACKUP_FOLDER", str(folder.parent / "a backup"))
        patch.setenv("HOME", str(folder.parent / "home"))
        try:
            yield folder
        finally:
            nodes.stop()
    config.settings.cache_clear()


@pytest.fixture
def state(place: Path) -> Path:
    """The site as the settings want it, whatever the test before has left."""
    config.settings.cache_clear()
    nodes.configure(place / "logs" / "configure.log")
    nodes.start()
    return place


def server() -> Tracking:
    return Tracking(config.site().tracking.url)


def eventually(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.3)


def rows() -> dict[str, backup.Status]:
    found = backup.status(config.settings(), nodes.database(), *nodes.registry_backup_runs())
    return {row.name: row for row in found}


def safe() -> bool:
    """Whether Litestream has sent what it took up, and every artifact is copied."""
    registry_row, artifacts_row = rows()["registry"], rows()["artifacts"]
    return registry_row.ok and "not there yet" not in registry_row.found and artifacts_row.found.startswith("all in")


def call(*words: str) -> TorchrelayError | None:
    done = CliRunner().invoke(verbs, words)
    if done.exception and not isinstance(done.exception, TorchrelayError | SystemExit):
        raise done.exception
    return done.exception if isinstance(done.exception, TorchrelayError) else None


def logged(key: str) -> str:
    """A run with an artifact, both in the backup."""
    tracking = server()
    run = tracking.create_run(tracking.ensure_experiment("kept"), "a run", key).run_id
    tracking.upload_artifact(run, "kept.txt", key.encode())
    time.sleep(3)  # Litestream looks once a second
    eventually(safe)
    return run


def test_a_registry_that_mlflow_made_anew_is_no_backup_of_the_lost_one(state: Path) -> None:
    run = logged("first")
    name = registry.identity(nodes.database())
    for path in (state / "tracking").glob("mlflow.db*"):
        path.unlink()
    supervisor = Supervisor(config.site().supervisor, state / "supervisor" / "programs")
    supervisor.restart("tracking")
    eventually(lambda: nodes.database().is_file() and server().healthy())
    supervisor.restart("registry-backup")
    log = state / "logs" / "registry-backup.log"
    eventually(lambda: "has no name: it is not the one that was backed up" in log.read_text())
    found = {finding.name: finding for finding in doctor.backups()}["backup of registry"]
    assert (found.ok, found.remedy) == (False, "make restore")
    refused = call("restore")
    assert refused is not None
    assert refused.next_command == "make restore CONFIRM=yes"
    assert call("restore", "--confirm", "yes") is None
    assert run in {one.run_id for one in server().search_runs("kept")}
    assert registry.identity(nodes.database()).name == name.name
    eventually(safe)


def test_a_lost_disk_comes_back_with_its_artifacts(state: Path) -> None:
    run = logged("second")
    nodes.stop()
    shutil.rmtree(state / "tracking")
    assert call("restore") is None
    assert server().download_artifact(run, "kept.txt") == b"second"
    connection = sqlite3.connect(nodes.database())
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    eventually(safe)


def test_without_the_setting_nothing_of_it_runs(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("backup-status") is None
    monkeypatch.delenv("TORCHRELAY_BACKUP_FOLDER")
    config.settings.cache_clear()
    nodes.configure(state / "logs" / "without.log")
    nodes.start()
    programs = state / "supervisor" / "programs"
    assert not [name for name in ("backup", "registry-backup") if (programs / f"{name}.conf").exists()]
    assert nodes.registry_backup_runs() == (True, False)
    assert doctor.backups() == []
    refused = call("restore")
    assert refused is not None
    assert "neither `bucket` nor `backup.folder` is set" in refused.found
