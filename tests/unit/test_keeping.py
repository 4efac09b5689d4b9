"""The webhook is registered as soon as the tracking server is up, again when it is lost, and never by two at once."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

from torchrelay import webhooks
from torchrelay.config import Node, Perimeter, Site, TrackingServer
from torchrelay.errors import BusyError, ConfigError
from torchrelay.webhooks import keeping, signing

TARGET = "http://127.0.0.1:18552/webhook"


class Registry(ThreadingHTTPServer):
    """As much of MLflow as has to do with webhooks; `up` says whether it answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.up, self.rows, self.refuses = True, {}, False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        rows = [{"webhook_id": number, **row} for number, row in self.server.rows.items()]
        self._answer({} if self.path == "/health" else {"webhooks": rows})

    def do_POST(self) -> None:
        row = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.rows[str(len(self.server.rows))] = row
        self._answer({"webhook": row})

    def do_PATCH(self) -> None:
        row = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.rows[self.path.rpartition("/")[2]].update(row)
        self._answer({"webhook": row})

    def _answer(self, content: object) -> None:
        body = json.dumps({"error_code": "NOPE", "message": "no"} if self.server.refuses else content).encode()
        status = 503 if not self.server.up else 400 if self.server.refuses and self.path != "/health" else 200
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def place(registry: Registry, tmp_path: Path) -> webhooks.Place:
    return webhooks.Place(registry.url, TARGET, tmp_path / "keys" / "production", "torchrelay-production")


@pytest.fixture
def changes(place: webhooks.Place) -> Iterator[list[str]]:
    """What a running keeper says that it did."""
    found: list[str] = []
    keeper = webhooks.Keeper(place, 0.05, found.append)
    keeper.start()
    yield found
    keeper.stop()
    keeper.join(10)
    assert not keeper.is_alive()


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.01)


def test_a_server_that_comes_up_later_is_waited_for(registry: Registry, place: webhooks.Place) -> None:
    registry.up = False
    found: list[str] = []
    keeper = webhooks.Keeper(place, 0.05, found.append)
    keeper.start()
    time.sleep(0.3)
    assert registry.rows == {} and found == []
    registry.up = True
    eventually(lambda: found)
    assert found == ["webhook created"]
    assert registry.rows["0"]["url"] == TARGET
    assert registry.rows["0"]["secret"] == webhooks.read_secrets(place.folder)[0]
    keeper.stop()
    keeper.join(10)


def test_one_that_is_there_is_left_alone_and_a_lost_one_is_made_again(registry: Registry, changes: list[str]) -> None:
    eventually(lambda: registry.rows)
    time.sleep(0.3)
    assert changes == ["webhook created"]
    registry.rows.clear()  # as when the database is restored from before
    eventually(lambda: registry.rows)
    eventually(lambda: changes == ["webhook created"] * 2)


def test_one_that_somebody_disabled_or_turned_away_is_put_right(registry: Registry, changes: list[str]) -> None:
    eventually(lambda: registry.rows)
    registry.rows["0"] |= {"url": "http://127.0.0.1:1/", "status": "DISABLED"}
    eventually(lambda: changes == ["webhook created", "webhook updated"])
    assert (registry.rows["0"]["url"], registry.rows["0"]["status"]) == (TARGET, "ACTIVE")


def test_trouble_is_said_once_and_outlived(
    registry: Registry, changes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    eventually(lambda: changes)
    registry.refuses = True
    eventually(lambda: caplog.records)
    time.sleep(0.3)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "it polls" in caplog.text
    registry.rows.clear()
    registry.refuses = False
    eventually(lambda: registry.rows)


def test_a_secret_that_others_may_read_does_not_end_it(
    registry: Registry, place: webhooks.Place, changes: list[str]
) -> None:
    eventually(lambda: changes)
    secret = place.folder / signing.SECRET
    secret.chmod(0o644)
    registry.rows.clear()
    time.sleep(0.3)
    assert registry.rows == {}
    secret.chmod(0o600)
    eventually(lambda: registry.rows)


def test_a_changed_secret_reaches_mlflow_and_the_old_one_counts_on(registry: Registry, place: webhooks.Place) -> None:
    webhooks.keep_webhook(place)
    old = webhooks.read_secrets(place.folder)[0]
    webhooks.change_secret(place)
    new, previous = webhooks.read_secrets(place.folder)
    assert previous == old != new
    assert registry.rows["0"]["secret"] == new
    assert len(registry.rows) == 1


def test_two_processes_take_turns(place: webhooks.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_LOCK_S", 0.2)
    webhooks.keep_webhook(place)
    with FileLock(place.folder / "webhook.lock"), pytest.raises(BusyError):
        webhooks.change_secret(place)
    assert len(webhooks.read_secrets(place.folder)) == 1


def test_everything_in_the_key_folder_is_its_owners_alone(place: webhooks.Place) -> None:
    webhooks.keep_webhook(place)
    webhooks.change_secret(place)
    assert {path.stat().st_mode & 0o077 for path in (place.folder, *place.folder.iterdir())} == {0}


def test_a_place_is_of_a_perimeter_with_an_orchestrator(tmp_path: Path) -> None:
    node = Node(name="n", folder=tmp_path)
    dev = Perimeter(alias="dev", gateway="http://127.0.0.1:1", nodes=(node,), gateway_node="n")
    perimeters = {"dev": dev, "production": dev.model_copy(update={"orchestrator": "http://127.0.0.1:18552"})}
    site = Site(supervisor=tmp_path, tracking=TrackingServer(url="http://127.0.0.1:2"), perimeters=perimeters)
    found = webhooks.webhook_place(site, "production")
    assert (found.tracking_url, found.target_url) == ("http://127.0.0.1:2", TARGET)
    assert (found.folder.name, found.name) == ("production", "torchrelay-production")
    with pytest.raises(ConfigError):
        webhooks.webhook_place(site, "dev")
