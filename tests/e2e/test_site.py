"""The site comes up, survives kills, goes down without a trace, and keeps what was stored."""

import os
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import urllib3

from torchrelay import config, doctor, nodes
from torchrelay.serving.ports import port_taken
from torchrelay.tracking import Tracking

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site") / "state"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "INVENTORY", "VARIANT"):
            patch.delenv(f"TORCHRELAY_{name}", raising=False)
        patch.setenv("TORCHRELAY_ROOT", str(ROOT))
        patch.setenv("TORCHRELAY_STATE", str(folder))
        patch.setenv("TORCHRELAY_KEYS", str(folder.parent / "keys"))
        patch.setenv("TORCHRELAY_PORT_BASE", str(free_base()))
        patch.setenv("HOME", str(folder.parent / "home"))
        config.settings.cache_clear()
        nodes.configure(folder / "logs" / "configure.log")
        try:
            yield folder
        finally:
            nodes.stop()
            assert ours(folder) == []
    config.settings.cache_clear()


@pytest.fixture(autouse=True)
def up(state: Path) -> None:
    nodes.start()


def free_base() -> int:
    """A port base whose three ports (tracking, gateway, gateway's admin) nobody listens on."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            base = int(probe.getsockname()[1])
        if base < 65000 and not any(map(port_taken, (base, base + 10, base + 11))):
            return base


def ours(state: Path) -> list[psutil.Process]:
    """Every process that belongs to this state folder, supervisord included."""
    found = []
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        belongs = str(state / "supervisor") in environment.get("SUPERVISOR_SERVER_URL", "")
        if belongs or str(state / "supervisor" / "supervisord.conf") in words:
            found.append(process)
    return found


def family(state: Path) -> list[psutil.Process]:
    """MLflow's own process and the server that is its child; nothing while it starts again."""
    with suppress(psutil.Error):
        for process in ours(state):
            if str(state / "tracking" / "artifacts") in process.cmdline():
                return [process, *process.children(recursive=True)]
    return []


def eventually(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.2)


def tracking() -> Tracking:
    return Tracking(config.site().tracking.url)


def test_starting_again_starts_nothing(state: Path) -> None:
    # The node's keeper starts the gateway when it first looks.
    eventually(lambda: port_taken(config.settings().port_base + 10))
    before = {process.pid for process in ours(state)}
    nodes.start()
    assert {process.pid for process in ours(state)} == before


def test_nothing_is_lost_across_down_and_up(state: Path) -> None:
    number = tracking().ensure_experiment("kept")
    nodes.stop()
    assert ours(state) == []
    nodes.stop()
    assert not list((state / "supervisor").glob("supervisord.[sp]*d"))
    nodes.start()
    assert tracking().ensure_experiment("kept") == number


def test_the_database_stays_in_wal_mode(state: Path) -> None:
    tracking().ensure_experiment("wal")
    connection = sqlite3.connect(state / "tracking" / "mlflow.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_only_named_hosts_are_answered_and_only_on_loopback() -> None:
    url = config.site().tracking.url
    with urllib3.PoolManager() as pool:
        path = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
        assert pool.request("GET", path).status == 200
        assert pool.request("GET", path, headers={"host": "evil.example"}).status == 403
    port = int(url.rpartition(":")[2])
    listening = {found.laddr.ip for found in psutil.net_connections("tcp") if found.laddr and found.laddr.port == port}
    assert listening == {"127.0.0.1"}


def test_nothing_is_written_to_the_home_folder(state: Path) -> None:
    assert {path.name for path in state.parent.iterdir()} <= {"state", "keys"}


def test_the_verifier_and_the_doctor_agree_that_all_is_well(state: Path) -> None:
    nodes.verify(state / "logs" / "verify.log")
    findings = {finding.name: finding for finding in doctor.diagnose()}
    assert "answers" in findings["tracking"].found
    assert not [finding for finding in findings.values() if not finding.ok]


@pytest.mark.parametrize("child", [False, True], ids=["leader", "server"])
def test_a_killed_tracking_server_comes_back_by_itself(state: Path, child: bool) -> None:
    old = family(state)
    os.kill(old[-1 if child else 0].pid, signal.SIGKILL)
    eventually(lambda: not any(process.is_running() for process in old))
    eventually(tracking().healthy)
    eventually(lambda: len(family(state)) == len(old))


def test_a_killed_supervisord_is_recovered_from(state: Path) -> None:
    daemon = next(process for process in ours(state) if "supervisor.supervisord" in process.cmdline())
    old = ours(state)
    daemon.kill()
    daemon.wait(10)
    assert not doctor.supervisor().ok
    nodes.start()
    assert tracking().healthy()
    assert not any(process.is_running() for process in old)


def test_stop_ends_what_a_killed_supervisord_left(state: Path) -> None:
    daemon = next(process for process in ours(state) if "supervisor.supervisord" in process.cmdline())
    daemon.kill()
    daemon.wait(10)
    assert ours(state)
    nodes.stop()
    assert ours(state) == []
    assert not any(port_taken(port) for port, _ in nodes.needed_ports(config.site()))


def test_a_supervisord_without_its_socket_is_replaced(state: Path) -> None:
    old = ours(state)
    (state / "supervisor" / "supervisord.sock").unlink()
    nodes.start()
    assert tracking().healthy()
    assert not any(process.is_running() for process in old)
