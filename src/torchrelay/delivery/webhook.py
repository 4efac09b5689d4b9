"""The orchestrator's ear: an HTTP endpoint that MLflow's registry webhooks and `make promote` knock at.

Nothing of what arrives is believed. An authentic delivery, once, wakes the orchestrator, which reads the registry
itself; so a lost, doubled or late delivery costs seconds at most. The answer never waits for what the wake leads to.
"""

import asyncio
import ipaddress
import logging
import re
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from torchrelay.errors import BusyError, ConfigError, ServingError
from torchrelay.webhooks import read_secrets, signed_by_any

LARGEST_BODY = 64 * 2**10
TOLERANCE_S = 300
# A delivery is let in while its time is at most TOLERANCE_S away. Its id is kept by that same time, and for longer, so
# that no step of the clock under ten minutes lets it in again.
KEEP_S = 900
# Together under the second in which a sender gets its answer.
_BODY_S = 0.5
_RECORD_S = 0.4
_CONNECTION_S = 2.0
_BETWEEN_WAKES_S = 0.1
_LARGEST_HEAD = 16 * 2**10
_START_S = 10

_STATUS = {
    **dict.fromkeys(("accepted", "duplicate", "woken"), 200),
    "malformed": 400,
    **dict.fromkeys(("forged", "stale"), 401),
    "foreign": 403,
    "slow": 408,
    "oversized": 413,
    "gone": 499,
    **dict.fromkeys(("unkeyed", "unrecorded"), 503),
}
# MLflow makes UUIDs. Dots divide what is signed, so an id that could hold one would let a signed body be cut anew.
_ID = re.compile(r"[0-9a-f-]{36}", re.ASCII)
_TIMESTAMP = re.compile(r"[0-9]{1,11}", re.ASCII)
_log = logging.getLogger(__name__)


class Receiver:
    """Listens on `host`:`port` (0: any free one) from `start` to `stop`, in threads of its own.

    `secrets` is the folder that `torchrelay.webhooks` keeps secrets in; it is read at every delivery, so that a
    rotation needs no restart. `seen` is an SQLite file for the ids of deliveries, which lets none in twice, also after
    a restart. `wake` gets a reason for the log; it runs in one thread, never twice at a time nor more than ten times a
    second, and what arrives while it runs becomes one more call.

    A process that was killed between taking a delivery and acting on it must read the registry when it starts.
    """

    def __init__(self, host: str, port: int, secrets: Path, seen: Path, wake: Callable[[str], None]) -> None:
        self._host, self._port = host, port
        self._secrets = secrets
        self._seen = _Seen(seen)
        self._waker = _Waker(wake)
        self._recorder = ThreadPoolExecutor(1, "webhook-ids")
        self._outcomes: Counter[str] = Counter()
        self._last = 0.0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """What MLflow must be told to send to."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/webhook"

    @property
    def outcomes(self) -> dict[str, int]:
        """How often each outcome came about since the start."""
        return dict(self._outcomes)

    def start(self) -> None:
        """Listen. Raises BusyError if somebody else has the port."""
        listener = _listen(self._host, self._port)
        self._port = listener.getsockname()[1]
        self._server = uvicorn.Server(_config(self._application()))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="webhooks", daemon=True)
        self._waker.start()
        self._thread.start()
        self._wait_until_it_serves(self._server, self._thread)

    def stop(self) -> None:
        """Answer what has come in, then listen no more. Waits for a wake that runs, for a second."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join()
        self._recorder.shutdown()
        self._seen.close()
        self._waker.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_it_serves(self, server: uvicorn.Server, thread: threading.Thread) -> None:
        deadline = time.monotonic() + _START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise ServingError(f"nothing serves {self.url}", "a thread that does", "read the log of this program")
            time.sleep(0.01)

    def _application(self) -> Starlette:
        routes = [
            Route("/webhook", self._webhook, methods=["POST"]),
            Route("/wake", self._wake, methods=["POST"]),
            Route("/healthz", self._healthz, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_thing})

    async def _webhook(self, request: Request) -> Response:
        try:
            delivery_id, signed_at = await self._authenticate(request)
            return self._answer(await self._record(delivery_id, signed_at))
        except _RefusedError as refusal:
            return self._answer(refusal.outcome, refusal.found)
        except ClientDisconnect:
            return self._answer("gone", "the sender hung up")

    async def _wake(self, request: Request) -> Response:
        if request.client is None or not ipaddress.ip_address(request.client.host).is_loopback:
            return self._answer("foreign", "only programs on this machine may wake it without a signature")
        self._waker.notify("wake")
        return self._answer("woken")

    async def _healthz(self, _: Request) -> Response:
        content = {
            "status": "ok",
            "outcomes": self.outcomes,
            "last_accepted": self._last or None,
            "wakes": self._waker.wakes,
            "failed_wakes": self._waker.failed,
        }
        return JSONResponse(content)

    def _answer(self, outcome: str, error: str = "") -> Response:
        self._outcomes[outcome] += 1
        if error:
            _log.warning("webhook %s: %s", outcome, error)
        content = {"outcome": outcome, **({"error": error} if error else {})}
        return JSONResponse(content, _STATUS[outcome])

    async def _authenticate(self, request: Request) -> tuple[str, int]:
        """Id and time of a delivery that was signed with a secret of ours within the last five minutes."""
        delivery_id = _header(request, "x-mlflow-delivery-id", _ID)
        timestamp = _header(request, "x-mlflow-timestamp", _TIMESTAMP)
        signature = request.headers.get("x-mlflow-signature", "")
        body = await _body(request)
        if not signed_by_any(self._keys(), delivery_id, timestamp, body, signature):
            raise _RefusedError("forged", "the signature is not one of our secrets over this id, time and body")
        if abs(age := time.time() - int(timestamp)) > TOLERANCE_S:
            raise _RefusedError("stale", f"signed {age:.0f} s ago, {TOLERANCE_S} s are let in: a replay, or a clock")
        return delivery_id, int(timestamp)

    def _keys(self) -> tuple[str, ...]:
        try:
            return read_secrets(self._secrets)
        except (ConfigError, OSError) as error:
            _log.exception("no webhook can be checked")
            raise _RefusedError("unkeyed", "the receiver has no secret that it may use: see its log") from error

    async def _record(self, delivery_id: str, signed_at: int) -> str:
        """Keep the id, and wake if it is new. One that could not be kept wakes nobody: MLflow sends it again."""
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._recorder, self._take, delivery_id, signed_at)
        try:
            new = await asyncio.wait_for(work, _RECORD_S)
        except (sqlite3.Error, OSError, TimeoutError) as error:
            _log.exception("the id of delivery %s was not kept", delivery_id)
            raise _RefusedError("unrecorded", "the receiver cannot keep ids now: send it again") from error
        return "accepted" if new else "duplicate"

    def _take(self, delivery_id: str, signed_at: int) -> bool:
        """Runs in the recorder's thread, and to its end, also if the sender has got its answer by then."""
        new = self._seen.claim(delivery_id, signed_at)
        if new:
            self._last = time.time()
            self._waker.notify(f"webhook {delivery_id}")
        return new


class _RefusedError(Exception):
    """A delivery is not let in."""

    def __init__(self, outcome: str, found: str) -> None:
        super().__init__(found)
        self.outcome, self.found = outcome, found


class _Seen:
    """Ids of deliveries in an SQLite file. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def claim(self, delivery_id: str, signed_at: int) -> bool:
        """Keep the id on disk; False if it was there. Raises sqlite3.Error or OSError; the next call starts afresh."""
        try:
            return self._claim(self._opened(), delivery_id, signed_at)
        except sqlite3.Error:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _claim(self, connection: sqlite3.Connection, delivery_id: str, signed_at: int) -> bool:
        with connection:
            connection.execute("DELETE FROM seen WHERE signed_at < ?", (time.time() - KEEP_S,))
            added = connection.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (delivery_id, signed_at))
            return added.rowcount == 1

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._connected()
        return self._connection

    def _connected(self) -> sqlite3.Connection:
        try:
            return _connect(self._path)
        except sqlite3.OperationalError:  # locked, or the disk is full: the file is not to blame
            raise
        except sqlite3.DatabaseError:
            _log.exception("%s is broken; ids are kept in a new one", self._path)
            for file in self._path.parent.glob(f"{self._path.name}*"):
                file.unlink()
            return _connect(self._path)


def _connect(path: Path) -> sqlite3.Connection:
    """A kill loses nothing in this mode; a power cut may lose the last ids, and a start reads the registry anyway."""
    connection = sqlite3.connect(path, timeout=_RECORD_S / 2, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=wal")
        connection.execute("PRAGMA synchronous=normal")
        connection.execute("CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, signed_at INTEGER) WITHOUT ROWID")
        connection.execute("CREATE INDEX IF NOT EXISTS by_time ON seen (signed_at)")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


class _Waker(threading.Thread):
    """Calls `wake` for what it is notified of, one call at a time; what comes meanwhile is one call."""

    def __init__(self, wake: Callable[[str], None]) -> None:
        super().__init__(name="webhook-wake", daemon=True)
        self._wake = wake
        self._condition = threading.Condition()
        self._reason, self._pending, self._stopped = "", 0, False
        self.wakes = 0
        self.failed = 0

    def notify(self, reason: str) -> None:
        """Ask for a call; returns at once."""
        with self._condition:
            self._reason, self._pending = reason, self._pending + 1
            self._condition.notify()

    def stop(self) -> None:
        """Make no more calls."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self.join(1)

    def run(self) -> None:
        """Call until stopped."""
        while reason := self._next():
            self._call(reason)
            time.sleep(_BETWEEN_WAKES_S)

    def _next(self) -> str:
        with self._condition:
            self._condition.wait_for(lambda: self._pending or self._stopped)
            more, self._pending = self._pending - 1, 0
            if self._stopped:
                return ""
            return f"{self._reason} and {more} more" if more else self._reason

    def _call(self, reason: str) -> None:
        self.wakes += 1
        try:
            self._wake(reason)
        except Exception:  # whatever it is, the next delivery must still find somebody to call
            self.failed += 1
            _log.exception("the wake for %s failed", reason)


class _Connection(H11Protocol):
    """One that ends by itself, so that no sender can hold the program's file descriptors by being slow."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_CONNECTION_S, transport.abort)


def _config(application: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        http=_Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # One request a connection: MLflow then meets no connection that died while this program was away.
        headers=[("connection", "close")],
        h11_max_incomplete_event_size=_LARGEST_HEAD,
        timeout_graceful_shutdown=1,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise BusyError(f"{host}:{port}: {error.strerror}", "an address that is free", "make doctor") from error


def _header(request: Request, name: str, form: re.Pattern[str]) -> str:
    value = request.headers.get(name, "")
    if not form.fullmatch(value):
        raise _RefusedError("malformed", f"{name} is {value[:80]!r}")
    return value


async def _body(request: Request) -> bytes:
    """The raw body. What the sender says of its length is not asked: what arrives is counted."""
    found = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                found += chunk
                if len(found) > LARGEST_BODY:
                    raise _RefusedError("oversized", f"the body is larger than {LARGEST_BODY} bytes")
    except TimeoutError as error:
        raise _RefusedError("slow", f"the body was not there within {_BODY_S} s") from error
    return bytes(found)


async def _no_such_thing(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return JSONResponse({"outcome": "malformed", "error": str(getattr(error, "detail", error))}, status)
