"""The site comes up, survives kills, goes down without a trace, and keeps what was stored."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import urllib3

from tests.conftest import free_port_base
from torchrelay import config, doctor, nodes, webhooks
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
        patch.setenv("TORCHRELAY_PORT_BASE", str(free_port_base()))
        patch.setenv("TORCHRELAY_POLL_S", "2")
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


def orchestrator_answers() -> bool:
    (found,) = doctor.orchestrators()
    return found.ok


def place() -> webhooks.Place:
    """Of production's webhook."""
    return webhooks.webhook_place(config.site(), "production")


def registered() -> bool:
    """Whether MLflow holds exactly production's webhook, with the present secret."""
    there = webhooks.find_webhooks(place().tracking_url, place().name)
    return len(there) == 1 and there[0].fits(place().target_url, webhooks.read_secrets(place().folder)[0])


def accepted() -> int:
    """How many deliveries the orchestrator let in since it started."""
    answer = urllib3.request("GET", f"{config.site().perimeters['production'].orchestrator}/healthz")
    return int(answer.json()["outcomes"].get("accepted", 0))


def test_the_orchestrator_registers_its_webhook_and_an_alias_wakes_it() -> None:
    eventually(orchestrator_answers)
    eventually(registered)
    time.sleep(6)  # for as long MLflow goes by what it read of its webhooks before
    before = accepted()
    version(tracking())
    tracking().set_alias("digits", "production", "1")
    eventually(lambda: accepted() > before, 10)


def version(server: Tracking) -> None:
    """Version 1 of a model, which no component of this checkout is."""
    server.ensure_model("digits")
    run = server.create_run(server.ensure_experiment("digits"), "a run", "1")
    server.create_version("digits", run.run_id, f"{run.artifact_uri}/model", {})


def test_a_webhook_that_somebody_deleted_is_registered_again() -> None:
    eventually(orchestrator_answers)
    eventually(registered)
    assert webhooks.remove_webhooks(place().tracking_url, place().name) == 1
    eventually(registered, 20)


def test_a_new_secret_is_in_force_at_once() -> None:
    eventually(orchestrator_answers)
    eventually(registered)
    old = webhooks.read_secrets(place().folder)[0]
    webhooks.change_secret(place())
    assert registered()
    assert webhooks.read_secrets(place().folder)[1] == old
    assert [finding for finding in doctor.webhooks() if not finding.ok] == []


def test_webhooks_outlive_a_restart_of_the_tracking_server() -> None:
    """They are encrypted with a key that stays, so that MLflow can read them after it."""
    eventually(registered)
    before = webhooks.find_webhooks(place().tracking_url, place().name)
    nodes.stop()
    nodes.start()
    assert [one.webhook_id for one in webhooks.find_webhooks(place().tracking_url, place().name)] == [
        one.webhook_id for one in before
    ]
    eventually(orchestrator_answers)
    assert [finding for finding in doctor.webhooks() if not finding.ok] == []


def test_starting_again_starts_nothing(state: Path) -> None:
    eventually(orchestrator_answers)
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
    eventually(orchestrator_answers)
    eventually(registered)
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
