"""An upstream that answers as TorchServe does, for tests of the gateway; started with port, version and mode.

A process of its own, so that a test can really stop it, and without any import that would make it slow to start.
A request's `x-mimic` header chooses another answer than the good one: `engine-503` an error in TorchServe's own form,
`handler-422` one that the handler made, `slow=0.5` an answer after half a second, `reset` none at all.
GET /be/MODE changes what it is for all requests to come: `well`, `empty` (as after a crash: no model), `dead` (a model
without worker), `hanging` or `lost` (no answer, which its health does not show). GET /seen tells the predictions asked.
"""

import asyncio
import contextlib
import json
import sys
import uuid

DIGEST = "ab" * 32


class Mimic:
    """Keep-alive HTTP/1.1 with a request id of its own in every answer."""

    def __init__(self, version: str, mode: str) -> None:
        self.version = version
        self.resets = 0
        self.mode = mode
        self.seen: list[dict[str, str]] = []

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
        path = start.split()[1]
        if path.startswith("/predictions/"):
            self.seen.append({**headers, ":path": path})
            if self.mode in {"hanging", "lost"}:
                await asyncio.sleep(3600 if self.mode == "hanging" else 0)
                return False
        if mimic == "reset" or (mimic == "reset-once" and self.resets == 0):
            self.resets += 1
            return False
        if mimic.startswith("slow=") or path == "/slow":
            await asyncio.sleep(float(mimic[5:] or 1))
        writer.write(self.answer(path, headers, body, mimic))
        await writer.drain()
        return True

    def answer(self, path: str, headers: dict[str, str], body: bytes, mimic: str) -> bytes:
        if path in {"/ping", "/slow"}:
            return _response(200, {"status": "Healthy"}, {})
        if path == "/seen":
            return _response(200, {"seen": self.seen}, {})
        if path.startswith("/be/"):
            self.mode = path[4:]
            return _response(200, {"status": self.mode}, {})
        if path.startswith("/models/"):
            return self.model()
        if self.mode in {"empty", "dead"}:
            mimic = "engine-404" if self.mode == "empty" else "engine-503"
        if mimic.startswith("engine-"):
            status = int(mimic[7:])
            error = {"code": status, "type": "SomeException", "message": 'Model "digits"\nhas no \\ worker.'}
            return _response(status, error, {"content-type": "text/plain"})
        served = {"x-component": "digits", "x-model-version": self.version, "x-archive-digest": DIGEST}
        if mimic.startswith("handler-"):
            error = {"error": "bad instance", "request_id": headers["x-torchrelay-request-id"]}
            return _response(int(mimic[8:]), error, served)
        return _response(200, {"path": path, "received": len(body), "headers": headers}, served)

    def model(self) -> bytes:
        """The model as TorchServe describes it, its workers last."""
        if self.mode == "empty":
            return _response(404, {"code": 404, "message": "Model not found"}, {})
        state = "UNLOADING" if self.mode == "dead" else "READY"
        return _response(200, [{"modelName": "digits", "padding": "x" * 2000, "workers": [{"status": state}]}], {})


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.lower(), value.strip()


def _response(status: int, content: object, headers: dict[str, str]) -> bytes:
    body = json.dumps(content, indent=2).encode() + b"\n"
    own = {"x-request-id": str(uuid.uuid4()), "server": "mimic", "content-type": "application/json"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**own, **headers}.items())
    return f"HTTP/1.1 {status} Mimic\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


if __name__ == "__main__":
    asyncio.run(Mimic(*sys.argv[2:]).serve(int(sys.argv[1])))
