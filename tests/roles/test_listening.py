"""All roles for a site that other machines reach: what they tell gateways and tracking server, and the way back."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchrelay import config, nodes
from torchrelay.config import NodeConfig, Site
from torchrelay.serving.engine import Program

ROOT = Path(__file__).resolve().parents[2]
BASE = 21700


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder configured by the real roles for all addresses of this machine."""
    folder = tmp_path_factory.mktemp("a b") / "state"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "INVENTORY", "VARIANT", "LISTEN_CERTIFICATE", "LISTEN_KEY"):
            patch.delenv(f"TORCHRELAY_{name}", raising=False)
        paths = {"ROOT": ROOT, "STATE": folder, "KEYS": folder.parent / "keys", "PORT_BASE": BASE}
        for name, value in {**paths, "LISTEN_ADDRESS": "0.0.0.0", "LISTEN_NAMES": "relay.example.org,::1"}.items():
            patch.setenv(f"TORCHRELAY_{name}", str(value))
        patch.setenv("HOME", str(folder.parent / "home"))
        yield folder
    config.settings.cache_clear()


@pytest.fixture(autouse=True)
def configured(state: Path) -> None:
    config.settings.cache_clear()
    nodes.configure(state / "logs" / "configure.log")


def changed(state: Path, name: str) -> list[str]:
    """Run the roles; the hosts on which they changed anything."""
    log = state / "logs" / f"{name}.log"
    assert nodes.configure(log) is True
    assert "WARNING" not in log.read_text()
    return re.findall(r"^(\S+) +: ok=\d+ +changed=[1-9]", log.read_text(), re.MULTILINE)


def test_every_server_is_told_of_its_door(state: Path) -> None:
    site, tls = config.site(), config.settings().keys / "tls"
    public = [site.perimeters["dev"].public, site.tracking.public, site.perimeters["production"].public]
    assert public == [f"https://relay.example.org:{BASE + offset}" for offset in (42, 43, 95)]
    assert site.tracking.url == f"http://127.0.0.1:{BASE}"
    places = [found for file in sorted(state.glob("perimeters/*/nodes/*/node.json")) if (found := gateway(file))]
    assert [(one.public.address, one.public.port) for one in places] == [("0.0.0.0", BASE + 42), ("0.0.0.0", BASE + 95)]
    front = nodes.tracking_front()
    assert (front.public.port, front.upstream_port, front.authority) == (BASE + 43, BASE, tls / "ca.crt")
    for one in (front.public, *(place.public for place in places)):
        assert (one.certificate, one.key) == (tls / "server.crt", tls / "server.key")
    ports = [port for port, _ in nodes.needed_ports(site)]
    assert {BASE + 42, BASE + 43, BASE + 95} < set(ports) and len(set(ports)) == len(ports)


def gateway(file: Path) -> config.GatewayPlace | None:
    return NodeConfig.model_validate_json(file.read_bytes()).gateway


def test_the_tracking_server_itself_stays_on_loopback_and_answers_its_names(state: Path) -> None:
    program = Program.model_validate_json((state / "tracking" / "program.json").read_bytes())
    said = dict(zip(program.command, program.command[1:], strict=False))
    assert said["--host"] == "127.0.0.1"
    assert said["--allowed-hosts"].endswith(f",relay.example.org:{BASE + 43},[::1]:{BASE + 43}")
    assert said["--cors-allowed-origins"] == f"https://relay.example.org:{BASE + 43},https://[::1]:{BASE + 43}"


def test_no_key_lies_in_the_state_folder(state: Path) -> None:
    keys = [path.read_bytes() for path in (config.settings().keys / "tls").glob("*.key")]
    assert len(keys) == 3
    assert [path for path in state.rglob("*") if path.is_file() and any(key in path.read_bytes() for key in keys)] == []


def test_a_second_run_changes_nothing(state: Path) -> None:
    (state / "configured.json").unlink()
    assert changed(state, "second") == []


@pytest.mark.parametrize(
    ("extra", "host", "message"),
    [
        ({"serving_tls_certificate": ""}, "dev-1", "listens on 0.0.0.0 for other machines only with a certificate"),
        ({"serving_tls_port": BASE + 10}, "dev-1", "a port of its own"),
        ({"tracking_tls_authority": ""}, "this-machine", "only by TLS, with a certificate of their own"),
    ],
)
def test_what_would_be_open_to_others_is_refused(
    state: Path, extra: dict[str, object], host: str, message: str
) -> None:
    command = [
        *(Path(sys.executable).with_name("ansible-playbook"), "-i", ROOT / "inventory" / "local"),
        *("-e", f"@{state / 'ansible-vars.json'}", "-e", json.dumps(extra), "--limit", host, "--check"),
        ROOT / "playbooks" / "configure-nodes.yml",
    ]
    home = {name: str(state / "ansible") for name in ("ANSIBLE_HOME", "ANSIBLE_LOCAL_TEMP", "ANSIBLE_REMOTE_TEMP")}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout
    assert message in " ".join((done.stdout + done.stderr).split())


def test_back_on_loopback_nothing_is_left_of_the_doors(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHRELAY_LISTEN_ADDRESS")
    config.settings.cache_clear()
    assert changed(state, "back") == ["dev-1", "production-gateway", "this-machine"]
    assert nodes.tracking_front() is None
    site = Site.model_validate_json((state / "site.json").read_bytes())
    assert [site.tracking.public, *(one.public for one in site.perimeters.values())] == [None] * 3
    places = [found for file in state.glob("perimeters/*/nodes/*/node.json") if (found := gateway(file))]
    assert [one.public for one in places] == [None, None]
    assert "relay.example.org" not in (state / "tracking" / "program.json").read_text()
