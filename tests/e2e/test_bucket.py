"""A site whose artifacts, data and backups are in a bucket; it is lost and comes back by one command."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bucket_rig import BUCKET, bucket
from tests.conftest import free_port_base
from torchrelay import backup, config, data, doctor, nodes, registry
from torchrelay.cli import verbs
from torchrelay.errors import ConfigError, TorchrelayError
from torchrelay.storage import open_store
from torchrelay.tracking import Tracking

ROOT = Path(__file__).resolve().parents[2]
PLACE = f"gs://{BUCKET}/a-site"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bucket's files."""
    folder = tmp_path_factory.mktemp("gcs") / "bucket"
    with bucket(folder, free_port_base(1)) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield folder


@pytest.fixture(scope="module")
def state(emulator: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site") / "state"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "INVENTORY", "VARIANT"):
            patch.delenv(f"TORCHRELAY_{name}", raising=False)
        patch.setenv("TORCHRELAY_ROOT", str(ROOT))
        patch.setenv("TORCHRELAY_STATE", str(folder))
        patch.setenv("TORCHRELAY_KEYS", str(folder.parent / "keys"))
        patch.setenv("TORCHRELAY_PORT_BASE", str(free_port_base()))
        patch.setenv("TORCHRELAY_BUCKET", PLACE)
        patch.setenv("TORCHRELAY_BACKUP_RECIPIENT", backup.make_identity(folder.parent / "recovery.age"))
        patch.setenv("HOME", str(folder.parent / "home"))
        config.settings.cache_clear()
        nodes.configure(folder / "logs" / "configure.log")
        try:
            nodes.start()
            yield folder
        finally:
            nodes.stop()
    config.settings.cache_clear()


def server() -> Tracking:
    return Tracking(config.site().tracking.url)


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.3)


def rows() -> dict[str, backup.Status]:
    found = backup.status(config.settings(), nodes.database(), *nodes.registry_backup_runs())
    return {row.name: row for row in found}


def safe() -> bool:
    """Whether Litestream has taken up what was written last, and sent it."""
    return rows()["registry"].ok and not rows()["registry"].found.count("not there yet")


def call(*words: str) -> TorchrelayError | None:
    """Run a verb; the error that it ends with, if it does."""
    done = CliRunner().invoke(verbs, words)
    if done.exception and not isinstance(done.exception, TorchrelayError | SystemExit):
        raise done.exception
    return done.exception if isinstance(done.exception, TorchrelayError) else None


def test_artifacts_go_to_the_bucket_and_come_back(state: Path, tmp_path: Path) -> None:
    tracking = server()
    run = tracking.create_run(tracking.ensure_experiment("bucket"), "a run", "bucket").run_id
    big = tmp_path / "model.mar"
    big.write_bytes(bytes(range(256)) * 2**13)
    tracking.upload_artifact(run, "torchrelay/archive/d1/model.mar", big)
    assert tracking.artifacts(run, "torchrelay/archive/d1") == ["torchrelay/archive/d1/model.mar"]
    tracking.save_artifact(run, "torchrelay/archive/d1/model.mar", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    (there,) = [name for name in open_store(PLACE).names("artifacts") if name.endswith("model.mar")]
    assert open_store(PLACE).read(there) == big.read_bytes()
    assert not (state / "tracking" / "artifacts").exists()


def test_the_doctor_knows_the_bucket_and_its_backups(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eventually(lambda: all(finding.ok for finding in (*doctor.bucket(), *doctor.backups())))
    assert [finding.name for finding in doctor.backups()] == [f"backup of {name}" for name in rows()]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    (found,) = doctor._checked(doctor.bucket)
    assert not found.ok
    assert found.remedy == "start the emulator at http://127.0.0.1:9, or unset STORAGE_EMULATOR_HOST"


def test_keys_are_in_the_bucket_and_nowhere_in_clear(state: Path, emulator: Path) -> None:
    eventually(lambda: rows()["keys"].ok)
    secrets = [path.read_bytes() for path in (state.parent / "keys").glob("*/*") if path.suffix in {".pem", ".key"}]
    assert len(secrets) >= 3
    stored = [path.read_bytes() for path in emulator.rglob("*") if path.is_file()]
    assert not [content for content in stored if any(secret in content for secret in secrets)]


def test_another_bucket_is_refused_once_there_are_runs(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server().create_run(server().ensure_experiment("there"), "a run", "there")
    monkeypatch.setenv("TORCHRELAY_BUCKET", f"{PLACE}-other")
    config.settings.cache_clear()
    with pytest.raises(ConfigError, match="runs lie in gs://relay/a-site/artifacts") as caught:
        nodes.configure(state / "logs" / "other.log")
    assert caught.value.expected == "the place that they were written to, as long as there are runs"
    assert caught.value.next_command.startswith(f"set bucket to {PLACE} in config/local.yaml")
    monkeypatch.undo()
    config.settings.cache_clear()


def test_the_whole_site_is_lost_and_comes_back_by_one_command(state: Path, tmp_path: Path) -> None:
    tracking = server()
    run = tracking.create_run(tracking.ensure_experiment("kept"), "a run", "kept").run_id
    tracking.upload_artifact(run, "kept.txt", b"kept")
    webhook_key = nodes.webhook_key().read_bytes()
    eventually(lambda: safe() and rows()["keys"].ok)
    time.sleep(3)
    nodes.stop()
    shutil.rmtree(state)
    shutil.rmtree(state.parent / "keys")
    with pytest.raises(ConfigError, match="holds a backup of registry") as caught:
        nodes.configure(state / "logs" / "configure.log")
    assert caught.value.next_command.startswith("make restore")
    shutil.rmtree(state.parent / "keys")  # the ones that configure has just made
    assert call("restore", "--identity", str(state.parent / "recovery.age")) is None
    assert server().search_runs("kept")[0].run_id == run
    assert server().download_artifact(run, "kept.txt") == b"kept"
    assert nodes.webhook_key().read_bytes() == webhook_key
    eventually(safe)


def test_a_registry_that_is_there_is_replaced_only_with_a_yes_and_kept(state: Path) -> None:
    eventually(safe)
    refused = call("restore")
    assert refused is not None
    assert refused.next_command == "make restore CONFIRM=yes"
    before = registry.identity(nodes.database())
    assert call("restore", "--confirm", "yes") is None
    after = registry.identity(nodes.database())
    assert (after.name, after.generation) == (before.name, before.generation + 1)
    assert list((state / "tracking").glob("mlflow.db.before-*Z"))
    eventually(safe)


def test_data_go_to_the_bucket_and_come_back(emulator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC itself, by the configuration that `make up` writes."""
    for name in ("Snakefile", "config/defaults.yaml", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "components").mkdir()
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    monkeypatch.setenv("TORCHRELAY_BUCKET", f"{PLACE}/data")
    monkeypatch.delenv("TORCHRELAY_STATE", raising=False)
    config.settings.cache_clear()
    data.place_remote()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "digits.bin").write_bytes(b"digits" * 1000)
    for words in (["add", "digits.bin"], ["push"]):
        dvc(tmp_path, *words)
    assert [name for name in open_store(f"{PLACE}/data").names("dvc") if "files/md5" in name]
    (tmp_path / "digits.bin").unlink()
    shutil.rmtree(tmp_path / ".torchrelay" / "dvc" / "cache")
    dvc(tmp_path, "pull")
    assert (tmp_path / "digits.bin").read_bytes() == b"digits" * 1000
    config.settings.cache_clear()


def dvc(folder: Path, *words: str) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / "site")}
    command = [sys.executable, "-m", "dvc", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, json.dumps([done.stdout[-2000:], done.stderr[-2000:]])
