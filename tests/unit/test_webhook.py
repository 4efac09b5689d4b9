"""The orchestrator's ear, asked over loopback by senders that MLflow is and by senders that it is not."""

import http.client
import json
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from torchrelay.delivery.webhook import KEEP_S, LARGEST_BODY, Receiver
from torchrelay.errors import BusyError
from torchrelay.webhooks import ensure_secret, rotate_secret, sign
from torchrelay.webhooks.signing import PREVIOUS, ROTATION_S, SECRET

BODY = json.dumps({"entity": "model_version_alias", "action": "created", "data": {"alias": "production"}}).encode()


class Wakes(list[str]):
    """What the orchestrator was woken for; `block` holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()

    def __call__(self, reason: str) -> None:
        self.append(reason)
        assert self.free.wait(20)

    def settle(self, count: int = 1) -> list[str]:
        """The wakes, once there are `count` of them and no more come."""
        deadline = time.monotonic() + 5
        while len(self) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.25)
        return list(self)


@dataclass
class Delivery:
    """One delivery as MLflow 3.17 sends it."""

    secret: str
    body: bytes = BODY
    delivery_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    signed_at: float = field(default_factory=time.time)

    @property
    def headers(self) -> dict[str, str]:
        timestamp = str(int(self.signed_at))
        return {
            "Content-Type": "application/json",
            "X-MLflow-Delivery-Id": self.delivery_id,
            "X-MLflow-Timestamp": timestamp,
            "X-MLflow-Signature": sign(self.secret, self.delivery_id, timestamp, self.body),
        }


@pytest.fixture
def secret(tmp_path: Path) -> str:
    return ensure_secret(tmp_path / "keys")


@pytest.fixture
def wakes() -> Wakes:
    return Wakes()


@pytest.fixture
def receiver(tmp_path: Path, secret: str, wakes: Wakes) -> Iterator[Receiver]:
    with Receiver("127.0.0.1", 0, tmp_path / "keys", tmp_path / "seen.db", wakes) as found:
        yield found
        wakes.free.set()


def address(receiver: Receiver) -> str:
    return receiver.url.removeprefix("http://").removesuffix("/webhook")


def ask(receiver: Receiver, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, float]:
    """Status, answer and how long it took; every answer must come within a second."""
    connection = http.client.HTTPConnection(address(receiver), timeout=10)
    began = time.monotonic()
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    took = time.monotonic() - began
    connection.close()
    return answer.status, content, took


def send(receiver: Receiver, delivery: Delivery, **changes: str) -> tuple[int, str]:
    """Status and outcome of a delivery, with some of its headers replaced."""
    headers = {**delivery.headers, **{key.replace("_", "-"): value for key, value in changes.items()}}
    status, content, took = ask(receiver, "POST", "/webhook", delivery.body, headers)
    assert took < 5
    return status, content["outcome"]


def raw(receiver: Receiver, request: bytes, more: bytes = b"") -> bytes:
    """What comes back to bytes that no HTTP client would send."""
    host, port = address(receiver).split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        if more:
            connection.sendall(more)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def head(delivery: Delivery, *extra: str) -> bytes:
    lines = ["POST /webhook HTTP/1.1", "Host: x", *(f"{key}: {value}" for key, value in delivery.headers.items())]
    return "\r\n".join([*lines, *extra, "", ""]).encode()


def test_the_signature_is_the_one_that_mlflow_makes() -> None:
    """A vector of MLflow 3.17's own `_generate_hmac_signature`."""
    made = sign("s3cret", "1f6f1a0e-6f0e-4b7e-9d63-6a3c2b1d0e9f", "1700000000", '{"a": "ü"}'.encode())
    assert made == "v1,RHSID4IsfxudhClPeuesjnZmJzs5xzw/7az8O8Z5KBI="


def test_an_authentic_delivery_wakes_once(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    delivery = Delivery(secret)
    assert send(receiver, delivery) == (200, "accepted")
    assert [send(receiver, delivery) for _ in range(3)] == [(200, "duplicate")] * 3
    assert wakes.settle() == [f"webhook {delivery.delivery_id}"]
    assert receiver.outcomes == {"accepted": 1, "duplicate": 3}


def test_ids_outlive_the_receiver(receiver: Receiver, secret: str, wakes: Wakes, tmp_path: Path) -> None:
    delivery = Delivery(secret)
    assert send(receiver, delivery) == (200, "accepted")
    receiver.stop()
    again = Wakes()
    with Receiver("127.0.0.1", 0, tmp_path / "keys", tmp_path / "seen.db", again) as other:
        assert send(other, delivery) == (200, "duplicate")
        assert send(other, Delivery(secret)) == (200, "accepted")
        assert len(again.settle()) == 1


def test_what_is_not_ours_wakes_nobody(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    good = Delivery(secret)
    assert send(receiver, Delivery("x" * 43)) == (401, "forged")
    assert send(receiver, good, X_MLflow_Signature="v1,AAAA") == (401, "forged")
    assert send(receiver, good, X_MLflow_Signature="é") == (401, "forged")
    assert send(receiver, good, X_MLflow_Signature="") == (401, "forged")
    assert send(receiver, good, X_MLflow_Delivery_Id=str(uuid.uuid4())) == (401, "forged")
    assert send(receiver, good, X_MLflow_Timestamp=str(int(time.time()) - 1)) == (401, "forged")
    assert send(receiver, good, X_MLflow_Timestamp="soon") == (400, "malformed")
    assert send(receiver, good, X_MLflow_Timestamp="¹²³") == (400, "malformed")
    assert send(receiver, good, X_MLflow_Delivery_Id="../../etc") == (400, "malformed")
    altered = good.headers
    assert ask(receiver, "POST", "/webhook", BODY + b" ", altered)[0] == 401
    assert ask(receiver, "POST", "/webhook", b"", {})[0] == 400
    assert wakes.settle(0) == []
    assert receiver.outcomes == {"forged": 7, "malformed": 4}


@pytest.mark.parametrize(
    ("age", "expected"),
    [(-290, (200, "accepted")), (290, (200, "accepted")), (-310, (401, "stale")), (310, (401, "stale"))],
)
def test_five_minutes_either_way(
    receiver: Receiver, secret: str, wakes: Wakes, age: int, expected: tuple[int, str]
) -> None:
    assert send(receiver, Delivery(secret, signed_at=time.time() - age)) == expected
    assert len(wakes.settle(0)) == (expected[0] == 200)


def test_a_signed_body_cannot_be_cut_anew(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    """Who may set a tag can have MLflow sign `.<any time>.`; the dots must not make it a timestamp."""
    stolen = Delivery(secret, body=b'{"data": {"value": "a.%d.b"}}' % time.time(), signed_at=time.time() - 9999)
    cut_id, timestamp, rest = f"{stolen.delivery_id}.{int(stolen.signed_at)}.{stolen.body.decode()}".rsplit(".", 2)
    headers = {**stolen.headers, "X-MLflow-Delivery-Id": cut_id, "X-MLflow-Timestamp": timestamp}
    assert sign(secret, cut_id, timestamp, rest.encode()) == headers["X-MLflow-Signature"]
    assert ask(receiver, "POST", "/webhook", rest, headers)[:1] == (400,)
    assert wakes.settle(0) == []


def test_both_secrets_count_during_a_rotation_and_one_after_it(
    receiver: Receiver, secret: str, wakes: Wakes, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    new = rotate_secret(keys)
    assert new != secret
    assert send(receiver, Delivery(secret)) == send(receiver, Delivery(new)) == (200, "accepted")
    long_ago = time.time() - ROTATION_S - 1
    os.utime(keys / PREVIOUS, (long_ago, long_ago))
    assert send(receiver, Delivery(secret)) == (401, "forged")
    assert send(receiver, Delivery(new)) == (200, "accepted")


@pytest.mark.parametrize("spoil", ["shared", "short", "missing"])
def test_a_secret_that_may_not_be_used_lets_nobody_in(
    receiver: Receiver, secret: str, wakes: Wakes, tmp_path: Path, spoil: str
) -> None:
    path = tmp_path / "keys" / SECRET
    if spoil == "shared":
        path.chmod(0o640)
    elif spoil == "short":
        path.write_text("")
    else:
        path.unlink()
    assert send(receiver, Delivery(secret)) == send(receiver, Delivery("")) == (503, "unkeyed")
    assert wakes.settle(0) == []


def test_a_body_is_counted_as_it_comes(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    largest = Delivery(secret, body=b"x" * LARGEST_BODY)
    assert send(receiver, largest) == (200, "accepted")
    assert send(receiver, Delivery(secret, body=b"x" * (LARGEST_BODY + 1))) == (413, "oversized")
    assert ask(receiver, "POST", "/webhook", b"x" * 2**20, largest.headers)[0] == 413
    assert len(wakes.settle()) == 1


def test_chunks_are_counted_together(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    delivery = Delivery(secret, body=b"x" * (LARGEST_BODY + 1000))
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    answer = raw(receiver, head(delivery, "Transfer-Encoding: chunked"), chunk * 70 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    small = Delivery(secret)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(small.body), small.body)
    assert raw(receiver, head(small, "Transfer-Encoding: chunked"), body).startswith(b"HTTP/1.1 200")
    assert len(wakes.settle()) == 1


def test_a_lying_length(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    delivery = Delivery(secret)
    short = raw(receiver, head(delivery, f"Content-Length: {len(BODY) - 1}"), BODY)
    assert short.startswith(b"HTTP/1.1 401")
    began = time.monotonic()
    assert raw(receiver, head(delivery, f"Content-Length: {len(BODY) + 1}"), BODY).startswith(b"HTTP/1.1 408")
    assert raw(receiver, head(delivery, "Content-Length: 99999999"), BODY).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 8
    assert wakes.settle(0) == []


def test_a_sender_that_says_nothing_is_hung_up_on(receiver: Receiver) -> None:
    began = time.monotonic()
    assert raw(receiver, b"POST /webhook HTTP/1.1\r\nHost:") == b""
    assert time.monotonic() - began < 9


def test_no_answer_waits_for_what_a_wake_leads_to(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    """A hundred at once, in the middle of a wake that does not end: all answered, and one more wake for all."""
    wakes.free.clear()
    assert send(receiver, Delivery(secret)) == (200, "accepted")
    assert wakes.settle() and len(wakes) == 1
    began = time.monotonic()
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda one: send(receiver, one), [Delivery(secret) for _ in range(100)]))
    assert answers == [(200, "accepted")] * 100
    assert time.monotonic() - began < 8  # a hundred threads of this test included
    assert len(wakes) == 1
    wakes.free.set()
    assert len(wakes.settle(2)) == 2
    assert wakes[1].endswith("and 99 more")


def test_a_wake_that_fails_is_not_the_last(tmp_path: Path, secret: str) -> None:
    heard: list[str] = []

    def fails(reason: str) -> None:
        heard.append(reason)
        raise ValueError(reason)

    with Receiver("127.0.0.1", 0, tmp_path / "keys", tmp_path / "seen.db", fails) as receiver:
        for count in (1, 2):
            assert send(receiver, Delivery(secret)) == (200, "accepted")
            deadline = time.monotonic() + 5
            while len(heard) < count and time.monotonic() < deadline:
                time.sleep(0.01)
        assert len(heard) == 2
        assert ask(receiver, "GET", "/healthz")[1]["failed_wakes"] == 2


def test_programs_of_this_machine_need_no_signature(receiver: Receiver, wakes: Wakes) -> None:
    assert ask(receiver, "POST", "/wake", b"whatever")[:2] == (200, {"outcome": "woken"})
    assert wakes.settle() == ["wake"]


def test_programs_elsewhere_may_not_wake_without_one(
    tmp_path: Path, secret: str, wakes: Wakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # which uvicorn would heed
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only tells our own address
        own = probe.getsockname()[0]
    with Receiver(own, 0, tmp_path / "keys", tmp_path / "seen.db", wakes) as receiver:
        headers = {"X-Forwarded-For": "127.0.0.1"}
        assert ask(receiver, "POST", "/wake", headers=headers)[1]["outcome"] == "foreign"
        assert send(receiver, Delivery(secret)) == (200, "accepted")
    assert len(wakes.settle()) == 1


def test_health_counts_what_came(receiver: Receiver, secret: str, wakes: Wakes) -> None:
    before = time.time()
    send(receiver, Delivery(secret))
    send(receiver, Delivery("x" * 43))
    assert len(wakes.settle()) == 1
    status, found, _ = ask(receiver, "GET", "/healthz")
    assert status == 200
    assert found["last_accepted"] >= before
    del found["last_accepted"]
    assert found == {"status": "ok", "outcomes": {"accepted": 1, "forged": 1}, "wakes": 1, "failed_wakes": 0}


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/webhook", 405), ("POST", "/else", 404)])
def test_other_requests_get_our_errors(receiver: Receiver, method: str, path: str, status: int) -> None:
    assert ask(receiver, method, path)[0] == status


def test_an_id_that_cannot_be_kept_wakes_nobody_and_is_sent_again(
    receiver: Receiver, secret: str, wakes: Wakes, tmp_path: Path
) -> None:
    first, second = Delivery(secret), Delivery(secret)
    assert send(receiver, first) == (200, "accepted")
    other = sqlite3.connect(tmp_path / "seen.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert send(receiver, second) == (503, "unrecorded")
    other.execute("ROLLBACK")
    other.close()
    assert send(receiver, second) == (200, "accepted")
    assert send(receiver, first) == (200, "duplicate")
    assert len(wakes.settle(2)) == 2


def test_a_broken_file_of_ids_is_replaced(tmp_path: Path, secret: str, wakes: Wakes) -> None:
    (tmp_path / "seen.db").write_bytes(b"no database" * 1000)
    with Receiver("127.0.0.1", 0, tmp_path / "keys", tmp_path / "seen.db", wakes) as receiver:
        delivery = Delivery(secret)
        assert [send(receiver, delivery) for _ in range(2)] == [(200, "accepted"), (200, "duplicate")]


def test_a_file_of_ids_that_breaks_meanwhile_is_replaced(
    receiver: Receiver, secret: str, tmp_path: Path, wakes: Wakes
) -> None:
    assert send(receiver, Delivery(secret)) == (200, "accepted")
    for file in tmp_path.glob("seen.db*"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    delivery = Delivery(secret)
    assert send(receiver, delivery) == (503, "unrecorded")
    assert [send(receiver, delivery) for _ in range(2)] == [(200, "accepted"), (200, "duplicate")]


def test_old_ids_go(receiver: Receiver, secret: str, tmp_path: Path) -> None:
    assert send(receiver, Delivery(secret)) == (200, "accepted")
    file = sqlite3.connect(tmp_path / "seen.db", isolation_level=None)
    file.execute("INSERT INTO seen VALUES ('old', ?), ('young', ?)", (time.time() - KEEP_S - 1, time.time() - 600))
    assert send(receiver, Delivery(secret)) == (200, "accepted")
    kept = {row[0] for row in file.execute("SELECT id FROM seen")}
    file.close()
    assert "young" in kept and "old" not in kept and len(kept) == 3


def test_a_port_that_somebody_has(receiver: Receiver, tmp_path: Path) -> None:
    host, port = address(receiver).split(":")
    with pytest.raises(BusyError):
        Receiver(host, int(port), tmp_path / "keys", tmp_path / "other.db", print).start()
