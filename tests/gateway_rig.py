"""A real gateway in front of `gateway_upstream.py`; shared by the e2e and the fault tests of the gateway."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchrelay.config import GatewayPlace, PublicPlace
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Backend, Endpoint

DIGEST = "ab" * 32
UPSTREAM = Path(__file__).with_name("gateway_upstream.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nobody listens on {port}")


@contextlib.contextmanager
def running(
    command: list[str], log: Path, ended_by: signal.Signals = signal.SIGTERM
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.send_signal(ended_by)


@contextlib.contextmanager
def upstream(
    folder: Path,
    version: str = "7",
    ended_by: signal.Signals = signal.SIGTERM,
    port: int | None = None,
    mode: str = "well",
) -> Iterator[int]:
    """Yields the port of a running upstream; it is stopped when the context ends."""
    port = port or free_port()
    command = [sys.executable, str(UPSTREAM), str(port), version, mode]
    with running(command, folder / f"upstream-{version}.log", ended_by):
        wait_for_port(port)
        yield port


@contextlib.contextmanager
def envoy(folder: Path, public: PublicPlace | None = None) -> Iterator[GatewayPlace]:
    """Yields the place of a running gateway without any route; its output goes to <folder>/envoy.log."""
    place = GatewayPlace(folder=folder / "dev" / "gateway", port=free_port(), admin_port=free_port(), public=public)
    gateway.write_bootstrap(place)
    program = gateway.gateway_program(place, folder / "envoy.log")
    with running(list(program.command), program.log):
        end = time.monotonic() + 20
        while not gateway.healthy(place):
            assert time.monotonic() < end, program.log.read_text()
            time.sleep(0.02)
        yield place


def endpoint(port: int, **others: object) -> Endpoint:
    return Endpoint.model_validate({"host": "127.0.0.1", "port": port, **others})


def modelled(port: int, **others: object) -> Endpoint:
    """An endpoint whose health is its model's, as TorchServe's is."""
    return endpoint(port, health_path="/models/digits/7", health_text='"status": "READY"', **others)


def tell(port: int, path: str) -> dict[str, Any]:
    """Ask the upstream itself: `/be/MODE`, `/seen`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        return Reply(connection.getresponse()).json()
    finally:
        connection.close()


def backend(port: int, version: str = "7", **others: object) -> Backend:
    fields: dict[str, object] = {
        "component": "digits",
        "version": version,
        "digest": DIGEST,
        "endpoints": (endpoint(port),),
        "path": f"/predictions/digits/{version}",
        "timeout_s": 5,
    }
    return Backend.model_validate(fields | others)


class Reply:
    """One answer, its headers as a list, so that a header which comes twice is seen."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = [(name.lower(), value) for name, value in response.getheaders()]
        self.body = response.read()

    def header(self, name: str) -> str:
        """The value of a header that must be there exactly once."""
        (value,) = [value for key, value in self.headers if key == name]
        return value

    def json(self) -> dict[str, Any]:
        content = json.loads(self.body)
        assert isinstance(content, dict)
        return content


def is_error(reply: Reply, status: int, request_id: str | None = None) -> str:
    """The error's text, once everything that callers rely on has been checked."""
    assert reply.status == status
    assert reply.header("content-type") == "application/json"
    content = reply.json()
    assert set(content) == {"error", "request_id"}
    assert content["request_id"] == reply.header("x-request-id")
    assert request_id in {None, content["request_id"]}
    assert not {"x-torchrelay-own-reply", "x-envoy-ratelimited"} & set(dict(reply.headers))
    return str(content["error"])


def until(condition: Callable[[], bool], seconds: float = 10) -> float:
    """Wait for it; how many seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


def ask(
    place: GatewayPlace,
    path: str = "/predictions/digits",
    method: str = "POST",
    body: Any = b"{}",
    headers: dict[str, str] | None = None,
) -> Reply:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=20)
    try:
        # A client that is still sending when the gateway has refused sees a reset, and the answer all the same.
        with contextlib.suppress(ConnectionError):
            connection.request(method, path, body=body, headers=headers or {})
        return Reply(connection.getresponse())
    finally:
        connection.close()


class Clients:
    """Clients that loop on kept connections; what they saw is in `answers` and `failures`.

    With `connect` they come by another door, and every third of them anew for each request.
    """

    def __init__(
        self,
        place: GatewayPlace,
        count: int,
        path: str = "/predictions/digits",
        body: bytes = b"{}" * 500,
        connect: Callable[[], http.client.HTTPConnection] | None = None,
    ) -> None:
        self.place, self.path, self.body = place, path, body
        self.connect = connect
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
        connection = (
            self.connect() if self.connect else http.client.HTTPConnection("127.0.0.1", self.place.port, timeout=20)
        )
        # Half of them are always in flight when something changes.
        headers = {"x-mimic": "slow=0.05"} if number % 2 else {}
        if self.connect and number % 3 == 0:
            headers["connection"] = "close"
        while not self.stopping.is_set():
            try:
                connection.request("POST", self.path, body=self.body, headers=headers)
                reply = Reply(connection.getresponse())
            except OSError as error:
                self.failures.append(repr(error))
                connection.close()
                continue
            if reply.status == 200:
                self.answers[reply.header("x-model-version")] += 1
            else:
                self.failures.append(f"{reply.status} {reply.body!r}")
        connection.close()
