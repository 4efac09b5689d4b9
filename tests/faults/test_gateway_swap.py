"""The gateway's promise: whatever is swapped, drained and stopped behind it, no caller sees a failed request."""

import contextlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateway_rig as rig
from torchrelay.config import GatewayPlace
from torchrelay.errors import ServingError
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Routes

pytestmark = pytest.mark.real
SWAPS = 20


class Clients:
    """Clients that loop on kept connections; what they saw is in `answers` and `failures`."""

    def __init__(self, place: GatewayPlace, count: int) -> None:
        self.place = place
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.loop, args=(number,)) for number in range(count)]

    @contextlib.contextmanager
    def looping(self) -> Iterator["Clients"]:
        for thread in self.threads:
            thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            for thread in self.threads:
                thread.join()

    def loop(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.place.port, timeout=20)
        # Half of them are always in flight when something changes.
        headers = {"x-mimic": "slow=0.05"} if number % 2 else {}
        while not self.stopping.is_set():
            try:
                connection.request("POST", "/predictions/digits", body=b"{}" * 500, headers=headers)
                reply = rig.Reply(connection.getresponse())
            except OSError as error:
                self.failures.append(repr(error))
                connection.close()
                continue
            if reply.status == 200:
                self.answers[reply.header("x-model-version")] += 1
            else:
                self.failures.append(f"{reply.status} {reply.body!r}")
        connection.close()


def drain(place: GatewayPlace, version: str) -> None:
    end = time.monotonic() + 10
    while gateway.in_flight(place, "digits", version):
        assert time.monotonic() < end, f"version {version} did not drain"
        time.sleep(0.01)


def test_no_request_is_lost_over_many_swaps(tmp_path: Path) -> None:
    with rig.envoy(tmp_path) as place, contextlib.ExitStack() as old:
        first = old.enter_context(rig.upstream(tmp_path, "0"))
        gateway.apply_routes(place, Routes(backends=(rig.backend(first, "0"),)))
        with Clients(place, 8).looping() as clients:
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
        with Clients(place, 4).looping() as clients:
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
