"""The real roles on this machine: what they write, that a second run changes nothing, what they refuse."""

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from torchrelay import config, nodes
from torchrelay.config import NodeConfig, Site
from torchrelay.errors import ConfigError
from torchrelay.serving.engine import Program

ROOT = Path(__file__).resolve().parents[2]
BASE = 21500


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder with a blank in its name, as a home folder may have, configured by the real roles."""
    folder = tmp_path_factory.mktemp("a b") / "state"
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, folder)
        assert nodes.configure(folder / "logs" / "configure.log") is True
        yield folder
    config.settings.cache_clear()


def settle(patch: pytest.MonkeyPatch, state: Path, base: int = BASE) -> None:
    for name in ("CONFIG", "INVENTORY", "VARIANT"):
        patch.delenv(f"TORCHRELAY_{name}", raising=False)
    patch.setenv("TORCHRELAY_ROOT", str(ROOT))
    patch.setenv("TORCHRELAY_STATE", str(state))
    patch.setenv("TORCHRELAY_KEYS", str(state.parent / "keys"))
    patch.setenv("TORCHRELAY_PORT_BASE", str(base))
    patch.setenv("HOME", str(state.parent / "home"))
    config.settings.cache_clear()


def test_they_write_what_torchrelay_reads(state: Path) -> None:
    site = Site.model_validate_json((state / "site.json").read_bytes())
    assert site.tracking.url == f"http://127.0.0.1:{BASE}"
    assert site.supervisor == state / "supervisor" / "supervisord.sock"
    assert site.perimeters["dev"].alias == "dev"
    assert site.perimeters["dev"].gateway == f"http://127.0.0.1:{BASE + 10}"
    assert site.perimeters["production"].orchestrator == f"http://127.0.0.1:{BASE + 52}"
    (node,) = site.perimeters["dev"].nodes
    assert node.folder == state / "perimeters" / "dev" / "nodes" / "dev-1"
    found = NodeConfig.model_validate_json((node.folder / "node.json").read_bytes())
    assert (found.name, found.perimeter, found.folder) == ("dev-1", "dev", node.folder)
    assert (found.gateway.port, found.gateway.admin_port) == (BASE + 10, BASE + 11)
    assert found.engine_ports == (BASE + 12, BASE + 41)
    assert (found.java_home / "bin" / "java").is_file()
    assert found.trust.read_bytes() == (config.settings().keys / "dev" / "signing.pub").read_bytes()


def test_the_tracking_server_is_described_whole(state: Path) -> None:
    program = Program.model_validate_json((state / "tracking" / "program.json").read_bytes())
    assert program.command[3] == "server"
    assert program.directory.is_dir() and program.log.parent.is_dir()
    assert Path(program.environment["TMPDIR"]).is_dir()
    assert program.environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    connection = sqlite3.connect(state / "tracking" / "mlflow.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_the_key_of_the_webhooks_is_handed_over_and_not_written_down(state: Path) -> None:
    key = nodes.webhook_key()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (key.parent, key)] == [0o700, 0o600]
    Fernet(key.read_bytes())
    written = [path for path in state.rglob("*") if path.is_file() and key.read_bytes() in path.read_bytes()]
    assert written == []
    program = Program.model_validate_json((state / "tracking" / "program.json").read_bytes())
    command = [*program.command[:2], "printenv"]
    done = subprocess.run(command, env=program.environment, capture_output=True, text=True, check=True)
    said = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert said["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"] == key.read_text()
    assert said["MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS"] == "true"
    assert said["MLFLOW_WEBHOOK_ALLOWED_SCHEMES"] == "http,https"
    assert (said["MLFLOW_WEBHOOK_CACHE_TTL"], said["MLFLOW_WEBHOOK_REQUEST_TIMEOUT"]) == ("5", "3")


def test_the_server_does_not_start_without_the_key(state: Path, tmp_path: Path) -> None:
    command = [state / "tracking" / "with-key", tmp_path / "gone", "echo", "started"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"started" not in done.stdout


@contextmanager
def without_the_key(rows: str) -> Iterator[None]:
    """The key is lost, and the database holds webhooks as `rows` says."""
    key, database = nodes.webhook_key(), config.settings().state / "tracking" / "mlflow.db"
    key.rename(key.with_name("aside"))
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE webhooks (name TEXT, deleted_timestamp INTEGER)")
        connection.execute(f"INSERT INTO webhooks VALUES {rows}")
    try:
        yield
    finally:
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("DROP TABLE webhooks")
        key.with_name("aside").rename(key)


def test_no_new_key_is_made_over_webhooks_that_a_lost_one_encrypted(state: Path) -> None:
    with without_the_key("('ours', NULL)"):
        with pytest.raises(ConfigError) as caught:
            nodes.configure(state / "logs" / "lost.log")
        assert "1 webhooks are encrypted" in " ".join(caught.value.found.split())
        assert not nodes.webhook_key().exists()
    with without_the_key("('ours', 1)"):  # a deleted one holds nobody up
        assert nodes.configure(state / "logs" / "lost.log") is True
        assert nodes.webhook_key().is_file()


def test_everything_written_lies_in_the_state_folder(state: Path) -> None:
    assert {path.name for path in state.parent.iterdir()} <= {"state", "keys"}


def test_a_second_run_changes_nothing(state: Path) -> None:
    log = state / "logs" / "second.log"
    (state / "configured.json").unlink()
    assert nodes.configure(log) is True
    recaps = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", log.read_text(), re.MULTILINE)
    hosts = ("dev-1", "production-1", "production-2", "production-gateway", "this-machine")
    assert dict(recaps) == dict.fromkeys(hosts, "0")
    assert "WARNING" not in log.read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"serving_admin_port": 1}, "Node dev-1 of perimeter dev needs"),
        ({"serving_engine_first_port": BASE + 10}, "Node dev-1 of perimeter dev needs"),
        ({"tracking_allowed_hosts": ["*"]}, "The tracking server needs"),
        ({"control_tracking_url": "http://127.0.0.1/"}, "URLs have no trailing slash"),
        ({"tracking_workers": "many"}, "tracking_workers"),
        ({"tracking_webhook_schemes": ["ftp"]}, "Webhooks go over http or https"),
        ({"tracking_webhook_key": "/etc/passwd"}, "must have mode 0600"),
        ({"supervisor_socket": "/" + "s" * 120}, "a control socket's path may have 96"),
    ],
)
def test_what_cannot_work_is_refused_before_any_change(state: Path, extra: dict[str, object], message: str) -> None:
    role = next(iter(extra)).partition("_")[0]
    command = [
        *(Path(sys.executable).with_name("ansible-playbook"), "-i", ROOT / "inventory" / "local"),
        *("-e", f"@{state / 'ansible-vars.json'}", "-e", json.dumps(extra), "--limit", HOSTS[role], "--check"),
        ROOT / "playbooks" / "configure-nodes.yml",
    ]
    home = {name: str(state / "ansible") for name in ("ANSIBLE_HOME", "ANSIBLE_LOCAL_TEMP", "ANSIBLE_REMOTE_TEMP")}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout
    assert message in " ".join((done.stdout + done.stderr).split())


HOSTS = {"serving": "dev-1", "tracking": "this-machine", "control": "this-machine", "supervisor": "this-machine"}


def test_a_state_folder_too_deep_for_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch, tmp_path / ("x" * 60))
    with pytest.raises(ConfigError) as caught:
        nodes.configure(tmp_path / "configure.log")
    assert "Set another state folder" in caught.value.found
    config.settings.cache_clear()
