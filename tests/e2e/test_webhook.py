"""An alias moved in a real MLflow server reaches the receiver; what keeps it from arriving is found."""

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import urllib3
from cryptography.fernet import Fernet

from torchrelay.delivery.webhook import Receiver
from torchrelay.errors import TrackingError
from torchrelay.tracking import Tracking
from torchrelay.webhooks import (
    ensure_secret,
    ensure_webhook,
    find_webhooks,
    findings,
    read_secrets,
    remove_webhooks,
    rotate_webhook,
    sign,
)

from .conftest import MLFLOW, free_port

pytestmark = pytest.mark.real

NAME = "torchrelay-production"
CACHE_S = 3
LOCAL = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}


@dataclass
class Server:
    """A real MLflow server that can be started again with another environment over the same database."""

    folder: Path
    url: str
    environment: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self, **environment: str) -> None:
        self.environment = environment
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        fixed = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env={**clean, **fixed, "MLFLOW_WEBHOOK_CACHE_TTL": str(CACHE_S), **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait(self.process)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(30)
            self.process = None

    def _command(self) -> list[str]:
        host, port = self.url.removeprefix("http://").split(":")
        store = [f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", str(self.folder / "artifacts")]
        return [str(MLFLOW), "server", "--host", host, "--port", port, "--workers", "1", "--backend-store-uri", *store]

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if Tracking(self.url).healthy():
                return
            time.sleep(0.2)
        pytest.fail(f"the MLflow server did not come up:\n{(self.folder / 'server.log').read_text()[-3000:]}")


@pytest.fixture(scope="module")
def key() -> str:
    return Fernet.generate_key().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, key: str) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("mlflow"), f"http://127.0.0.1:{free_port()}")
    found.start(MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=key, **LOCAL)
    tracking = Tracking(found.url)
    tracking.ensure_model("digits")
    experiment = tracking.ensure_experiment("tests")
    for number in (1, 2):
        run = tracking.create_run(experiment, "a run", str(number))
        tracking.create_version("digits", run.run_id, f"{run.artifact_uri}/model", {})
    yield found
    found.stop()


class Wakes(list[str]):
    """What the orchestrator was woken for, and when, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def __call__(self, reason: str) -> None:
        self.times.append(time.monotonic())
        self.append(reason)

    def wait(self, count: int, patience_s: float = 5) -> None:
        deadline = time.monotonic() + patience_s
        while len(self) < count:
            assert time.monotonic() < deadline, f"{len(self)} wakes within {patience_s} s, not {count}"
            time.sleep(0.02)


@dataclass
class Ear:
    """A receiver, registered in MLflow, whose cache of webhooks has run out since."""

    receiver: Receiver
    keys: Path
    seen: Path
    wakes: Wakes

    @property
    def port(self) -> int:
        return int(self.receiver.url.split(":")[2].partition("/")[0])

    def post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        began = time.monotonic()
        connection.request("POST", "/webhook", body, headers)
        answer = connection.getresponse()
        outcome = json.loads(answer.read())["outcome"]
        assert time.monotonic() - began < 5
        connection.close()
        return answer.status, outcome


@pytest.fixture
def ear(server: Server, tmp_path: Path) -> Iterator[Ear]:
    wakes = Wakes()
    keys, seen = tmp_path / "keys", tmp_path / "seen.db"
    secret = ensure_secret(keys)
    with Receiver("127.0.0.1", 0, keys, seen, wakes) as receiver:
        assert ensure_webhook(server.url, receiver.url, secret, NAME) == "created"
        time.sleep(CACHE_S + 0.1)
        yield Ear(receiver, keys, seen, wakes)
    remove_webhooks(server.url, NAME)


@pytest.fixture
def recorder(server: Server, ear: Ear) -> Iterator[list[tuple[bytes, dict[str, str]]]]:
    """Deliveries as MLflow sends them to somebody else, under the same secret."""
    taken: list[tuple[bytes, dict[str, str]]] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((body, {name: self.headers[name] for name in self.headers if name.startswith("X-MLflow")}))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}/webhook"
        ensure_webhook(server.url, url, read_secrets(ear.keys)[0], "recorder")
        time.sleep(CACHE_S + 0.1)
        yield taken
        remove_webhooks(server.url, "recorder")
        other.shutdown()


def move_in_the_page(server: Server, version: str, alias: str = "production") -> None:
    """What MLflow's page does when an operator sets the alias."""
    answer = urllib3.request(
        "POST",
        f"{server.url}/ajax-api/2.0/mlflow/registered-models/alias",
        json={"name": "digits", "alias": alias, "version": version},
        timeout=30,
    )
    assert answer.status == 200, answer.data


def test_an_alias_that_is_moved_or_deleted_wakes_once(server: Server, ear: Ear) -> None:
    for count, version in enumerate(("1", "2"), start=1):
        began = time.monotonic()
        move_in_the_page(server, version)
        ear.wakes.wait(count)
        assert ear.wakes.times[-1] - began < 5
    Tracking(server.url).delete_alias("digits", "production")
    ear.wakes.wait(3)
    Tracking(server.url).set_version_tags("digits", "1", {"any": "tag"})
    time.sleep(1)
    assert len(ear.wakes) == 3
    assert ear.receiver.outcomes == {"accepted": 3}


def test_what_mlflow_signed_is_let_in_once_and_only_whole(
    server: Server, ear: Ear, recorder: list[tuple[bytes, dict[str, str]]]
) -> None:
    """Replayed, altered, aged, grown and shuffled deliveries that MLflow itself has signed."""
    for version in ("1", "2", "1"):
        move_in_the_page(server, version)
    deadline = time.monotonic() + 5
    while len(recorder) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    body, headers = recorder[0]
    assert ear.post(body.replace(b'"version": "1"', b'"version": "2"'), headers) == (401, "forged")
    assert ear.post(body + b" " * 70_000, headers) == (413, "oversized")
    assert ear.post(body, {**headers, "X-MLflow-Timestamp": "1700000000"}) == (401, "forged")
    old = {**headers, "X-MLflow-Timestamp": str(int(time.time()) - 400)}
    old["X-MLflow-Signature"] = sign(
        read_secrets(ear.keys)[0], old["X-MLflow-Delivery-Id"], old["X-MLflow-Timestamp"], body
    )
    assert ear.post(body, old) == (401, "stale")
    assert [ear.post(*one) for one in reversed(recorder)] == [(200, "accepted")] * 3
    assert [ear.post(*one) for one in recorder] == [(200, "duplicate")] * 3
    ear.receiver.stop()
    with Receiver("127.0.0.1", ear.port, ear.keys, ear.seen, ear.wakes) as again:
        assert [ear.post(*one) for one in recorder] == [(200, "duplicate")] * 3
        assert again.outcomes == {"duplicate": 3}


def test_a_hundred_moves_at_once(server: Server, ear: Ear) -> None:
    """All arrive, and wake far less often than a hundred times; the last wake comes after the last of them."""
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda n: move_in_the_page(server, str(n % 2 + 1), f"a{n}"), range(100)))
    deadline = time.monotonic() + 30
    while ear.receiver.outcomes.get("accepted", 0) < 100 and time.monotonic() < deadline:
        time.sleep(0.05)
    last = time.monotonic()
    assert ear.receiver.outcomes == {"accepted": 100}
    time.sleep(0.5)
    assert 1 <= len(ear.wakes) < 100
    assert ear.wakes.times[-1] > last - 0.5


def test_a_receiver_that_comes_back_gets_what_it_missed_seconds_ago(server: Server, ear: Ear) -> None:
    ear.receiver.stop()
    move_in_the_page(server, "2")
    time.sleep(1)
    with Receiver("127.0.0.1", ear.port, ear.keys, ear.seen, ear.wakes):
        ear.wakes.wait(1, patience_s=15)
        time.sleep(1)
        assert len(ear.wakes) == 1


def test_no_event_is_lost_while_the_secret_changes(server: Server, ear: Ear) -> None:
    """MLflow signs with the old secret until its cache runs out, then with the new one."""
    move_in_the_page(server, "1")
    ear.wakes.wait(1)
    old = read_secrets(ear.keys)[0]
    rotate_webhook(server.url, ear.receiver.url, ear.keys, NAME)
    assert read_secrets(ear.keys) != (old,) and read_secrets(ear.keys)[1] == old
    move_in_the_page(server, "2")
    ear.wakes.wait(2)
    (ear.keys / "webhook.secret.previous").unlink()
    move_in_the_page(server, "1")
    time.sleep(1)
    assert ear.receiver.outcomes == {"accepted": 2, "forged": 1}  # so the second one carried the old secret
    time.sleep(CACHE_S)
    move_in_the_page(server, "2")
    ear.wakes.wait(3)


def test_registering_again_changes_only_what_differs(server: Server, ear: Ear) -> None:
    secret = read_secrets(ear.keys)[0]
    url = ear.receiver.url
    assert ensure_webhook(server.url, url, secret, NAME) == "present"
    assert ensure_webhook(server.url, url.replace("/webhook", "/other"), secret, NAME) == "updated"
    assert ensure_webhook(server.url, url, secret, NAME) == "updated"
    assert ensure_webhook(server.url, url, "y" * 43, NAME) == "updated"
    assert ensure_webhook(server.url, url, secret, NAME) == "updated"
    extra = {"name": NAME, "url": url, "events": [{"entity": "MODEL_VERSION", "action": "CREATED"}]}
    urllib3.request("POST", f"{server.url}/api/2.0/mlflow/webhooks", json=extra)
    assert ensure_webhook(server.url, url, secret, NAME) == "updated"
    assert ensure_webhook(server.url, url, secret, NAME) == "present"
    (there,) = find_webhooks(server.url, NAME)
    assert there.fits(url, secret)
    assert secret not in there.model_dump_json()


def ailments(server: Server, ear: Ear, url: str = "") -> dict[str, str]:
    found = findings(server.url, url or ear.receiver.url, NAME, ear.keys, server.environment)
    assert all(finding.remedy for finding in found if not finding.ok)
    return {finding.name: finding.found for finding in found if not finding.ok}


def patch(server: Server, **changes: object) -> None:
    (there,) = find_webhooks(server.url, NAME)
    answer = urllib3.request("PATCH", f"{server.url}/api/2.0/mlflow/webhooks/{there.webhook_id}", json=changes)
    assert answer.status == 200, answer.data


def test_what_keeps_events_from_arriving_is_found(server: Server, ear: Ear) -> None:
    secret = read_secrets(ear.keys)[0]
    assert ailments(server, ear) == {}
    patch(server, status="DISABLED")
    assert "is disabled" in ailments(server, ear)["webhook"]
    patch(server, status="ACTIVE", url="http://127.0.0.1:9/webhook")
    assert "points to http://127.0.0.1:9/webhook" in ailments(server, ear)["webhook"]
    patch(server, url=ear.receiver.url, events=[{"entity": "MODEL_VERSION_ALIAS", "action": "CREATED"}])
    assert "other events or an older secret" in ailments(server, ear)["webhook"]
    assert ensure_webhook(server.url, ear.receiver.url, secret, NAME) == "updated"
    patch(server, secret="z" * 43)
    assert "401" in ailments(server, ear)["webhook delivery"]
    patch(server, secret=secret)
    assert ailments(server, ear) == {}
    ear.receiver.stop()
    assert "refused" in ailments(server, ear)["webhook delivery"]
    assert remove_webhooks(server.url, NAME) == 1
    assert ailments(server, ear)["webhook"] == f"0 webhooks are called {NAME}"


def test_a_server_that_may_not_send_here_or_lost_its_key_is_found(server: Server, ear: Ear, key: str) -> None:
    """Each over the same database; the last part is what docs/runbooks/webhooks.md says."""
    server.stop()
    server.start(MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=key, MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https")
    found = ailments(server, ear)
    assert "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS is not true" in found["webhook address"]
    assert "public IP" in found["webhook delivery"]
    with pytest.raises(TrackingError, match="MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS"):
        ensure_webhook(server.url, ear.receiver.url, "y" * 43, NAME)
    server.stop()
    server.start(**LOCAL)
    found = ailments(server, ear)
    assert found["webhook key"] == "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY is not set"
    assert "cannot decrypt" in found["webhook"]
    forget_webhooks(server)
    server.stop()
    server.start(MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=key, **LOCAL)
    assert ensure_webhook(server.url, ear.receiver.url, read_secrets(ear.keys)[0], NAME) == "created"
    assert ailments(server, ear) == {}


def forget_webhooks(server: Server) -> None:
    """The statement of the runbook."""
    runbook = Path(__file__).resolve().parents[2] / "docs" / "runbooks" / "webhooks.md"
    (statement,) = (
        line.strip() for line in runbook.read_text().splitlines() if line.strip().startswith("UPDATE webhooks")
    )
    database = sqlite3.connect(server.folder / "mlflow.db", timeout=20)
    with database:
        assert database.execute(statement).rowcount == 1
    database.close()
