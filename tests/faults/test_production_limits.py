"""Production where something runs out: the disk, the database, the caller's patience, the requests it may get."""

import http.client
import json
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines.supervised import until
from production_rig import NAME, NODES, ORCHESTRATOR, Clients, Rig, largest, production, right, scaled

pytestmark = pytest.mark.real

MENDED_S = 35
PATIENT = Path(__file__).parents[1] / "components" / NAME / "patient.py"


@contextmanager
def unharmed(rig: Rig) -> Iterator[Clients]:
    """Clients that loop meanwhile, and notice nothing."""
    with rig.clients().looping() as clients:
        yield clients
    assert clients.seen
    assert (clients.failures[:3], clients.wrong[:3]) == ([], [])


def both(few: int, many: int) -> pytest.MarkDecorator:
    """The short way in every run, the long one where all faults run: it takes as long as it says."""
    return pytest.mark.parametrize("seconds", [few, pytest.param(many, marks=pytest.mark.whole)])


# The tracking server's database


@contextmanager
def locked(rig: Rig) -> Iterator[None]:
    """Somebody else has the database to himself: a backup, or a query without end."""
    connection = sqlite3.connect(rig.folder / "mlflow.db", timeout=30, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@both(4, 30)
def test_a_roll_out_outlasts_a_locked_database(seconds: int, rig: Rig, live: str) -> None:
    version = rig.version(scaled(1.2))
    with unharmed(rig):
        rig.promote(version)
        rig.await_stage(version, 0)
        with locked(rig):
            rig.kill_engine(NODES[0])
            time.sleep(seconds)
            assert rig.processes(ORCHESTRATOR)
        rig.await_live(version, MENDED_S)
    rig.await_told(version, "rollout", seconds=30)


@both(6, 30)
def test_a_roll_out_outlasts_a_slow_tracking_server(seconds: int, rig: Rig, live: str) -> None:
    """Three of four seconds it stands still."""
    version = rig.version(scaled(1.2))
    with unharmed(rig):
        rig.promote(version)
        rig.await_stage(version, 0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rig.pause_tracking(3)
            time.sleep(1)
        rig.await_live(version, MENDED_S)
    rig.await_told(version, "rollout", seconds=30)


# A caller who waits


class Caller(threading.Thread):
    """Sends one request that takes so many seconds, and keeps what came back."""

    def __init__(self, rig: Rig, seconds: int) -> None:
        super().__init__()
        self.port, self.instance = rig.gateway_port, [1000.0 + seconds, 0.0, 0.0, 0.0]
        self.status, self.version, self.body = 0, "", b""
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = json.dumps({"instances": [self.instance]})
        connection.request("POST", f"/predictions/{NAME}", content, {"content-type": "application/json"})
        answer = connection.getresponse()
        self.status, self.version, self.body = answer.status, answer.headers["x-model-version"], answer.read()
        connection.close()


@both(8, 20)
def test_a_long_request_is_answered_by_the_version_that_began_it(seconds: int, rig: Rig, live: str) -> None:
    """Through two swaps, of which the second one wants the version unloaded that still answers."""
    other = rig.version(scaled(1.2))
    rig.promote(other)
    rig.await_live(other)
    with rig.serving(response_timeout_s=40):
        patient = rig.version(handler=PATIENT)
        rig.promote(patient)
        rig.await_live(patient)
    caller = Caller(rig, seconds)
    time.sleep(0.5)
    for version in (other, live):
        rig.promote(version)
        until(lambda wanted=version: rig.state.live is not None and rig.state.live.version == wanted, 30)  # type: ignore[misc]
        assert caller.is_alive(), (caller.status, caller.version, caller.body)
    with unharmed(rig):
        caller.join(60)
        assert (caller.status, caller.version) == (200, patient)
        assert right(caller.instance, caller.body)
        assert largest(caller.instance) == 0
        rig.await_live(live, MENDED_S)


# More requests than allowed


@both(5, 60)
def test_ten_times_the_limit_is_refused_at_once_and_over_at_once(seconds: int, rig: Rig, live: str) -> None:
    limit = 40
    with rig.serving(max_requests_per_s=limit):
        version = rig.version(scaled(1.2))
        rig.promote(version)
        rig.await_live(version)
    with rig.clients(40, pause_s=0.1).looping() as storm:
        time.sleep(seconds)
    assert len(storm.seen) > 8 * limit * seconds
    assert {one.status for one in storm.seen} <= {200, 429, 503}
    assert storm.wrong == []
    assert max(one.milliseconds for one in storm.seen) < 2000
    assert storm.by_version[version] > 0.7 * limit * seconds

    def well() -> bool:
        time.sleep(0.5)  # a look asks six times, which must stay within the limit
        return not rig.amiss(version)

    until(well, 30)
    with rig.clients(2, pause_s=0.2).looping() as after:
        time.sleep(2)
    assert after.failures == []
    rig.promote(live)
    rig.await_live(live)


# The disk


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")


@pytest.fixture
def cramped(tmp_path_factory: pytest.TempPathFactory, component_python: str) -> Iterator[Rig]:
    """A production whose whole state, logs and archives and memory, lies on a disk of 64 MB."""
    folder = tmp_path_factory.mktemp("c")
    disk = folder / "state"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    try:
        with production(folder, component_python) as rig:
            yield rig
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not one byte is left."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@needs_root
def test_a_full_disk_stops_roll_outs_and_no_answers_and_is_over_when_there_is_room(cramped: Rig) -> None:
    """Archives, engine's models, gateway's files, logs, prediction log and the control node's memory: all are full."""
    first = cramped.version(scaled(1.0))
    cramped.promote(first)
    cramped.await_live(first)
    second = cramped.version(scaled(1.2))
    with unharmed(cramped) as clients:
        with full(cramped.state_folder):
            cramped.promote(second)
            time.sleep(4)
            cramped.kill_engine(NODES[0])
            time.sleep(4)
            assert set(clients.by_version) == {first}
        cramped.await_live(second, 60)
    cramped.await_told(second, "rollout", seconds=30)
