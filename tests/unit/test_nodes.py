"""When the roles run and when they need not, with a fake ansible-playbook that writes what the roles would."""

import json
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from certificates_rig import CLIENT, Authority
from torchrelay import config, nodes
from torchrelay.archive import rotation
from torchrelay.errors import BusyError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
FAKE = """#!{python}
import json, pathlib, sys
count = pathlib.Path({folder!r}) / "runs"
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
variables = json.loads(pathlib.Path(sys.argv[sys.argv.index("--extra-vars") + 1][1:]).read_text())
print("TASK [tracking : Check what the server is asked for] ****")
if (pathlib.Path({folder!r}) / "fail").exists():
    print("[ERROR]: Task failed: The tracking server needs a port")
    sys.exit(2)
state, base = pathlib.Path(variables["checkout_state"]), variables["checkout_port_base"]
node = state / "perimeters/dev/nodes/dev-1"
for folder in (state / "tracking", state / "supervisor", node / "trust"):
    folder.mkdir(parents=True, exist_ok=True)
(state / "tracking/mlflow.db").touch()
(state / "tracking/with-key").touch()
key = pathlib.Path(variables["checkout_keys"]) / "tracking/webhook.key"
key.parent.mkdir(parents=True, exist_ok=True)
key.touch(mode=0o600)
orchestrator = {{"name": "o", "command": ["/bin/sleep", "60"], "directory": str(state), "log": str(state / "o.log")}}
(state / "perimeters/production").mkdir(parents=True, exist_ok=True)
(state / "perimeters/production/orchestrator.json").write_text(json.dumps(orchestrator))
(state / "tracking/program.json").write_text(json.dumps(
    {{"name": "tracking", "command": ["/bin/sleep", "60"], "directory": str(state), "log": str(state / "t.log")}}))
socket = state / "supervisor/supervisord.sock"
(state / "supervisor/supervisord.conf").write_text(f"[unix_http_server]\\nfile={{socket}}\\n")
(state / "site.json").write_text(json.dumps(
    {{"supervisor": str(socket), "tracking": {{"url": f"http://127.0.0.1:{{base}}"}},
     "perimeters": {{name: {{"alias": name, "gateway": f"http://127.0.0.1:{{base + 10}}", "gateway_node": "dev-1",
                            "nodes": [{{"name": "dev-1", "folder": str(node)}}], **more}}
                    for name, more in (("dev", {{}}),
                                       ("production", {{"orchestrator": f"http://127.0.0.1:{{base + 52}}"}}))}}}}))
gateway = {{"folder": str(state), "port": base + 10, "admin_port": base + 11}}
(node / "node.json").write_text(json.dumps(
    {{"name": "dev-1", "perimeter": "dev", "folder": str(node), "engine_ports": [1, 2], "gateway": gateway}}
    | {{key: str(state) for key in ("supervisor", "programs", "logs", "environments", "java_home")}}
    | {{key: str(state) for key in ("trust", "predictions")}}))
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    for name in ("config", "roles", "playbooks", "inventory"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "ansible.cfg", folder)
    (folder / "Snakefile").touch()
    (folder / "components").mkdir()
    fake = folder / "bin" / "ansible-playbook"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake.with_name("python")))
    for name, value in {"ROOT": folder, "STATE": folder / ".torchrelay", "KEYS": tmp_path / "keys"}.items():
        monkeypatch.setenv(f"TORCHRELAY_{name}", str(value))
    monkeypatch.delenv("TORCHRELAY_CONFIG", raising=False)
    use_ports(monkeypatch, 18500)
    return folder


def use_ports(monkeypatch: pytest.MonkeyPatch, base: int) -> None:
    monkeypatch.setenv("TORCHRELAY_PORT_BASE", str(base))
    config.settings.cache_clear()


@pytest.fixture(autouse=True)
def no_settings_left() -> object:
    yield
    config.settings.cache_clear()


def configure() -> bool:
    return nodes.configure(config.settings().state / "logs" / "configure.log")


def test_roles_run_once(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert configure() is True
    assert "role tracking" in capfd.readouterr().err
    assert configure() is False
    assert (checkout / "runs").read_text() == "1"
    assert [port for port, _ in nodes.needed_ports(config.site())] == [
        *(18500, 18510, 18511),  # both perimeters of this site have the same node
        *(18510, 18511, 18552),
    ]


def test_signing_keys_are_made_for_every_perimeter(checkout: Path) -> None:
    configure()
    for perimeter in ("dev", "production"):
        private = config.settings().keys / perimeter / "signing.pem"
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
        assert private.with_name("signing.pub").is_file()


def test_a_lost_webhook_key_runs_the_roles_which_say_what_is_lost(checkout: Path) -> None:
    configure()
    nodes.webhook_key().unlink()
    assert configure() is True


def test_a_rotation_reaches_the_nodes(checkout: Path) -> None:
    configure()
    folder = config.settings().keys / "production"
    rotation.prepare(folder)
    assert configure() is True
    assert configure() is False
    rotation.switch(folder)
    rotation.retire(folder)
    assert configure() is True


@pytest.mark.parametrize(
    "file",
    ["roles/control/tasks/main.yml", "inventory/local/hosts.yml", "playbooks/configure-nodes.yml", "ansible.cfg"],
)
def test_an_edited_role_runs_again(checkout: Path, file: str) -> None:
    configure()
    (checkout / file).write_text((checkout / file).read_text() + "\n# edited\n")
    assert configure() is True
    assert configure() is False


def test_other_ports_run_the_roles_again(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure()
    use_ports(monkeypatch, 19500)
    assert configure() is True
    assert json.loads((config.settings().state / "ansible-vars.json").read_text())["checkout_port_base"] == 19500


@pytest.mark.parametrize(
    "file", ["site.json", "perimeters/dev/nodes/dev-1/node.json", "tracking/mlflow.db", "tracking/with-key"]
)
def test_a_deleted_file_is_written_again(checkout: Path, file: str) -> None:
    configure()
    (config.settings().state / file).unlink()
    assert configure() is True
    assert (config.settings().state / file).is_file()


def test_an_edited_file_is_put_right(checkout: Path) -> None:
    configure()
    (config.settings().state / "site.json").write_text("{}")
    assert configure() is True
    assert config.site().tracking.url == "http://127.0.0.1:18500"


def test_a_new_key_reaches_the_nodes(checkout: Path) -> None:
    configure()
    shutil.rmtree(config.settings().keys / "dev")
    assert configure() is True


def listen_for_others(monkeypatch: pytest.MonkeyPatch, **more: object) -> Authority:
    """The setting, and the certificates that the roles would make."""
    for name, value in {"ADDRESS": "0.0.0.0", "NAMES": "relay.example.org", **more}.items():
        monkeypatch.setenv(f"TORCHRELAY_LISTEN_{name}", str(value))
    config.settings.cache_clear()
    folder = config.settings().keys / "tls"
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority(folder)
    authority.issue("server", ("relay.example.org",))
    authority.issue("client", usage=CLIENT)
    return authority


@pytest.mark.parametrize("name", ["server", "client"])
def test_a_certificate_that_is_due_runs_the_roles(checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    authority = listen_for_others(monkeypatch)
    assert configure() is True
    assert configure() is False
    authority.issue(name, ("relay.example.org",), days=31)
    assert configure() is True  # it was replaced by somebody
    assert configure() is False
    authority.issue(name, ("relay.example.org",), days=29)
    assert configure() is True
    assert configure() is True  # still due: these roles make none
    authority.issue(name, ("relay.example.org",))
    configure()
    (config.settings().keys / "tls" / f"{name}.crt").write_text("broken")
    assert configure() is True


def test_the_users_own_certificate_runs_the_roles_when_it_changes(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pair = Authority(tmp_path).issue("mine", ("relay.example.org",), days=5)
    listen_for_others(monkeypatch, CERTIFICATE=pair.certificate, KEY=pair.key)
    assert configure() is True
    assert configure() is False
    pair.certificate.write_text(pair.certificate.read_text() + "\n")
    assert configure() is True
    assert configure() is False


def test_an_address_of_another_machine_is_refused_before_any_change(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHRELAY_LISTEN_ADDRESS", "192.0.2.7")  # nobody has it: kept for documents
    monkeypatch.setenv("TORCHRELAY_LISTEN_NAMES", "relay.example.org")
    config.settings.cache_clear()
    with pytest.raises(ConfigError) as caught:
        configure()
    assert "192.0.2.7, where this machine cannot listen" in caught.value.found
    assert not (checkout / "runs").exists()


def test_a_failed_task_speaks_for_itself_and_is_tried_again(checkout: Path) -> None:
    (checkout / "fail").touch()
    with pytest.raises(ConfigError) as caught:
        configure()
    assert "Check what the server is asked for" in caught.value.found
    assert "The tracking server needs a port" in caught.value.found
    assert "configure.log" in caught.value.next_command
    (checkout / "fail").unlink()
    assert configure() is True


def test_a_port_of_somebody_else_is_named_before_anything_starts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        use_ports(monkeypatch, port - 10)
        configure()
        with pytest.raises(BusyError) as caught:
            nodes.start()
    assert f"port {port}, needed for the dev gateway" in caught.value.found
    assert not (config.settings().state / "supervisor" / "supervisord.pid").exists()


def test_stopping_what_was_never_started_does_nothing(checkout: Path) -> None:
    nodes.stop()
    configure()
    nodes.stop()
    nodes.stop()


LEG = """import sys
from pathlib import Path
from torchrelay.console import run_logged
child = "import subprocess; p = subprocess.Popen(['sleep', '60']); print('up', flush=True); p.wait()"
run_logged([sys.argv[1], "-c", child], Path(sys.argv[2]), show=lambda line: line == "up\\n")
"""


def _orphaned_leg(python: str, log: Path) -> list[psutil.Process]:
    """What a leg that was killed leaves behind: its child and that one's child."""
    leg = subprocess.Popen([python, "-c", LEG, python, str(log)], stderr=subprocess.PIPE, text=True)
    assert leg.stderr is not None
    with leg, leg.stderr:
        assert leg.stderr.readline() == "up\n"
        orphans = psutil.Process(leg.pid).children(recursive=True)
        leg.kill()
    return orphans


def test_a_training_that_outlived_its_leg_is_stopped_too(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _orphaned_leg(PYTHON, tmp_path / "ours.log")
    with monkeypatch.context() as patch:
        patch.setenv("TORCHRELAY_STATE", str(tmp_path / "another"))
        others = _orphaned_leg(PYTHON, tmp_path / "others.log")
    try:
        nodes.stop()
        assert not psutil.wait_procs(ours, timeout=10)[1]
        assert others
        assert all(process.is_running() for process in others)
    finally:
        for process in (*ours, *others):
            if process.is_running():
                process.kill()
