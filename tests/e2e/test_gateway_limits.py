"""More requests than declared, or than can be answered: refused at once, and over when they are over."""

import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateway_rig as rig
from torchrelay.config import GatewayPlace
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Routes

pytestmark = pytest.mark.real
LIMIT = 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[GatewayPlace]:
    with rig.envoy(tmp_path) as found:
        yield found


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with rig.upstream(tmp_path) as found:
        yield found


def test_ten_times_the_limit_is_refused_at_once_and_leaves_nothing_behind(place: GatewayPlace, port: int) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(port, max_requests_per_s=LIMIT),)))
    seconds, slowest, seen = 3, 0.0, Counter[int]()
    start = time.monotonic()
    for number in range(10 * LIMIT * seconds):
        time.sleep(max(0.0, start + number / (10 * LIMIT) - time.monotonic()))
        asked = time.monotonic()
        reply = rig.ask(place, body=iter([b"{}"]) if number % 2 else b"{}")
        slowest = max(slowest, time.monotonic() - asked)
        seen[reply.status] += 1
        if reply.status != 200:
            assert "more requests a second" in rig.is_error(reply, 429)
            assert reply.header("retry-after") == "1"
    assert slowest < 1
    # The bucket is full at first; both forms of a body take from the same one.
    took = time.monotonic() - start
    assert LIMIT * (took - 1) <= seen[200] <= LIMIT * (took + 1.5)
    time.sleep(1.1)
    assert {rig.ask(place).status for _ in range(LIMIT)} == {200}


def test_shares_take_from_one_limit_and_other_components_from_none(
    place: GatewayPlace, port: int, tmp_path: Path
) -> None:
    with rig.upstream(tmp_path, "8") as other:
        both = rig.backend(port, weight=50, max_requests_per_s=1), rig.backend(other, "8", max_requests_per_s=LIMIT)
        mail = rig.backend(port, component="mail")
        gateway.apply_routes(place, Routes(backends=(*both, mail)))
        start = time.monotonic()
        seen = Counter(rig.ask(place).status for _ in range(5 * LIMIT))
        assert LIMIT <= seen[200] <= LIMIT * (1.5 + time.monotonic() - start)
        assert {rig.ask(place, path="/predictions/mail").status for _ in range(5 * LIMIT)} == {200}
        assert rig.ask(place, path="/healthz", method="GET", body=None).status == 200


def test_a_limit_that_is_taken_away_is_gone(place: GatewayPlace, port: int) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(port, max_requests_per_s=1),)))
    assert 429 in {rig.ask(place).status for _ in range(20)}
    gateway.apply_routes(place, Routes(backends=(rig.backend(port),)))
    assert {rig.ask(place).status for _ in range(50)} == {200}


def test_more_than_can_wait_is_refused_at_once(place: GatewayPlace, port: int) -> None:
    """1024 connections are busy and some requests wait: all others get a 503 before any of these has its answer."""
    gateway.apply_routes(place, Routes(backends=(rig.backend(port, max_pending=60, timeout_s=20),)))
    start = time.monotonic()
    answers = [(status, after - start) for status, after in ask_together(place, 1300)]
    seen = Counter(status for status, _ in answers)
    assert seen[200] + seen[503] == 1300
    assert seen[200] >= 500 and seen[503] >= 1300 - 1024 - 60
    assert max(after for status, after in answers if status == 503) < 4
    assert rig.ask(place).status == 200


def ask_together(place: GatewayPlace, count: int) -> Iterator[tuple[int, float]]:
    """Status and time of each answer to `count` requests that an engine takes five seconds for."""
    with selectors.DefaultSelector() as waiting:
        for _ in range(count):
            waiting.register(_asking(place), selectors.EVENT_READ)
            # Time for the gateway to open a connection: one that is being opened counts as waiting.
            time.sleep(0.001)
        while waiting.get_map():
            for key, _ in waiting.select(20):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                yield int(connection.recv(12)[9:]), time.monotonic()
                waiting.unregister(connection)
                connection.close()


def _asking(place: GatewayPlace) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", place.port), timeout=20)
    connection.sendall(b"POST /predictions/digits HTTP/1.1\r\nhost: x\r\nx-mimic: slow=5\r\ncontent-length: 0\r\n\r\n")
    return connection
