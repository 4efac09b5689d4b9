"""A proxy on loopback that ends TLS for Google's hosts and answers from the fake cloud."""

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qsl, urlsplit

from certificates_rig import Authority
from fake_google.cloud import Cloud
from fake_google.discovery import APIS, Request


class Handler(BaseHTTPRequestHandler):
    """CONNECT, then HTTP inside of TLS."""

    protocol_version = "HTTP/1.1"
    server: "Proxy"
    host = ""

    def do_CONNECT(self) -> None:
        self.host = self.path.partition(":")[0]
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)  # type: ignore[assignment]
        self.close_connection = False

    def answer(self) -> None:
        url = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # A parameter without a value, as an empty filter, is none.
        request = Request(
            self.command, self.host, url.path, dict(parse_qsl(url.query)), json.loads(content) if content else None
        )
        status, found = self.server.cloud.answer(request, self.headers.get("Authorization", ""))
        body = b"" if found is None else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.rfile.close()
            self.connection.close()

    def log_message(self, *_words: object) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    """Runs while its context does; `environment` is what sends a program here."""

    daemon_threads = True

    def __init__(self, folder: Path, cloud: Cloud) -> None:
        self.cloud = cloud
        authority = Authority(folder, "google-ca")
        pair = authority.issue("google", tuple(APIS))
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(pair.certificate, pair.key)
        super().__init__(("127.0.0.1", 0), Handler)
        address = f"http://127.0.0.1:{self.server_address[1]}"
        bundle = str(authority.certificate)
        self.environment = {
            "HTTPS_PROXY": address,
            "https_proxy": address,
            "NO_PROXY": "",
            "no_proxy": "",
            "REQUESTS_CA_BUNDLE": bundle,
            "SSL_CERT_FILE": bundle,
            "GCP_ACCESS_TOKEN": cloud.token,
        }

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_words: object) -> None:
        """A client that was killed closes its connection; that is no error here."""
