"""The gateway's promise: whatever is swapped, drained, stopped or killed behind it, no caller sees a failed request."""

import contextlib
import http.client
import signal
import time
from pathlib import Path

import pytest

import gateway_rig as rig
from torchrelay.config import GatewayPlace
from torchrelay.errors import ServingError
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Routes

pytestmark = pytest.mark.real
SWAPS = 20


def drain(place: GatewayPlace, version: str) -> None:
    end = time.monotonic() + 10
    while gateway.in_flight(place, "digits", version):
        assert time.monotonic() < end, f"version {version} did not drain"
        time.sleep(0.01)


def test_no_request_is_lost_over_many_swaps(tmp_path: Path) -> None:
    with rig.envoy(tmp_path) as place, contextlib.ExitStack() as old:
        first = old.enter_context(rig.upstream(tmp_path, "0"))
        gateway.apply_routes(place, Routes(backends=(rig.backend(first, "0"),)))
        with rig.Clients(place, 8).looping() as clients:
            for number in range(1, SWAPS + 1):
                new = contextlib.ExitStack()
                port = new.enter_context(rig.upstream(tmp_path, str(number)))
                gateway.apply_routes(place, Routes(backends=(rig.backend(port, str(number)),)))
                drain(place, str(number - 1))
                old.close()
                old.push(new)
                assert len(gateway.prune(place)) == 1
        assert clients.failures == []
        assert set(clients.answers) == {str(number) for number in range(SWAPS + 1)}
        assert gateway.retries(place) == 0


def test_no_request_is_lost_from_shadow_to_all(tmp_path: Path) -> None:
    """Five roll-outs by stages; each candidate hangs while it is a shadow, and is well when it answers callers."""
    with rig.envoy(tmp_path) as place, contextlib.ExitStack() as old:
        live = rig.backend(old.enter_context(rig.upstream(tmp_path, "0")), "0")
        gateway.apply_routes(place, Routes(backends=(live,)))
        with rig.Clients(place, 8).looping() as clients:
            for number in range(1, 6):
                new = contextlib.ExitStack()
                port = new.enter_context(rig.upstream(tmp_path, str(number)))
                for weight in (0, 5, 25, 100):
                    rig.tell(port, "/be/well" if weight else "/be/hanging")
                    candidate = rig.backend(port, str(number), weight=weight, mirror=not weight)
                    staying = live.model_copy(update={"weight": 100 - weight, "mirror": 0 < weight < 100})
                    gateway.apply_routes(place, Routes(backends=(staying, candidate)))
                    time.sleep(0.3)
                gateway.apply_routes(place, Routes(backends=(candidate,)))
                drain(place, live.version)
                old.close()
                old.push(new)
                assert live.cluster in gateway.prune(place)
                live = candidate
        assert clients.failures == []
        assert set(clients.answers) == {str(number) for number in range(6)}
        assert gateway.retries(place) == 0


def test_an_engine_that_dies_comes_back_empty_and_recovers_costs_no_request(tmp_path: Path) -> None:
    """One of two, under more clients than the gateway may retry by share alone."""
    with rig.envoy(tmp_path) as place, rig.upstream(tmp_path, "one") as one, contextlib.ExitStack() as first:
        two = first.enter_context(rig.upstream(tmp_path, "two", signal.SIGKILL))
        points = rig.modelled(one), rig.modelled(two)
        gateway.apply_routes(place, Routes(backends=(rig.backend(one, endpoints=points),)))
        with rig.Clients(place, 40).looping() as clients:
            rig.until(lambda: clients.answers["two"] > 100)
            first.close()
            time.sleep(3)
            with rig.upstream(tmp_path, "again", port=two, mode="empty"):
                time.sleep(3)
                assert clients.answers["again"] == 0
                rig.tell(two, "/be/well")
                rig.until(lambda: clients.answers["again"] > 0)
                rig.tell(two, "/be/dead")
                time.sleep(1)
                rig.tell(two, "/be/well")
                time.sleep(1)
                clients.stopping.set()
        assert clients.failures == []
        assert gateway.retries(place) > 0


def test_a_slow_upload_ends_where_it_began(tmp_path: Path) -> None:
    """A request that is still being sent when routes change counts as in flight, so its backend is not stopped."""
    with rig.envoy(tmp_path) as place, rig.upstream(tmp_path, "1") as one, rig.upstream(tmp_path, "2") as two:
        gateway.apply_routes(place, Routes(backends=(rig.backend(one, "1"),)))
        connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=20)
        connection.putrequest("POST", "/predictions/digits")
        connection.putheader("content-length", "4")
        connection.endheaders(b"ab")
        time.sleep(0.2)
        gateway.apply_routes(place, Routes(backends=(rig.backend(two, "2"),)))
        assert gateway.in_flight(place, "digits", "1") == 1
        assert gateway.prune(place) == []
        assert rig.ask(place).header("x-model-version") == "2"
        connection.send(b"cd")
        assert rig.Reply(connection.getresponse()).header("x-model-version") == "1"
        connection.close()
        drain(place, "1")
        assert gateway.prune(place) == [rig.backend(one, "1").cluster]


def test_a_refused_configuration_costs_no_request(tmp_path: Path) -> None:
    with rig.envoy(tmp_path) as place, rig.upstream(tmp_path, "1") as port:
        gateway.apply_routes(place, Routes(backends=(rig.backend(port, "1"),)))
        with rig.Clients(place, 4).looping() as clients:
            for _ in range(5):
                with pytest.raises(ServingError):
                    gateway.apply_routes(place, Routes(backends=(rig.backend(port, "2", path="/a\nb"),)))
        assert clients.failures == []
        assert set(clients.answers) == {"1"}


def test_a_kill_between_clusters_and_routes_is_mended_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig.envoy(tmp_path) as place, rig.upstream(tmp_path, "1") as one, rig.upstream(tmp_path, "2") as two:
        gateway.apply_routes(place, Routes(backends=(rig.backend(one, "1"),)))
        with monkeypatch.context() as patched:
            patched.setattr(gateway, "_active_clusters", _killed)
            with pytest.raises(KeyboardInterrupt):
                gateway.apply_routes(place, Routes(backends=(rig.backend(two, "2"),)))
        assert rig.ask(place).header("x-model-version") == "1"
        assert gateway.apply_routes(place, Routes(backends=(rig.backend(two, "2"),)))
        assert rig.ask(place).header("x-model-version") == "2"


def _killed(place: GatewayPlace) -> set[str]:
    raise KeyboardInterrupt
