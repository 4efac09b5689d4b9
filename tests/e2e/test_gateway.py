"""A real Envoy in front of an upstream that answers as TorchServe does: ids, headers, errors, limits, routes."""

import json
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import gateway_rig as rig
from torchrelay.config import GatewayPlace
from torchrelay.errors import ServingError
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Routes

pytestmark = pytest.mark.real
BIG = 100 * 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with rig.upstream(folder) as found:
        yield found


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[GatewayPlace]:
    with rig.envoy(folder) as found:
        yield found


@pytest.fixture
def place(running: GatewayPlace, port: int) -> GatewayPlace:
    """The gateway, routing version 7 of digits."""
    gateway.apply_routes(running, Routes(backends=(rig.backend(port),)))
    gateway.prune(running)
    return running


@pytest.mark.parametrize("given", ["my-id:1.2_3", "a", "x" * 128])
def test_a_well_formed_request_id_is_kept(place: GatewayPlace, given: str) -> None:
    reply = rig.ask(place, headers={"x-request-id": given})
    assert reply.header("x-request-id") == given
    assert reply.json()["headers"]["x-torchrelay-request-id"] == given


def test_an_id_in_the_form_of_a_uuid_is_not_touched(place: GatewayPlace) -> None:
    for given in (str(uuid.uuid4()) for _ in range(20)):
        assert rig.ask(place, headers={"x-request-id": given}).header("x-request-id") == given


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "a,b", "é", "<script>", 'q"', "a\tb"])
def test_any_other_id_is_replaced(place: GatewayPlace, given: str | None) -> None:
    reply = rig.ask(place, headers={} if given is None else {"x-request-id": given})
    made = reply.header("x-request-id")
    assert str(uuid.UUID(made)) == made
    assert reply.json()["headers"]["x-torchrelay-request-id"] == made


def test_callers_cannot_set_the_handlers_id_or_envoys_own_headers(place: GatewayPlace) -> None:
    lies = {"x-torchrelay-request-id": "evil", "x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-retry-on": "5xx"}
    for mimic in ("slow=0.05", ""):
        seen = rig.ask(place, headers={**lies, "x-mimic": mimic})
        assert seen.json()["headers"]["x-torchrelay-request-id"] == seen.header("x-request-id") != "evil"
        assert not [name for name in seen.json()["headers"] if name.startswith("x-envoy")]


def test_two_ids_count_as_malformed(place: GatewayPlace) -> None:
    start = b"POST /predictions/digits HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n"
    answer = raw(place, start + b"x-request-id: first\r\nx-request-id: second\r\n\r\n")
    assert answer.startswith("HTTP/1.1 200")
    assert answer.lower().count("\r\nx-request-id:") == 1
    assert "first" not in answer and "second" not in answer


def raw(place: GatewayPlace, request: bytes) -> str:
    with socket.create_connection(("127.0.0.1", place.port), timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received.decode()


def test_a_prediction_passes_with_the_workers_headers_and_no_noise(place: GatewayPlace) -> None:
    reply = rig.ask(place, path="/predictions/digits?trace=1", body=b"x" * 1000)
    assert (reply.status, reply.json()["received"]) == (200, 1000)
    assert reply.json()["path"] == "/predictions/digits/7?trace=1"
    assert reply.header("x-component") == "digits"
    assert reply.header("x-model-version") == "7"
    assert reply.header("x-archive-digest") == rig.DIGEST
    assert not [name for name, _ in reply.headers if name == "server" or name.startswith("x-envoy")]


def test_a_handlers_error_passes_as_it_is(place: GatewayPlace) -> None:
    reply = rig.ask(place, headers={"x-mimic": "handler-422"})
    assert rig.is_error(reply, 422) == "bad instance"
    assert reply.header("x-model-version") == "7"


@pytest.mark.parametrize("status", [400, 404, 413, 500, 503, 507])
def test_the_engines_own_errors_get_our_form(place: GatewayPlace, status: int) -> None:
    reply = rig.ask(place, headers={"x-mimic": f"engine-{status}", "x-request-id": "mine"})
    assert rig.is_error(reply, status, "mine") == 'Model "digits"\nhas no \\ worker.'


def test_a_lost_engine_is_asked_again_and_then_reported(place: GatewayPlace) -> None:
    before = gateway.retries(place)
    assert "upstream" in rig.is_error(rig.ask(place, headers={"x-mimic": "reset"}), 503)
    assert gateway.retries(place) == before + 2


def test_a_late_engine_is_given_up(place: GatewayPlace, port: int) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(port, timeout_s=1),)))
    assert rig.is_error(rig.ask(place, headers={"x-mimic": "slow=3"}), 504) == "upstream request timeout"


def test_other_methods_and_paths(place: GatewayPlace) -> None:
    wrong = rig.ask(place, method="GET", body=None)
    assert "POST" in rig.is_error(wrong, 405)
    assert wrong.header("allow") == "POST"
    assert "one of: digits" in rig.is_error(rig.ask(place, path="/predictions/other"), 404)
    for path in ("/", "/predictions", "/predictions/digits/7", "/models", "/ping", "/metrics"):
        rig.is_error(rig.ask(place, path=path), 404)


@pytest.mark.parametrize("request_bytes", [b"GARBAGE\r\n\r\n", b"POST / HTTP/1.1\r\nno colon\r\n\r\n"])
def test_what_is_not_http_still_gets_our_form(place: GatewayPlace, request_bytes: bytes) -> None:
    head, body = raw(place, request_bytes).split("\r\n\r\n", 1)
    assert head.startswith("HTTP/1.1 400")
    assert f"x-request-id: {json.loads(body)['request_id']}" in head


def test_healthz(place: GatewayPlace) -> None:
    reply = rig.ask(place, path="/healthz", method="GET", body=None)
    assert (reply.status, reply.header("content-type")) == (200, "application/json")
    assert (reply.json()["status"], reply.json()["components"]) == ("ok", ["digits"])
    assert rig.ask(place, path="/healthz", method="HEAD", body=None).status == 200
    rig.is_error(rig.ask(place, path="/healthz"), 405)
    assert gateway.healthy(place)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_refused_without_being_kept(place: GatewayPlace, chunked: bool) -> None:
    (envoy,) = [p for p in psutil.Process().children() if str(place.folder) in " ".join(p.cmdline())]
    before = envoy.memory_info().rss
    rig.is_error(rig.ask(place, body=iter([b"x" * 2**20] * 100) if chunked else b"x" * BIG), 413)
    assert envoy.memory_info().rss - before < BIG / 4
    assert rig.ask(place).status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_the_limit_is_the_backends(place: GatewayPlace, port: int, chunked: bool) -> None:
    gateway.apply_routes(place, Routes(backends=(rig.backend(port, max_body_bytes=2000),)))
    for size, status in ((2000, 200), (2001, 413)):
        body = iter([b"x" * 1000, b"x" * (size - 1000)]) if chunked else b"x" * size
        assert rig.ask(place, body=body).status == status


def test_routes_are_applied_once_and_read_back(place: GatewayPlace, port: int) -> None:
    routes = Routes(backends=(rig.backend(port),))
    assert gateway.live_backends(place) == routes.backends
    assert not gateway.apply_routes(place, routes)
    assert gateway.apply_routes(place, Routes())
    assert gateway.live_backends(place) == ()
    assert "none yet" in rig.is_error(rig.ask(place), 404)
    assert gateway.prune(place) == [routes.backends[0].cluster]
    assert gateway.prune(place) == []


def test_backends_share_by_weight(place: GatewayPlace, port: int, folder: Path) -> None:
    with rig.upstream(folder, "8") as other:
        warm = rig.backend(rig.free_port(), "9", weight=0)
        backends = (rig.backend(port, weight=3), rig.backend(other, "8", weight=1), warm)
        gateway.apply_routes(place, Routes(backends=backends))
        seen = Counter(rig.ask(place).header("x-model-version") for _ in range(400))
        assert 50 < seen["8"] < 150
        assert seen["7"] + seen["8"] == 400
        assert [(share.version, share.weight) for share in gateway.shares(place)] == [("7", 3), ("8", 1), ("9", 0)]


def test_a_new_backend_is_warmed_before_it_is_routed(place: GatewayPlace, port: int) -> None:
    start = time.monotonic()
    gateway.apply_routes(
        place, Routes(backends=(rig.backend(port, endpoints=[rig.endpoint(port, health_path="/slow")]),))
    )
    assert time.monotonic() - start > 0.9


@pytest.mark.parametrize("broken", ["path", "health_path"])
def test_what_envoy_refuses_changes_nothing(place: GatewayPlace, port: int, broken: str) -> None:
    point = rig.endpoint(port, health_path="/a\nb" if broken == "health_path" else "/ping")
    path = "/a\nb" if broken == "path" else "/predictions/digits/8"
    before = gateway.live_backends(place)
    with pytest.raises(ServingError, match=r"Envoy refuses.*does not match regex"):
        gateway.apply_routes(place, Routes(backends=(rig.backend(port, "8", endpoints=(point,), path=path),)))
    assert gateway.live_backends(place) == before
    assert rig.ask(place).header("x-model-version") == "7"
    assert not gateway.apply_routes(place, Routes(backends=before))


def logged(folder: Path) -> list[str]:
    """The lines of the access log; Envoy's own words about itself are in the same file."""
    return [line for line in (folder / "envoy.log").read_text().splitlines() if line.startswith('{"')]


def test_the_access_log_is_one_json_line_a_request(place: GatewayPlace, folder: Path) -> None:
    rig.ask(place, headers={"x-request-id": "logged-1"})
    end = time.monotonic() + 10
    while not (lines := [x for x in logged(folder) if '"logged-1"' in x]):
        assert time.monotonic() < end
        time.sleep(0.1)
    entry = json.loads(lines[0])
    assert (entry["component"], entry["version"], entry["status"], entry["attempts"]) == ("digits", "7", 200, 1)
    assert "/healthz" not in {json.loads(line)["path"] for line in logged(folder)}


def test_envoy_finds_no_fault_with_the_bootstrap(place: GatewayPlace) -> None:
    command = [str(gateway.envoy_binary()), "-c", str(place.folder / "envoy.yaml"), "--mode", "validate"]
    done = subprocess.run([*command, "--log-level", "warning"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_comes_back_with_its_routes(tmp_path: Path, port: int) -> None:
    with rig.envoy(tmp_path) as place:
        gateway.apply_routes(place, Routes(backends=(rig.backend(port),)))
    command = list(gateway.gateway_program(place, tmp_path / "again.log").command)
    with rig.running(command, tmp_path / "again.log"):
        rig.wait_for_port(place.port)
        assert rig.ask(place).status == 200
        assert not gateway.apply_routes(place, Routes(backends=(rig.backend(port),)))


def test_a_second_gateway_on_the_port_does_not_start(place: GatewayPlace, tmp_path: Path) -> None:
    second = place.model_copy(update={"folder": tmp_path / "gateway", "admin_port": rig.free_port()})
    gateway.write_bootstrap(second)
    command = list(gateway.gateway_program(second, tmp_path / "second.log").command)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert f"cannot bind '127.0.0.1:{place.port}'" in done.stderr
