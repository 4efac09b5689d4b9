"""A real gateway in front of `gateway_upstream.py`; shared by the e2e and the fault tests of the gateway."""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrelay.config import GatewayPlace
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
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def upstream(folder: Path, version: str = "7") -> Iterator[int]:
    """Yields the port of a running upstream; it is stopped when the context ends."""
    port = free_port()
    with running([sys.executable, str(UPSTREAM), str(port), version], folder / f"upstream-{version}.log"):
        wait_for_port(port)
        yield port


@contextlib.contextmanager
def envoy(folder: Path) -> Iterator[GatewayPlace]:
    """Yields the place of a running gateway without any route; its output goes to <folder>/envoy.log."""
    place = GatewayPlace(folder=folder / "dev" / "gateway", port=free_port(), admin_port=free_port())
    gateway.write_bootstrap(place)
    program = gateway.gateway_program(place, folder / "envoy.log")
    with running(list(program.command), program.log):
        end = time.monotonic() + 20
        while not gateway.healthy(place):
            assert time.monotonic() < end, program.log.read_text()
            time.sleep(0.02)
        yield place


def backend(port: int, version: str = "7", **others: object) -> Backend:
    fields: dict[str, object] = {
        "component": "digits",
        "version": version,
        "digest": DIGEST,
        "endpoints": (Endpoint(host="127.0.0.1", port=port),),
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
