"""A minimal engine: standard library and the base handler, one process, one request at a time.

Runs in a component's interpreter: `python tiny_server.py PORT`. Predictions are `POST /v/<component>/<version>`;
`PUT` of the same path loads the archive named in the body, `DELETE` unloads, `GET /` lists what is held.
"""

import importlib
import json
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


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


class Models:
    """What is held, by path; the modules of one version never meet those of another."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Any, str]] = {}
        self.lock = threading.Lock()
        self.answered = 0

    def load(self, path: str, folder: Path, digest: str) -> None:
        with zipfile.ZipFile(folder.with_suffix(".mar")) as archive:
            archive.extractall(folder)
        sys.path.insert(0, str(folder))
        try:
            handler = importlib.import_module("torchrelay_handler").TorchrelayHandler()
            handler.initialize(Context(folder, {}))
        finally:
            for name in [file.stem for file in folder.glob("*.py")]:
                sys.modules.pop(name, None)
            sys.path[:] = [entry for entry in sys.path if entry != str(folder)]
        self.held[path] = (handler, digest)

    def predict(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        if path not in self.held:
            return 404, b'{"error": "not held"}', {}
        context = Context(Path(), headers)
        with self.lock:
            (answer,) = self.held[path][0].handle([{"body": body}], context)
            self.answered += 1
        return context.status, answer, context.response


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    models: Models

    def do_GET(self) -> None:
        if self.path == "/metrics":
            return self.reply(200, f"tiny_requests_total {self.models.answered}\n".encode())
        return self.reply(200, json.dumps({path: digest for path, (_, digest) in self.models.held.items()}).encode())

    def do_PUT(self) -> None:
        order = json.loads(self.body())
        try:
            self.models.load(self.path, Path(order["folder"]), order["digest"])
        except Exception as error:
            return self.reply(500, f"{type(error).__name__}: {error}".encode())
        return self.reply(200)

    def do_DELETE(self) -> None:
        self.models.held.pop(self.path, None)
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


if __name__ == "__main__":
    Requests.models = Models()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Requests).serve_forever()
