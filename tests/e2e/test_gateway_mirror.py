"""A version on its way in: copies of requests first, then shares of them, copied to the version before."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import gateway_rig as rig
from torchrelay.config import GatewayPlace
from torchrelay.serving import gateway, gateway_stats
from torchrelay.serving.gateway import Backend, Routes

pytestmark = pytest.mark.real


@pytest.fixture
def place(tmp_path: Path) -> Iterator[GatewayPlace]:
    with rig.envoy(tmp_path) as found:
        yield found


@pytest.fixture
def live(tmp_path: Path) -> Iterator[int]:
    with rig.upstream(tmp_path, "7") as found:
        yield found


@pytest.fixture
def candidate(tmp_path: Path) -> Iterator[int]:
    with rig.upstream(tmp_path, "8") as found:
        yield found


def mirrored(live: int, mirror: int) -> tuple[Backend, Backend]:
    return rig.backend(live, "7"), rig.backend(mirror, "8", weight=0, mirror=True, timeout_s=1)


def seen(port: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = rig.tell(port, "/seen")["seen"]
    return found


@pytest.mark.parametrize("chunked", [False, True])
def test_a_mirror_sees_the_same_request(place: GatewayPlace, live: int, candidate: int, chunked: bool) -> None:
    gateway.apply_routes(place, Routes(backends=mirrored(live, candidate)))
    lie = {"x-torchrelay-shadow": "1"}
    body = iter([b"12", b"345"]) if chunked else b"12345"
    reply = rig.ask(place, path="/predictions/digits?trace=1", body=body, headers=lie)
    assert (reply.header("x-model-version"), reply.json()["received"]) == ("7", 5)
    rig.until(lambda: len(seen(candidate)) == 1)
    (original,), (copy,) = seen(live), seen(candidate)
    for name in ("x-request-id", "x-torchrelay-request-id", "content-length"):
        assert original[name] == copy[name]
    assert reply.header("x-request-id") == copy["x-torchrelay-request-id"]
    assert (original[":path"], copy[":path"]) == ("/predictions/digits/7?trace=1", "/predictions/digits/8?trace=1")
    assert original["host"] == f"127.0.0.1:{place.port}"
    assert copy["host"] == f"127.0.0.1-shadow:{place.port}"
    assert (original.get("x-torchrelay-shadow"), copy["x-torchrelay-shadow"]) == (None, "1")
    assert set(copy) - set(original) == {"x-torchrelay-shadow"}


@pytest.mark.parametrize("mode", ["well", "hanging", "lost", "empty", "dead"])
def test_callers_get_only_the_live_versions_answer(place: GatewayPlace, live: int, candidate: int, mode: str) -> None:
    gateway.apply_routes(place, Routes(backends=mirrored(live, candidate)))
    rig.tell(candidate, f"/be/{mode}")
    start = time.monotonic()
    replies = [rig.ask(place, body=b"x" * 100_000) for _ in range(50)]
    assert time.monotonic() - start < 20
    assert {(reply.status, reply.header("x-model-version"), len(reply.headers)) for reply in replies} == {(200, "7", 7)}
    rig.until(lambda: len(seen(candidate)) == 50)


def test_a_share_of_the_requests_is_copied(place: GatewayPlace, live: int, candidate: int) -> None:
    shadow = rig.backend(candidate, "8", weight=0, mirror=True, copies=20)
    gateway.apply_routes(place, Routes(backends=(rig.backend(live, "7"), shadow)))
    for _ in range(300):
        rig.ask(place)
    rig.until(lambda: len(seen(live)) == 300)
    time.sleep(0.2)
    assert 20 < len(seen(candidate)) < 110  # 60 are expected; as far from it as chance goes in a million runs


def test_a_mirror_that_is_not_there_costs_callers_nothing(place: GatewayPlace, live: int) -> None:
    gateway.apply_routes(place, Routes(backends=mirrored(live, rig.free_port())))
    assert {rig.ask(place).header("x-model-version") for _ in range(50)} == {"7"}
    rig.until(lambda: gateway_stats.read(place).copies["digits", "8"].errors == 50)
    assert gateway_stats.counts(place)["digits", "7"].errors == 0


def test_a_mirror_that_has_stopped_reading_costs_callers_nothing(
    place: GatewayPlace, live: int, tmp_path: Path
) -> None:
    """Stopped as by SIGSTOP, with bodies that no socket's buffer holds."""
    with rig.upstream(tmp_path, "8") as port:
        process = _listening(port)
        gateway.apply_routes(place, Routes(backends=mirrored(live, port)))
        (envoy,) = [p for p in psutil.Process().children() if str(place.folder) in " ".join(p.cmdline())]
        process.send_signal(signal.SIGSTOP)
        try:
            replies = [rig.ask(place, body=b"x" * 4 * 2**20) for _ in range(40)]
            assert {(reply.status, reply.json()["received"]) for reply in replies} == {(200, 4 * 2**20)}
            assert envoy.memory_info().rss < 200 * 2**20
        finally:
            process.send_signal(signal.SIGCONT)


def _listening(port: int) -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if str(port) in p.cmdline()]
    return found


def test_a_version_keeps_its_cluster_and_copies_count_apart(place: GatewayPlace, live: int, candidate: int) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(live, "7"),)))
    stages: list[tuple[int, bool]] = [(0, False), (0, True), (5, False), (25, False), (100, False)]
    for weight, mirror in stages:
        new = rig.backend(candidate, "8", weight=weight, mirror=mirror)
        beside = rig.backend(live, "7", weight=100 - weight, mirror=0 < weight < 100)
        gateway.apply_routes(place, Routes(backends=(beside, new)))
        (share,) = [found for found in gateway.shares(place) if found.version == "8"]
        assert (share.weight, share.mirror) == (weight, mirror)
        for _ in range(40):
            rig.ask(place)
    found = gateway_stats.counts(place)
    answered = {version: one.requests for (_, version), one in found.items()}
    assert sum(answered.values()) == 5 * 40
    copied = {"7": answered["8"] - 40, "8": 40}  # nothing of the last 40 was copied
    for version, port in {"7": live, "8": candidate}.items():
        rig.until(lambda version=version, port=port: len(seen(port)) == answered[version] + copied[version])
        assert [one.get("x-torchrelay-shadow") for one in seen(port)].count("1") == copied[version]
        of_copies = gateway_stats.read(place).copies["digits", version]
        assert (of_copies.requests, of_copies.errors) == (copied[version], 0)
    assert sorted(gateway.prune(place)) == sorted({beside.copies_cluster, new.copies_cluster})


def test_a_warm_version_gets_no_request_until_it_is_swapped_in(place: GatewayPlace, live: int, candidate: int) -> None:
    warm = (rig.backend(live, "7"), rig.backend(candidate, "8", weight=0))
    gateway.apply_routes(place, Routes(backends=warm))
    assert {rig.ask(place).header("x-model-version") for _ in range(50)} == {"7"}
    assert seen(candidate) == []
    start = time.monotonic()
    gateway.apply_routes(place, Routes(backends=(rig.backend(live, "7", weight=0), rig.backend(candidate, "8"))))
    assert time.monotonic() - start < 5
    assert rig.ask(place).header("x-model-version") == "8"
    assert gateway.prune(place) == []


def test_routes_of_another_release_are_as_good_as_none(place: GatewayPlace, live: int) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(live, "7"),)))
    file = place.folder / "rds.yaml"
    other = file.read_text().replace('\\"weight\\":100', '\\"load\\":100')
    assert other != file.read_text()
    aside = file.with_suffix(".other")
    aside.write_text(other)
    subprocess.run(["mv", aside, file], check=True)
    rig.until(lambda: gateway.live_backends(place) == ())
    assert rig.ask(place).status == 200
    gateway.apply_routes(place, Routes(backends=(rig.backend(live, "7"),)))
    rig.until(lambda: len(gateway.live_backends(place)) == 1)
