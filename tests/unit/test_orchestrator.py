"""The loop of production's converger: it looks at once, at every poll, when it is woken, and says what is news."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchrelay import config
from torchrelay.config import Node, Perimeter, Site, TrackingServer
from torchrelay.delivery import orchestrator
from torchrelay.delivery.converge import Outcome
from torchrelay.delivery.orchestrator import Orchestrator
from torchrelay.delivery.store import Rollout, State
from torchrelay.errors import TrackingError
from torchrelay.webhooks import Place

ROOT = Path(__file__).resolve().parents[2]


class Looks(list[str]):
    """Stands in for the converger: remembers why it looked, and when; `down` makes it fail as a lost server does."""

    down = False

    def __call__(self, *_: object, why: str, **__: object) -> "Looks":
        self.append(why)
        return self

    def tick(self) -> Outcome:
        error = TrackingError("no answer", "an answer", "make up")
        return Outcome(general=[error] if self.down else [])

    def wait(self, count: int) -> None:
        end = time.monotonic() + 20
        while len(self) < count:
            assert time.monotonic() < end, f"{len(self)} looks, not {count}"
            time.sleep(0.01)


class Healthy(BaseHTTPRequestHandler):
    """A tracking server that says that it is well."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Kept:
    """Stands in for the webhook's keeper."""

    made: list["Kept"]

    def __init__(self, place: Place, every_s: float, changed: object) -> None:
        self.place, self.every_s, self.changed = place, every_s, changed
        self.running = False
        self.made.append(self)

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False


@pytest.fixture(autouse=True)
def keepers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kept]]:
    monkeypatch.setenv("TORCHRELAY_ROOT", str(ROOT))
    monkeypatch.setenv("TORCHRELAY_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TORCHRELAY_KEYS", str(tmp_path / "keys"))
    config.settings.cache_clear()
    made: list[Kept] = []
    monkeypatch.setattr(Kept, "made", made, raising=False)
    monkeypatch.setattr(orchestrator, "Keeper", Kept)
    yield made
    config.settings.cache_clear()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    found = Looks()
    monkeypatch.setattr(orchestrator, "Converger", found)
    return found


@pytest.fixture
def service(tmp_path: Path, looks: Looks) -> Iterator[Orchestrator]:
    """An orchestrator whose loop runs."""
    made = Orchestrator(site(tmp_path), "production", object(), object())  # type: ignore[arg-type]
    loop = threading.Thread(target=made.run)
    loop.start()
    looks.wait(1)
    yield made
    made.stop()
    loop.join(10)
    assert not loop.is_alive()


def site(folder: Path, poll_s: int = 60) -> Site:
    perimeter = Perimeter(
        alias="production",
        gateway="http://127.0.0.1:1",
        nodes=(Node(name="n", folder=folder),),
        gateway_node="n",
        orchestrator="http://127.0.0.1:2",
        poll_s=poll_s,
    )
    return Site(
        supervisor=folder, tracking=TrackingServer(url="http://127.0.0.1:3"), perimeters={"production": perimeter}
    )


def test_it_looks_at_once_and_when_it_is_woken(service: Orchestrator, looks: Looks) -> None:
    time.sleep(0.2)
    assert looks == ["@production (the first look)"]
    service.wake("a test")
    looks.wait(2)
    assert looks[1] == "@production (woken)"


def test_it_looks_when_the_tracking_server_is_back(
    tmp_path: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may have lost an event when it went."""
    monkeypatch.setattr(orchestrator, "_WATCH_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    where = site(tmp_path).model_copy(update={"tracking": TrackingServer(url=f"http://127.0.0.1:{port}")})
    made = Orchestrator(where, "production", object(), object())  # type: ignore[arg-type]
    loop = threading.Thread(target=made.run)
    loop.start()
    looks.wait(1)
    time.sleep(0.3)
    assert len(looks) == 1
    with ThreadingHTTPServer(("127.0.0.1", port), Healthy) as server:
        threading.Thread(target=server.serve_forever).start()
        looks.wait(2)
        time.sleep(0.3)
        server.shutdown()
    made.stop()
    loop.join(10)
    assert looks == ["@production (the first look)", "@production (woken)"]


def test_a_hundred_wakes_cost_a_few_looks(service: Orchestrator, looks: Looks) -> None:
    for _ in range(100):
        service.wake("a test")
    looks.wait(2)
    time.sleep(0.3)
    assert len(looks) < 100


def test_the_webhook_is_kept_while_it_runs(tmp_path: Path, looks: Looks, keepers: list[Kept]) -> None:
    made = Orchestrator(site(tmp_path), "production", object(), object())  # type: ignore[arg-type]
    loop = threading.Thread(target=made.run)
    loop.start()
    looks.wait(1)
    (keeper,) = keepers
    assert keeper.running
    assert keeper.place == Place(
        "http://127.0.0.1:3", "http://127.0.0.1:2/webhook", tmp_path / "keys" / "production", "torchrelay-production"
    )
    assert keeper.every_s == 60
    keeper.changed("webhook created")  # type: ignore[operator]
    looks.wait(2)
    made.stop()
    loop.join(10)
    assert not keeper.running


@pytest.mark.parametrize(
    ("stage", "baked_s", "expected"),
    [(-1, 0.1, 1), (0, 0.1, 1), (1, 0.1, 0.3), (1, 1.2, 0.6), (1, 60, 1), (1, 3600, 6), (1, 1e6, 30), (2, 0.1, 1)],
    ids=["loading", "shadow", "callers' first", "callers' next", "later", "after an hour", "after days", "all"],
)
def test_it_looks_sooner_while_little_is_known_of_what_callers_get(stage: int, baked_s: float, expected: float) -> None:
    rollout = Rollout.model_construct(stage=stage, weights=(0, 5), since=time.time() - baked_s)
    assert orchestrator.pause(State(component="tiny")) == 1.0
    assert orchestrator.pause(State.model_construct(rollout=rollout)) == pytest.approx(expected, abs=0.1)


def test_what_stays_down_is_said_once(tmp_path: Path, looks: Looks, caplog: pytest.LogCaptureFixture) -> None:
    looks.down = True
    made = Orchestrator(site(tmp_path, poll_s=1), "production", object(), object())  # type: ignore[arg-type]
    loop = threading.Thread(target=made.run)
    loop.start()
    for number in (2, 3, 4):
        made.wake("a test")
        looks.wait(number)
    logging.getLogger("urllib3.connectionpool").warning("Retrying (Retry(total=1, connect=1)) after connection broken")
    made.stop()
    loop.join(10)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "no answer" in warnings[0]
    assert "\n" not in warnings[0]


def test_another_process_that_keeps_the_lease_does_not_end_it(
    tmp_path: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator, "_LEASE_PATIENCE_S", 0.1)
    made = Orchestrator(site(tmp_path, poll_s=1), "production", object(), object())  # type: ignore[arg-type]
    loop = threading.Thread(target=made.run)
    with made.memory.lease(1):
        loop.start()
        time.sleep(0.5)
        assert looks == []
    looks.wait(1)
    made.stop()
    loop.join(10)
