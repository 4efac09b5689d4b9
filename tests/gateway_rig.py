"""A real gateway in front of an upstream that answers as TorchServe does; shared by the e2e and the fault tests.

Run as a program it is that upstream: `python gateway_rig.py PORT VERSION`. It is a process of its own so that a test
can really stop it. A request's `x-mimic` header chooses another answer than the good one.
"""

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from torchrelay.config import GatewayPlace
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Backend, Endpoint

DIGEST = "ab" * 32


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nobody listens on {port}")


@contextlib.contextmanager
def running(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def upstream(folder: Path, version: str = "7") -> Iterator[int]:
    """Yields the port of a running upstream."""
    port = free_port()
    with running([sys.executable, __file__, str(port), version], folder / f"upstream-{version}.log"):
        wait_for_port(port)
        yield port


@contextlib.contextmanager
def envoy(folder: Path) -> Iterator[GatewayPlace]:
    """Yields the place of a running gateway without any route; its output goes to <folder>/envoy.log."""
    place = GatewayPlace(folder=folder / "gateway", port=free_port(), admin_port=free_port())
    gateway.write_bootstrap(place)
    program = gateway.gateway_program(place, folder / "envoy.log")
    with running(list(program.command), program.log):
        end = time.monotonic() + 10
        while not gateway.healthy(place):
            assert time.monotonic() < end, program.log.read_text()
            time.sleep(0.02)
        yield place


def backend(port: int, version: str = "7", **others: object) -> Backend:
    fields: dict[str, object] = {"component": "digits", "version": version, "digest": DIGEST, "timeout_s": 5}
    path = f"/predictions/digits/{version}"
    return Backend.model_validate({**fields, "endpoints": [Endpoint(host="127.0.0.1", port=port)], "path": path, **others})


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

    def json(self) -> dict[str, object]:
        content = json.loads(self.body)
        assert isinstance(content, dict)
        return content


def ask(place: GatewayPlace, path: str = "/predictions/digits", method: str = "POST", body: object = b"{}", **headers: str) -> Reply:
    """One request on a connection of its own; `x_mimic=` is sent as the header x-mimic."""
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body=body, headers=names)  # type: ignore[arg-type]
        return Reply(connection.getresponse())
    finally:
        connection.close()


class _Mimic:
    """The upstream: keep-alive HTTP/1.1, a request id of its own in every answer, errors as TorchServe words them."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.resets = 0

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self.connection, "127.0.0.1", port, limit=2**24)
        async with server:
            await server.serve_forever()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self.request(reader, writer):
                pass
        writer.close()

    async def request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(_pair(line) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        mimic = headers.get("x-mimic", "")
        if mimic == "reset-once" and self.resets == 0 or mimic == "reset":
            self.resets += 1
            return False
        if mimic.startswith("slow="):
            await asyncio.sleep(float(mimic[5:]))
        writer.write(self.answer(start.split()[1], headers, body, mimic))
        await writer.drain()
        return True

    def answer(self, path: str, headers: dict[str, str], body: bytes, mimic: str) -> bytes:
        if path == "/ping":
            return _response(200, {"status": "Healthy"}, {})
        if mimic.startswith("engine-"):
            status = int(mimic[7:])
            error = {"code": status, "type": "SomeException", "message": 'Model "digits" has\n no worker \\ left.'}
            return _response(status, error, {})
        served = {"x-component": "digits", "x-model-version": self.version, "x-archive-digest": DIGEST}
        if mimic.startswith("handler-"):
            error = {"error": "bad instance", "request_id": headers["x-torchrelay-request-id"]}
            return _response(int(mimic[8:]), error, served)
        seen = {"predictions": [], "path": path, "received": len(body), "headers": headers}
        return _response(200, seen, served)


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.lower(), value.strip()


def _response(status: int, content: object, headers: dict[str, str]) -> bytes:
    body = json.dumps(content, indent=2).encode() + b"\n"
    own = {"x-request-id": str(uuid.uuid4()), "server": "mimic", "content-type": "application/json"}
    all_headers = {**own, **headers, "content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    return f"HTTP/1.1 {status} Mimic\r\n{lines}\r\n".encode() + body


if __name__ == "__main__":
    asyncio.run(_Mimic(sys.argv[2]).serve(int(sys.argv[1])))
