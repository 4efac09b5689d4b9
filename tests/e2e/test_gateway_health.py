"""Engines that are up and yet cannot answer for a model: put aside, asked again elsewhere, and taken back."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateway_rig as rig
from torchrelay.config import GatewayPlace
from torchrelay.handover import Endpoint
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Routes

pytestmark = pytest.mark.real
OUT_S, BACK_S = 3.0, 2.0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[GatewayPlace]:
    with rig.envoy(tmp_path) as found:
        yield found


@pytest.fixture
def one(tmp_path: Path) -> Iterator[int]:
    with rig.upstream(tmp_path, "one") as found:
        yield found


@pytest.fixture
def two(tmp_path: Path) -> Iterator[int]:
    with rig.upstream(tmp_path, "two") as found:
        yield found


def route(place: GatewayPlace, *endpoints: Endpoint, **others: object) -> None:
    """Route to these endpoints, of which each answers with its own version; and wait until all are known healthy."""
    backend = rig.backend(endpoints[0].port, endpoints=endpoints, **others)
    gateway.apply_routes(place, Routes(backends=(backend,)))
    rig.until(lambda: answering(place) >= {"one"})


def answering(place: GatewayPlace) -> set[str]:
    replies = [rig.ask(place) for _ in range(8)]
    assert {reply.status for reply in replies} == {200}
    return {reply.header("x-model-version") for reply in replies}


@pytest.mark.parametrize("mode", ["empty", "dead"])
def test_a_model_that_is_gone_is_put_aside_and_taken_back(place: GatewayPlace, one: int, two: int, mode: str) -> None:
    route(place, rig.modelled(one), rig.modelled(two))
    rig.until(lambda: answering(place) == {"one", "two"})
    rig.tell(two, f"/be/{mode}")
    asked = len(rig.tell(two, "/seen")["seen"])
    rig.until(lambda: answering(place) == {"one"}, OUT_S)
    # Put aside, not only asked again elsewhere: it sees no request at all any more.
    rig.until(lambda: _quiet(place, two), OUT_S)
    assert len(rig.tell(two, "/seen")["seen"]) > asked
    rig.tell(two, "/be/well")
    rig.until(lambda: answering(place) == {"one", "two"}, BACK_S)


def _quiet(place: GatewayPlace, port: int) -> bool:
    before = len(rig.tell(port, "/seen")["seen"])
    answering(place)
    return len(rig.tell(port, "/seen")["seen"]) == before


def test_health_is_asked_at_its_own_port(place: GatewayPlace, one: int, two: int, tmp_path: Path) -> None:
    with rig.upstream(tmp_path, "management") as management:
        route(place, rig.modelled(one), rig.modelled(two, health_port=management))
        rig.until(lambda: answering(place) == {"one", "two"})
        rig.tell(management, "/be/empty")
        rig.until(lambda: _quiet(place, two), OUT_S)
        assert answering(place) == {"one"}


def test_a_lone_sick_engine_is_still_asked(place: GatewayPlace, one: int) -> None:
    """A health check may be wrong; with nobody else to ask, the engine's own answer is the better one."""
    route(place, rig.modelled(one, health_port=rig.free_port()))
    time.sleep(OUT_S)
    assert answering(place) == {"one"}


def test_of_three_the_healthy_one_answers_all(place: GatewayPlace, one: int, two: int, tmp_path: Path) -> None:
    with rig.upstream(tmp_path, "three") as three:
        route(place, rig.modelled(one), rig.modelled(two), rig.modelled(three))
        for port in (two, three):
            rig.tell(port, "/be/empty")
        rig.until(lambda: _quiet(place, two) and _quiet(place, three), OUT_S)
        assert answering(place) == {"one"}


@pytest.mark.parametrize("mimic", ["engine-404", "engine-500", "engine-503", "engine-507", "reset"])
def test_what_only_one_engine_says_is_asked_elsewhere(place: GatewayPlace, one: int, two: int, mimic: str) -> None:
    """Of two engines that both fail, each has been asked."""
    route(place, rig.endpoint(one), rig.endpoint(two))
    reply = rig.ask(place, headers={"x-mimic": mimic})
    rig.is_error(reply, int(mimic[7:] or 503))
    request_id = reply.header("x-request-id")
    assert {request_id} <= _asked(one) & _asked(two)
    assert gateway.retries(place) >= 1


def _asked(port: int) -> set[str]:
    return {headers["x-torchrelay-request-id"] for headers in rig.tell(port, "/seen")["seen"]}


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_handlers_complaint_is_final(place: GatewayPlace, one: int, two: int, status: int) -> None:
    route(place, rig.endpoint(one), rig.endpoint(two))
    reply = rig.ask(place, headers={"x-mimic": f"handler-{status}"})
    assert rig.is_error(reply, status) == "bad instance"
    request_id = reply.header("x-request-id")
    assert (request_id in _asked(one)) != (request_id in _asked(two))
    assert gateway.retries(place) == 0


def test_a_lone_engine_is_asked_again_only_when_lost(place: GatewayPlace, one: int) -> None:
    route(place, rig.endpoint(one))
    for status in (404, 500, 503, 507):
        rig.is_error(rig.ask(place, headers={"x-mimic": f"engine-{status}"}), status)
    assert gateway.retries(place) == 0
    assert rig.ask(place, headers={"x-mimic": "reset-once"}).status == 200
    assert gateway.retries(place) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_can_be_sent_again(place: GatewayPlace, one: int, chunked: bool) -> None:
    route(place, rig.endpoint(one))
    size = 4 * 2**20
    body = iter([b"x" * 2**20] * 4) if chunked else b"x" * size
    reply = rig.ask(place, body=body, headers={"x-mimic": "reset-once"})
    assert (reply.status, reply.json()["received"]) == (200, size)
