"""A whole site that other machines reach, and the way back: what listens where, asked of the system itself."""

import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import gateway_rig as rig
from certificates_rig import Pair, https, trusting
from tests.conftest import free_port_base
from torchrelay import config, nodes
from torchrelay.handover import Desired
from torchrelay.serving import apply

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The first port of a site of its own, which is not configured yet and is down in the end."""
    found = free_port_base()
    for name in ("CONFIG", "INVENTORY", "VARIANT"):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    paths = {"ROOT": ROOT, "STATE": tmp_path / "state", "KEYS": tmp_path / "keys"}
    for name, value in {**paths, "PORT_BASE": found, "LISTEN_NAMES": "localhost,127.0.0.1"}.items():
        monkeypatch.setenv(f"TORCHRELAY_{name}", str(value))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    try:
        yield found
    finally:
        nodes.stop()
        config.settings.cache_clear()


def up(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What `make up` does, with this address; dev's gateway comes up as well, without any route."""
    monkeypatch.setenv("TORCHRELAY_LISTEN_ADDRESS", address)
    config.settings.cache_clear()
    nodes.configure(config.settings().state / "logs" / "configure.log")
    nodes.start()
    apply.apply(
        apply.node_config(config.site().perimeters["dev"].nodes[0].folder), Desired(perimeter="dev", components=())
    )


def beyond_loopback(base: int) -> set[int]:
    """The site's ports that somebody listens on for other machines, counted from its first."""
    return {
        one.laddr.port - base
        for one in psutil.net_connections(kind="tcp")
        if one.status == psutil.CONN_LISTEN and base <= one.laddr.port < base + 100 and one.laddr.ip != "127.0.0.1"
    }


def status(base: int, offset: int, path: str, client: bool = False) -> int:
    """What a caller is answered who trusts the site's CA, with the site's client certificate or without."""
    tls = config.settings().keys / "tls"
    pair = Pair(tls / "client.crt", tls / "client.key") if client else None
    connection = https(base + offset, trusting(tls / "ca.crt", pair))
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.slow
def test_doors_open_with_the_setting_and_close_with_it(base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow: the roles run for each of five changes of the setting."""
    up(monkeypatch, "127.0.0.1")
    assert beyond_loopback(base) == set()
    up(monkeypatch, "0.0.0.0")
    rig.until(lambda: beyond_loopback(base) == {42, 43})
    asked = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert status(base, 42, "/healthz") == 200
    assert status(base, 43, asked, client=True) == 200
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        status(base, 43, asked)
    nodes.stop()
    up(monkeypatch, "127.0.0.1")
    assert beyond_loopback(base) == set()
    assert not list((config.settings().state / "supervisor" / "programs").glob("tracking-front*"))
    up(monkeypatch, "0.0.0.0")
    rig.until(lambda: beyond_loopback(base) == {42, 43})
    up(monkeypatch, "127.0.0.1")  # and while it runs
    rig.until(lambda: beyond_loopback(base) == set())
