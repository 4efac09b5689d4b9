"""Each ailment is found and comes with a remedy; a healthy or a fresh machine is told so."""

import os
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from certificates_rig import CLIENT, Authority
from torchrelay import config, doctor
from torchrelay.config import GatewayPlace, Node, NodeConfig, Perimeter, Site, TrackingServer, write_json
from torchrelay.handover import Environment
from torchrelay.serving.certificates import Certificate, read_certificate


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    for name in ("components", "config", "requirements", ".dvc"):
        (folder / name).mkdir(parents=True)
    (folder / "Snakefile").touch()
    (folder / "config" / "defaults.yaml").write_text("state: .torchrelay\n")
    (folder / ".dvc" / "config").write_text("[core]\n    remote = local\n['remote \"local\"']\n    url = ../remote\n")
    (folder / "requirements" / "run.lock").write_text("click==0.0.1 \\\n    --hash=sha256:0\nabsent-package==1.0\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for name in ("STATE", "PORT_BASE", "INVENTORY", "VARIANT", "CONFIG"):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    monkeypatch.setenv("TORCHRELAY_ROOT", str(folder))
    monkeypatch.setenv("TORCHRELAY_KEYS", str(tmp_path / "keys"))
    config.settings.cache_clear()
    yield folder
    config.settings.cache_clear()


def site(port: int, orchestrator: str | None = None) -> Path:
    """A configured site whose tracking server has this port, and perhaps an orchestrator at this URL."""
    state = config.settings().state
    node = state / "perimeters" / "dev" / "nodes" / "dev-1"
    place = GatewayPlace(folder=state, port=port, admin_port=port)
    paths = dict.fromkeys(
        ("supervisor", "programs", "logs", "environments", "java_home", "trust", "predictions"), state
    )
    write_json(
        node / "node.json",
        NodeConfig(name="dev-1", perimeter="dev", folder=node, engine_ports=(1, 2), gateway=place, **paths),
    )
    perimeter = Perimeter(
        alias="dev",
        gateway=f"http://127.0.0.1:{port}",
        nodes=(Node(name="dev-1", folder=node),),
        gateway_node="dev-1",
        orchestrator=orchestrator,
    )
    server = TrackingServer(url=f"http://127.0.0.1:{port}")
    write_json(state / "site.json", Site(supervisor=state, tracking=server, perimeters={"dev": perimeter}))
    return state


def test_it_looks_at_everything_and_each_ailment_has_a_remedy() -> None:
    found = doctor.diagnose()
    findings = {finding.name: finding for finding in found}
    assert len(findings) == len(found) == 15
    assert findings["python"].ok and findings["git"].ok and findings["java"].ok and findings["gateway"].ok
    assert all(finding.remedy for finding in findings.values() if not finding.ok)


def test_packages_that_differ_from_the_lock_are_named() -> None:
    found = doctor.packages()
    assert not found.ok
    assert "absent-package missing instead of 1.0" in found.found
    assert "instead of 0.0.1" in found.found
    assert found.remedy == "make setup"


def listen_for_others(monkeypatch: pytest.MonkeyPatch, names: str = "relay.example.org,192.0.2.7") -> Path:
    """Set it, and give the folder of the certificates."""
    monkeypatch.setenv("TORCHRELAY_LISTEN_ADDRESS", "0.0.0.0")
    monkeypatch.setenv("TORCHRELAY_LISTEN_NAMES", names)
    config.settings.cache_clear()
    folder = config.settings().keys / "tls"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def test_certificates_are_looked_at_only_where_others_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.certificates() == []
    listen_for_others(monkeypatch)
    (found,) = [one for one in doctor.diagnose() if one.name == "certificates"]
    assert not found.ok and "server.crt" in found.found and found.remedy == "make up"


@pytest.mark.parametrize(
    ("server", "client", "says"),
    [
        ({}, {}, ""),
        ({"days": 15}, {"days": 15}, ""),
        ({"days": 13}, {}, "server.crt ends"),
        ({"days": -1}, {}, "server.crt ends"),
        ({}, {"days": 13}, "client.crt ends"),
        ({"names": ("192.0.2.7",)}, {}, "server.crt is not for relay.example.org"),
        ({"names": ("*.example.org", "192.0.2.7")}, {}, ""),
        ({"names": ("*.org", "192.0.2.7")}, {}, "server.crt is not for relay.example.org"),
        ({"names": ()}, {}, "server.crt is not for relay.example.org, 192.0.2.7"),
    ],
)
def test_a_certificate_that_ends_or_lacks_a_name(
    monkeypatch: pytest.MonkeyPatch, server: dict[str, object], client: dict[str, object], says: str
) -> None:
    authority = Authority(listen_for_others(monkeypatch))
    authority.issue("server", **{"names": ("relay.example.org", "192.0.2.7"), **server})
    authority.issue("client", **{"usage": CLIENT, **client})
    (found,) = doctor.certificates()
    assert found.ok == (not says), found.found
    assert says in found.found
    assert doctor.keys().ok


def test_the_users_own_certificate_is_the_users_to_renew(monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(listen_for_others(monkeypatch))
    authority.issue("own", names=("relay.example.org", "192.0.2.7"), days=2)
    authority.issue("client", usage=CLIENT)
    for key in ("certificate", "key"):
        monkeypatch.setenv(f"TORCHRELAY_LISTEN_{key.upper()}", f"/etc/mine.{key}")
    config.settings.cache_clear()
    (found,) = doctor.certificates()
    assert "own.crt ends" in found.found
    assert "/etc/mine.certificate" in found.remedy


def test_names_are_compared_as_callers_do(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("server", names=("Relay.Example.org", "*.lab.test", "2001:db8::7"))
    found: Certificate = read_certificate(pair.certificate)
    assert found.uncovered(("relay.example.ORG", "one.lab.test", "2001:db8:0:0::7")) == []
    assert found.uncovered(("lab.test", "a.b.lab.test", "192.0.2.7")) == ["lab.test", "a.b.lab.test", "192.0.2.7"]


def test_a_missing_lock_is_a_finding(checkout: Path) -> None:
    (checkout / "requirements" / "run.lock").unlink()
    assert [finding.found for finding in doctor.diagnose() if "run.lock" in finding.found]


@pytest.mark.parametrize("name", ["signing.pem", "webhook.secret", "webhook.secret.previous", "webhook.key"])
def test_a_key_that_others_may_read(name: str) -> None:
    private = config.settings().keys / "production" / name
    private.parent.mkdir(parents=True, mode=0o700)
    private.touch(mode=0o600)
    private.with_name("signing.pub").touch(mode=0o644)
    assert doctor.keys().ok
    private.chmod(0o640)
    assert not doctor.keys().ok
    assert doctor.keys().remedy == f"chmod 600 {private}"


def test_a_folder_of_keys_that_others_may_look_into() -> None:
    private = config.settings().keys / "production" / "signing.pem"
    private.parent.mkdir(parents=True, mode=0o755)
    private.touch(mode=0o600)
    assert not doctor.keys().ok
    assert doctor.keys().found == f"others may use {private.parent}"
    assert doctor.keys().remedy == f"chmod 700 {private.parent}"
    private.parent.chmod(0o700)
    assert doctor.keys().ok


def test_an_environment_that_was_cut_short(tmp_path: Path) -> None:
    folder = config.settings().state / "environments" / "py3-cpu-0"
    folder.mkdir(parents=True)
    assert not doctor.environments().ok
    whole = Environment(name=folder.name, variant="cpu", python=str(tmp_path), lock_sha256="0")
    write_json(folder / "environment.json", whole)
    assert doctor.environments().ok
    write_json(folder / "environment.json", whole.model_copy(update={"python": str(tmp_path / "gone")}))
    assert not doctor.environments().ok


def test_a_checkout_without_a_data_remote(checkout: Path) -> None:
    assert doctor.data_remote().ok
    (checkout / ".dvc" / "config").write_text("")
    assert not doctor.data_remote().ok


def test_a_bucket_that_is_not_to_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.bucket() == []
    monkeypatch.setenv("TORCHRELAY_BUCKET", "gs://models")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    config.settings.cache_clear()
    (found,) = doctor._checked(doctor.bucket)
    assert (found.name, found.ok) == ("bucket", False)
    assert found.remedy == "start the emulator at http://127.0.0.1:9, or unset STORAGE_EMULATOR_HOST"


def test_a_registry_that_is_lost_and_backed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.backups() == []
    monkeypatch.setenv("TORCHRELAY_BACKUP_FOLDER", str(tmp_path / "backup"))
    config.settings.cache_clear()
    site(1)
    file = tmp_path / "backup" / "registry" / "0000beef" / "0000" / "ltx" / "0" / "1-1.ltx"
    file.parent.mkdir(parents=True)
    file.touch()
    found = {finding.name: finding for finding in doctor.backups()}
    assert not found["backup of registry"].ok
    assert found["backup of registry"].remedy == "make restore"
    assert found["backup of artifacts"].ok and found["backup of keys"].ok


def test_a_port_of_somebody_else_is_named() -> None:
    assert doctor.ports().ok
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        site(port)
        assert not doctor.ports().ok
        assert f"{port} (the tracking server) is taken by" in doctor.ports().found
    assert doctor.ports().ok


def test_what_a_killed_supervisord_left_behind() -> None:
    assert doctor.supervisor().ok
    pid = config.settings().state / "supervisor" / "supervisord.pid"
    pid.parent.mkdir(parents=True)
    pid.write_text("1")
    assert not doctor.supervisor().ok
    assert "supervisord.pid" in doctor.supervisor().found


def test_a_database_that_is_not_in_wal_mode() -> None:
    assert doctor.tracking().ok
    database = site(1) / "tracking" / "mlflow.db"
    database.parent.mkdir()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE t (x)")
    assert not doctor.tracking().ok
    assert "journal mode delete" in doctor.tracking().found
    connection.execute("PRAGMA journal_mode=wal")
    assert doctor.tracking().ok
    connection.close()


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if supervisord answered."""
    monkeypatch.setattr(doctor, "_supervised", lambda: True)


class Orchestrator(BaseHTTPRequestHandler):
    """Answers /healthz, and is a tracking server that answers nothing else."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path in {"/healthz", "/health"} else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of an orchestrator that answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Orchestrator) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.usefixtures("running")
def test_an_orchestrator_that_answers_and_one_that_does_not(listening: int) -> None:
    state = site(1, f"http://127.0.0.1:{listening}")
    (found,) = doctor.orchestrators()
    assert (found.name, found.ok, found.found) == (
        "dev orchestrator",
        True,
        f"http://127.0.0.1:{listening} answers",
    )
    site(1, "http://127.0.0.1:9")
    (found,) = doctor.orchestrators()
    assert not found.ok
    assert str(state / "logs" / "dev-orchestrator.log") in found.remedy


def test_an_orchestrator_is_looked_for_only_where_one_should_run(
    listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.orchestrators() == doctor.webhooks() == []
    site(listening, f"http://127.0.0.1:{listening}")
    assert doctor.orchestrators() == doctor.webhooks() == []  # the site is down
    monkeypatch.setattr(doctor, "_supervised", lambda: True)
    site(listening)
    assert doctor.orchestrators() == doctor.webhooks() == []  # no perimeter has one
    site(9, f"http://127.0.0.1:{listening}")
    assert doctor.webhooks() == []  # the tracking server is down, which its own finding says


@pytest.mark.usefixtures("running")
def test_webhooks_are_judged_by_the_servers_own_environment(listening: int) -> None:
    site(listening, f"http://127.0.0.1:{listening}")
    found = {finding.name: finding for finding in doctor.webhooks()}
    assert found["webhook key"].found == "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY is not set"  # this very process's
    assert not found["webhook address"].ok
    assert not found["webhook"].ok
    assert all(finding.remedy for finding in found.values())


def test_a_clock_behind_the_last_commit(checkout: Path) -> None:
    assert doctor.clock().ok
    later = {"GIT_AUTHOR_DATE": "2090-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2090-01-01T00:00:00Z"}
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(
        ["git", *who, "commit", "-q", "--allow-empty", "-m", "later"],
        cwd=checkout,
        env={**os.environ, **later},
        check=True,
    )
    assert not doctor.clock().ok


def test_a_tool_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not doctor.make().ok
    assert doctor.make().remedy == "install GNU make"
