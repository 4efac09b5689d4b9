"""HTTP to the MLflow server: timeouts, what may be repeated, and errors that say what to type next.

`import mlflow` costs 2-3 s and its client repeats creating requests, which can double what it creates.
Here only a request that changes nothing, or leaves the same state however often it arrives, is sent again.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from torchrelay.config import Json
from torchrelay.errors import TrackingError

# urllib3 sends any request again that never left (no connection); `read` and `status` are about those that did.
ONCE = Retry(connect=2, read=0, status=0, redirect=0, backoff_factor=0.2, allowed_methods=None)
AGAIN = Retry(
    connect=2,
    read=2,
    status=2,
    redirect=0,
    backoff_factor=0.2,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=False,
)
NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
_HASTY_S = 5.0


class AnsweredError(TrackingError):
    """The tracking server answered, and the answer is no. `code` is MLflow's error code."""

    def __init__(self, found: str, expected: str, next_command: str, code: str) -> None:
        super().__init__(found, expected, next_command)
        self.code = code


class Rest:
    """One MLflow server. Safe to share between threads; connections are kept and closed with the object."""

    def __init__(self, url: str, *, hasty: bool = False) -> None:
        """`hasty` is for whoever has more to do than to wait for a server that stumbles: 5 s, and nothing twice."""
        self.url = url.rstrip("/")
        self._again = Retry(0, redirect=0) if hasty else AGAIN
        self._once = Retry(0, redirect=0) if hasty else ONCE
        self._pool = PoolManager(maxsize=4, timeout=Timeout(connect=2.0, read=_HASTY_S if hasty else 30.0))

    def get(self, path: str, fields: Mapping[str, str] | None = None) -> Json:
        """GET `/api/2.0/mlflow/<path>`; repeated when the server stumbles."""
        return self._json(self._send("GET", self._api(path), retries=self._again, fields=fields))

    def create(self, path: str, body: Json) -> Json:
        """POST that makes something new: sent once, since the server may have acted though no answer came."""
        return self._json(self._send("POST", self._api(path), retries=self._once, json=body))

    def repeat(self, path: str, body: Json, method: str = "POST") -> Json:
        """POST, PATCH or DELETE that leaves the same state however often it arrives."""
        return self._json(self._send(method, self._api(path), retries=self._again, json=body))

    def put_file(self, path: str, content: bytes | BinaryIO, size: int) -> None:
        """Store one artifact; a file object is streamed, and rewound when it must be sent again."""
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self._send("PUT", self.artifact(path), retries=self._again, body=content, headers=headers)

    def get_file(self, path: str) -> bytes:
        """One artifact, whole in memory."""
        return self._send("GET", self.artifact(path), retries=self._again).data

    def copy_file(self, path: str, target: BinaryIO) -> None:
        """Stream one artifact into `target`; a connection that ends early is a TrackingError."""
        url = self.artifact(path)
        answer = self._send("GET", url, retries=self._again, preload_content=False)
        try:
            shutil.copyfileobj(cast(BinaryIO, answer), target, 2**20)
        except HTTPError as error:
            raise self._silent(url, error) from error
        finally:
            answer.release_conn()

    def healthy(self) -> bool:
        """Whether the server answers now; waits two seconds at most."""
        try:
            answer = self._pool.request("GET", f"{self.url}/health", retries=False, timeout=2.0)
        except HTTPError:
            return False
        return answer.status == 200

    def artifact(self, path: str) -> str:
        """URL under which the server hands out the artifact `path` (relative to its artifact store)."""
        return f"{self.url}/api/2.0/mlflow-artifacts/artifacts/{quote(path)}"

    def _api(self, path: str) -> str:
        return f"{self.url}/api/2.0/mlflow/{path}"

    def _send(self, method: str, url: str, *, retries: Retry, **options: Any) -> BaseHTTPResponse:
        try:
            answer = self._pool.request(method, url, retries=retries, **options)
        except HTTPError as error:
            raise self._silent(url, error) from error
        if answer.status >= 400:
            raise self._refused(method, url, answer)
        return answer

    def _json(self, answer: BaseHTTPResponse) -> Json:
        try:
            content = json.loads(answer.data or b"{}")
        except ValueError as error:
            raise TrackingError(
                f"{self.url} does not speak MLflow's protocol: {answer.data[:80]!r}", "JSON", "make up"
            ) from error
        return cast(Json, content)

    def _silent(self, url: str, error: HTTPError) -> TrackingError:
        why = getattr(error, "reason", None) or error  # without urllib3's account of how often it tried
        return TrackingError(f"no answer from {url}: {why}", f"the tracking server at {self.url}", "make up")

    def _refused(self, method: str, url: str, answer: BaseHTTPResponse) -> AnsweredError:
        code, message = _reason(answer.data)
        return AnsweredError(
            f"{method} {url} → {answer.status} {code}: {message[:500]}",
            "a request that the tracking server accepts",
            f"curl {self.url}/health, then read the log of the tracking server",
            code,
        )


def size_of(content: bytes | Path) -> int:
    """Bytes that an upload of `content` sends."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _reason(body: bytes) -> tuple[str, str]:
    """MLflow's error code and message; a proxy's or FastAPI's answer has neither."""
    try:
        content = json.loads(body)
    except ValueError:
        return "", body[:200].decode(errors="replace")
    if not isinstance(content, dict):
        return "", str(content)
    return str(content.get("error_code", "")), str(content.get("message", content.get("detail", "")))
