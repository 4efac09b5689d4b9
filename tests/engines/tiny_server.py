"""A minimal engine: standard library and the base handler, one process a version, one request of it at a time.

Runs in a component's interpreter: `python tiny_server.py PORT SECONDS`, where a request may take so many seconds.
Predictions are `POST /v/<component>/<version>`; `PUT` of the same path loads the archive named in the body, `DELETE`
unloads. `GET /` lists what can answer, `GET /held` as well what has lost its process, which nobody starts again.

A model runs in a process of its own, so that one that exits or hangs harms no other: a fork of a server that has
imported torch before, since that takes seconds.
"""

import ctypes
import importlib
import json
import multiprocessing
import resource
import signal
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_LOAD_S = 20
_MOST_BYTES = 4 * 2**30  # of address space, of which torch takes a part
_PR_SET_PDEATHSIG = 1
_FORKS = multiprocessing.get_context("forkserver")

Reply = tuple[int, bytes, dict[str, str]]


class Context:
    """As much of TorchServe's context as the base handler uses, for one request."""

    def __init__(self, folder: Path, headers: dict[str, str]) -> None:
        self.system_properties = {"model_dir": str(folder)}
        self.request, self.status, self.response = headers, 200, dict[str, str]()

    def get_all_request_header(self, index: int) -> dict[str, str]:
        return self.request

    def get_request_id(self, index: int) -> str:
        return ""

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.status = code

    def set_response_header(self, index: int, name: str, value: str) -> None:
        self.response[name] = value


def work(folder: Path, engine: Connection) -> None:
    """A model's process: load it, say "" or why not, then answer until the engine is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    try:
        sys.path.insert(0, str(folder))
        handler = importlib.import_module("torchrelay_handler").TorchrelayHandler()
        handler.initialize(Context(folder, {}))
    except Exception as error:
        engine.send(f"{type(error).__name__}: {error}")
        return
    engine.send("")
    while True:
        try:
            body, headers = engine.recv()
        except EOFError:
            return
        context = Context(folder, headers)
        (answer,) = handler.handle([{"body": body}], context)
        engine.send((context.status, answer, context.response))


class Worker:
    """The engine's end of a model's process."""

    def __init__(self, folder: Path, digest: str, timeout_s: float) -> None:
        """RuntimeError with the model's own words when it does not load."""
        self.digest, self.timeout_s, self.lock = digest, timeout_s, threading.Lock()
        self.connection, theirs = _FORKS.Pipe()
        self.process = _FORKS.Process(target=work, args=(folder, theirs), daemon=True)
        self.process.start()
        theirs.close()
        try:
            complaint = self.connection.recv() if self.connection.poll(_LOAD_S) else "it does not end loading"
        except EOFError:
            complaint = "its process ended while it loaded"
        if complaint:
            self.end()
            raise RuntimeError(complaint)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def predict(self, body: bytes, headers: dict[str, str]) -> Reply:
        if not self.lock.acquire(timeout=self.timeout_s):
            return _error(503, "too many requests wait")
        try:
            if not self.alive:
                return _error(503, "the model's process has ended")
            self.connection.send((body, headers))
            if self.connection.poll(self.timeout_s):
                found: Reply = self.connection.recv()
                return found
        except (EOFError, OSError):
            return _error(500, "the model's process ended")
        finally:
            self.lock.release()
        self.process.kill()
        return _error(500, f"no answer in {self.timeout_s:.0f} s")

    def end(self) -> None:
        self.process.terminate()
        self.process.join(3)
        self.process.kill()
        self.process.join()
        self.connection.close()


class Models:
    """What is held, by path."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s, self.answered = timeout_s, 0
        self.held: dict[str, Worker] = {}

    def load(self, path: str, folder: Path, digest: str) -> None:
        with zipfile.ZipFile(folder.with_suffix(".mar")) as archive:
            archive.extractall(folder)
        self.held[path] = Worker(folder, digest, self.timeout_s)

    def unload(self, path: str) -> None:
        if found := self.held.pop(path, None):
            found.end()

    def predict(self, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        found = self.held.get(path)
        if found is None:
            return _error(404, "not held")
        self.answered += 1
        return found.predict(body, headers)

    def listed(self) -> dict[str, dict[str, Any]]:
        return {path: {"digest": one.digest, "healthy": one.alive} for path, one in self.held.copy().items()}


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    models: Models

    def do_GET(self) -> None:
        if self.path == "/metrics":
            return self.reply(200, f"tiny_requests_total {self.models.answered}\n".encode())
        listed = self.models.listed()
        if self.path != "/held":
            listed = {path: one for path, one in listed.items() if one["healthy"]}
        return self.reply(200, json.dumps(listed).encode())

    def do_PUT(self) -> None:
        order = json.loads(self.body())
        try:
            self.models.load(self.path, Path(order["folder"]), order["digest"])
        except Exception as error:
            return self.reply(500, f"{type(error).__name__}: {error}".encode())
        return self.reply(200)

    def do_DELETE(self) -> None:
        self.models.unload(self.path)
        self.reply(200)

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.reply(*self.models.predict(self.path, self.body(), headers))

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["content-length"]))

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """No access log."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _error(status: int, what: str) -> Reply:
    return status, json.dumps({"error": what}).encode(), {}


if __name__ == "__main__":
    _FORKS.set_forkserver_preload(["torch", "safetensors.torch"])
    forkserver.ensure_running()
    Requests.models = Models(float(sys.argv[2]))
    Server(("127.0.0.1", int(sys.argv[1])), Requests).serve_forever()
