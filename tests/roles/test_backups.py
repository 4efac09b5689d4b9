"""The roles with backups: what they write, that a second run changes nothing, and what they refuse."""

import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from os import environ
from pathlib import Path

import pytest

from torchrelay import backup, config, nodes, registry
from torchrelay.config import BackupPlan, TrackingStore, read_json
from torchrelay.serving.engine import Program

ROOT = Path(__file__).resolve().parents[2]
BASE = 21700


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("a b") / "state"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "INVENTORY", "VARIANT", "BUCKET"):
            patch.delenv(f"TORCHRELAY_{name}", raising=False)
        patch.setenv("TORCHRELAY_ROOT", str(ROOT))
        patch.setenv("TORCHRELAY_STATE", str(folder))
        patch.setenv("TORCHRELAY_KEYS", str(folder.parent / "keys"))
        patch.setenv("TORCHRELAY_PORT_BASE", str(BASE))
        patch.setenv("TORCHRELAY_BACKUP_FOLDER", str(folder.parent / "backup"))
        patch.setenv("TORCHRELAY_BACKUP_RECIPIENT", backup.make_identity(folder.parent / "recovery.age"))
        patch.setenv("HOME", str(folder.parent / "home"))
        config.settings.cache_clear()
        assert nodes.configure(folder / "logs" / "configure.log") is True
        yield folder
    config.settings.cache_clear()


@pytest.fixture(autouse=True)
def _afresh(state: Path) -> None:
    """The site as the settings want it, whatever the test before has left."""
    config.settings.cache_clear()
    nodes.configure(state / "logs" / "afresh.log")


def test_they_describe_what_is_kept_and_what_keeps_it(state: Path) -> None:
    place = str(state.parent / "backup")
    store = read_json(TrackingStore, state / "tracking" / "store.json", "")
    assert store == TrackingStore(
        database=state / "tracking" / "mlflow.db", artifacts=str(state / "tracking" / "artifacts"), backup=place
    )
    assert registry.identity(store.database) is not None
    plan = read_json(BackupPlan, state / "backup" / "plan.json", "")
    assert (plan.place, plan.artifacts, plan.keys) == (place, Path(store.artifacts), config.settings().keys)
    assert plan.recipient == config.settings().backup.recipient
    programs = [read_json(Program, file, "") for file in nodes._backup_programs().values()]
    assert [program.name for program in programs] == list(nodes._backup_programs())
    assert stat.S_IMODE((state / "backup").stat().st_mode) == 0o700


def test_a_second_run_changes_nothing(state: Path) -> None:
    name = registry.identity(nodes.database())
    (state / "configured.json").unlink()
    log = state / "logs" / "second.log"
    assert nodes.configure(log) is True
    assert re.findall(r"^(\S+) +: ok=\d+ +changed=[1-9]", log.read_text(), re.MULTILINE) == []
    assert "WARNING" not in log.read_text()
    assert registry.identity(nodes.database()) == name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tracking_backup": "relative"}, "Backups go to a gs:// URL or an absolute path"),
        ({"tracking_backup_log": ""}, "what makes them needs a log"),
        ({"control_backup_seconds": 0}, "no oftener than every second"),
    ],
)
def test_what_no_backup_can_be_made_of_is_refused(state: Path, extra: dict[str, object], message: str) -> None:
    command = [
        *(Path(sys.executable).with_name("ansible-playbook"), "-i", ROOT / "inventory" / "local"),
        *("-e", f"@{state / 'ansible-vars.json'}", "-e", json.dumps(extra), "--limit", "this-machine", "--check"),
        ROOT / "playbooks" / "configure-nodes.yml",
    ]
    home = {name: str(state / "ansible") for name in ("ANSIBLE_HOME", "ANSIBLE_LOCAL_TEMP", "ANSIBLE_REMOTE_TEMP")}
    done = subprocess.run(command, cwd=ROOT, env={**environ, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout
    assert message in " ".join((done.stdout + done.stderr).split())


def test_without_the_setting_nothing_is_left_of_the_programs(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHRELAY_BACKUP_FOLDER")
    config.settings.cache_clear()
    assert nodes.configure(state / "logs" / "without.log") is True
    assert not [file for file in nodes._backup_programs().values() if file.exists()]
    assert read_json(TrackingStore, state / "tracking" / "store.json", "").backup is None
