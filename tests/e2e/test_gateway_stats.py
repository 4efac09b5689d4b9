"""What a real Envoy counts: answers, errors, timeouts and times of each version, and nothing else."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import gateway_rig as rig
from torchrelay.config import GatewayPlace
from torchrelay.errors import ServingError
from torchrelay.serving import gateway, gateway_stats
from torchrelay.serving.gateway import Routes
from torchrelay.serving.gateway_stats import BackendCounts

pytestmark = pytest.mark.real


@pytest.fixture
def place(tmp_path: Path) -> Iterator[GatewayPlace]:
    with rig.envoy(tmp_path) as found:
        yield found


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with rig.upstream(tmp_path) as found:
        yield found


def of(place: GatewayPlace, version: str = "7") -> BackendCounts:
    return gateway_stats.counts(place)["digits", version]


def copies(place: GatewayPlace) -> BackendCounts:
    return gateway_stats.read(place).copies["digits", "8"]


def settled(place: GatewayPlace, timed: int, version: str = "7") -> BackendCounts:
    """The counts once the histogram, which comes last, holds so many requests."""
    rig.until(lambda: of(place, version).timed == timed, 5)
    return of(place, version)


def ask(place: GatewayPlace, mimic: str, times: int = 1) -> None:
    for _ in range(times):
        rig.ask(place, headers={"x-mimic": mimic})


def test_answers_errors_and_times(place: GatewayPlace, port: int) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(port, timeout_s=1),)))
    assert of(place) == BackendCounts()
    ask(place, "", 20)
    ask(place, "slow=0.2", 3)
    ask(place, "slow=0.5", 2)
    ask(place, "handler-422", 4)
    ask(place, "engine-503", 5)
    ask(place, "slow=2")
    found = settled(place, 20 + 3 + 2 + 4 + 5 + 1)
    assert (found.requests, found.errors, found.timeouts) == (35, 6, 1)
    assert [found.slower_than(ms) for ms in (0, 150, 450, 900)] == [35, 6, 3, 1]
    assert found.quantile(0.5) < 50
    assert 190 <= found.quantile(0.88) <= 300
    assert found.quantile(1) == float("inf")


def test_times_follow_within_two_seconds(place: GatewayPlace, port: int) -> None:
    """Each round begins just after Envoy has merged its histograms, so each waits for a whole interval."""
    gateway.apply_routes(place, Routes(backends=(rig.backend(port),)))
    for seen in (5, 10, 15):
        ask(place, "", 5)
        assert rig.until(partial(_timed, place, seen)) < 2.5


def _timed(place: GatewayPlace, seen: int) -> bool:
    return of(place).timed == seen


def test_what_reaches_no_engine_counts_as_its_error(place: GatewayPlace) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(rig.free_port()),)))
    ask(place, "", 7)
    assert (of(place).requests, of(place).errors) == (7, 7)


def test_refusals_retries_and_health_checks_do_not_count(place: GatewayPlace, port: int) -> None:
    backend = rig.backend(port, endpoints=(rig.modelled(port),), max_requests_per_s=5, max_body_bytes=100)
    gateway.apply_routes(place, Routes(backends=(backend,)))
    ask(place, "reset-once")
    assert gateway.retries(place) == 1
    rig.is_error(rig.ask(place, body=b"x" * 101), 413)
    good = sum(rig.ask(place).status == 200 for _ in range(20))
    assert good < 20
    time.sleep(2.5)
    assert (of(place).requests, of(place).errors) == (1 + good, 0)


def test_a_mirrors_answers_count_for_the_mirror(place: GatewayPlace, port: int, tmp_path: Path) -> None:
    with rig.upstream(tmp_path, "8") as other:
        mirror = rig.backend(other, "8", weight=0, mirror=True)
        gateway.apply_routes(place, Routes(backends=(rig.backend(port, timeout_s=1), mirror)))
        ask(place, "", 10)
        rig.until(lambda: copies(place).requests == 10)
        rig.tell(other, "/be/dead")
        ask(place, "", 5)
        rig.until(lambda: copies(place).requests == 15)
        rig.tell(other, "/be/hanging")
        ask(place, "", 2)
        rig.until(lambda: copies(place).timed == 17, 5)
        found = copies(place)
        assert of(place, "8") == BackendCounts()
        assert (found.requests, found.errors, found.timeouts) == (17, 7, 2)
        assert (of(place).requests, of(place).errors) == (17, 0)


def test_versions_are_told_apart_whatever_they_are_called(place: GatewayPlace, port: int) -> None:
    versions = ["7", "7.1", "1.upstream_rq_5xx", "7-dev_2"]
    for number, version in enumerate(versions, start=1):
        gateway.apply_routes(place, Routes(backends=(rig.backend(port, version, path="/predictions/digits"),)))
        ask(place, "engine-500", number)
    assert {version: found.errors for (_, version), found in gateway_stats.counts(place).items()} == {
        version: number for number, version in enumerate(versions, start=1)
    }


def test_other_endpoints_go_on_with_the_versions_count(place: GatewayPlace, port: int, tmp_path: Path) -> None:
    with rig.upstream(tmp_path, "other") as other:
        gateway.apply_routes(place, Routes(backends=(rig.backend(port),)))
        before = gateway_stats.read(place)
        ask(place, "", 10)
        gateway.apply_routes(place, Routes(backends=(rig.backend(port, endpoints=(rig.endpoint(other),)),)))
        ask(place, "", 4)
        assert gateway_stats.read(place).since(before).versions["digits", "7"].requests == 14
        between = gateway_stats.read(place)
        assert len(gateway.prune(place)) == 1
        ask(place, "", 3)
        assert of(place).requests == 7
        assert gateway_stats.read(place).since(between).versions["digits", "7"].requests == 3


def test_a_restart_is_noticed(tmp_path: Path, port: int) -> None:
    with rig.envoy(tmp_path) as place:
        gateway.apply_routes(place, Routes(backends=(rig.backend(port),)))
        ask(place, "", 3)
        before = gateway_stats.read(place)
        assert gateway_stats.epoch(place) == before.epoch
    with pytest.raises(ServingError, match="no gateway runs"):
        gateway_stats.counts(place)
    command = list(gateway.gateway_program(place, tmp_path / "again.log").command)
    with rig.running(command, tmp_path / "again.log"):
        rig.wait_for_port(place.port)
        ask(place, "", 5)
        after = gateway_stats.read(place)
        assert after.epoch != before.epoch
        assert after.since(before).versions["digits", "7"].requests == 5


def test_a_look_is_cheap_beside_many_versions(place: GatewayPlace, port: int) -> None:
    backends = [rig.backend(port, str(version), weight=1) for version in range(30)]
    gateway.apply_routes(place, Routes(backends=tuple(backends)))
    ask(place, "", 60)
    start = time.process_time()
    for _ in range(20):
        assert len(gateway_stats.counts(place)) == 30
    assert (time.process_time() - start) / 20 < 0.05
