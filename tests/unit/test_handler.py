"""The base handler inside TorchServe's own worker classes: batches, bad requests, headers, loading."""

import base64
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchrelay import archive
from torchrelay.serving import handler
from torchrelay.serving.predictions import Prediction, Skipped, read, replayable

DRIVER = Path(__file__).with_name("handler_driver.py")
DIGEST = "d" * 64
ENCODE_BUG, PREDICT_BUG, NOT_JSON, IN_PLACE, LEAK = 1001.0, 1002.0, 1003.0, 1004.0, 1005.0

Batch = list[dict[str, Any]]
Ask = Callable[..., Batch]


def start(folder: Path, python: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    command = [python, str(DRIVER), str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handler")
    tiny.pack(folder / "archive", version="7")
    archive.unpack(folder / "archive" / "model.mar", folder / "model")
    (folder / "instance" / "digests" / "tiny").mkdir(parents=True)
    (folder / "instance" / "digests" / "tiny" / "7").write_text(DIGEST)
    return folder


@pytest.fixture(scope="module")
def ask(unpacked: Path, component_python: str) -> Iterator[Ask]:
    """Sends one batch to a worker that lives as long as this module's tests."""
    with working(unpacked, component_python) as (batch, _):
        yield batch


@contextmanager
def working(unpacked: Path, python: str, **environment: str) -> "Iterator[tuple[Ask, subprocess.Popen[str]]]":
    """A worker, and what sends it one batch; afterwards it must have ended well, unless it was killed."""
    environment = {"TORCHRELAY_INSTANCE": str(unpacked / "instance"), **environment}
    with start(unpacked / "model", python, environment) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        stdin, stdout = worker.stdin, worker.stdout

        def batch(*requests: dict[str, Any]) -> Batch:
            stdin.write(json.dumps(requests) + "\n")
            stdin.flush()
            answers: Batch = json.loads(stdout.readline())
            return answers

        try:
            assert stdout.readline() == "loaded\n", worker.communicate()[1]
            yield batch, worker
            if worker.poll() is None:
                worker.communicate(timeout=300)
                assert worker.returncode == 0
        finally:
            worker.kill()


def post(
    body: bytes | object, content_type: str = "application/json", parsed: bool = False, **headers: str
) -> dict[str, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": content_type} | {name.replace("_", "-"): value for name, value in headers.items()}
    kind = content_type.partition(";")[0]
    return {"headers": sent, "content_type": kind, "body": base64.b64encode(raw).decode(), "parsed": parsed}


def close(found: list[dict[str, Any]], instances: list[list[float]]) -> bool:
    return len(found) == len(instances) and all(
        answer["class"] == tiny.predict(instance)["class"]
        and answer["probabilities"] == pytest.approx(tiny.predict(instance)["probabilities"], abs=1e-6)
        for answer, instance in zip(found, instances, strict=True)
    )


@pytest.mark.parametrize("parsed", [True, False])
def test_instances_are_answered(parsed: bool, ask: Ask) -> None:
    [answer] = ask(post({"instances": tiny.INSTANCES}, parsed=parsed))
    assert answer["status"] == 200
    assert close(answer["body"]["predictions"], tiny.INSTANCES)


def test_headers_say_who_answered(ask: Ask) -> None:
    body = {"instances": [[1, 2, 3]]}
    first, second, third = ask(
        post(body, x_torchrelay_request_id="one"), post(body, **{"X-Torchrelay-Request-Id": "two"}), post(body)
    )
    assert first["headers"] == {
        "content-type": "application/json",
        "x-component": "tiny",
        "x-model-version": "7",
        "x-archive-digest": DIGEST,
        "x-torchrelay-request-id": "one",
    }
    assert second["headers"]["x-torchrelay-request-id"] == "two"
    assert third["headers"]["x-torchrelay-request-id"] == "torchserve-2"


def test_each_request_of_a_batch_gets_its_own_predictions(ask: Ask) -> None:
    sizes = [1, 3, 2, 5]
    asked = [[[float(size), float(row), 0.0] for row in range(size)] for size in sizes]
    answers = ask(*(post({"instances": instances}) for instances in asked))
    assert [answer["status"] for answer in answers] == [200] * 4
    assert all(close(answer["body"]["predictions"], rows) for answer, rows in zip(answers, asked, strict=True))


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_by_any_spelling(content_type: str, ask: Ask) -> None:
    assert ask(post({"instances": [[1, 2, 3]]}, content_type))[0]["status"] == 200


def test_another_content_type_goes_to_the_component(ask: Ask) -> None:
    [answer] = ask(post(b"1,0,0", "text/csv"))
    assert close(answer["body"]["predictions"], [[1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        (b"{not json", "application/json", "not JSON"),
        (b"\xff\xfe\xfa", "application/json", "not JSON"),
        (b"[" * 100_000, "application/json", "nested too deeply"),
        (b"", "application/json", "no body"),
        ({}, "application/json", 'no list named "instances"'),
        ([[1, 2, 3]], "application/json", 'no list named "instances"'),
        ("instances", "application/json", 'no list named "instances"'),
        (None, "application/json", 'no list named "instances"'),
        ({"instances": "abc"}, "application/json", 'no list named "instances"'),
        ({"instances": {"a": 1}}, "application/json", 'no list named "instances"'),
        ({"instances": []}, "application/json", "is empty"),
        ({"instances": [[1, 2, 3], [1]]}, "application/json", "instance 1 is not a list of 3 numbers"),
        ({"instances": [["a", "b", "c"]]}, "application/json", "too many dimensions"),
        (b"1,x,3", "text/csv", "could not convert string to float"),
        (b"\x89PNG", "image/png", "content type image/png"),
    ],
)
def test_a_bad_request_is_told_so_and_hurts_nobody(body: object, content_type: str, reason: str, ask: Ask) -> None:
    fine = post({"instances": [[1, 2, 3]]})
    before, bad, after = ask(fine, post(body, content_type, x_torchrelay_request_id="mine"), fine)
    assert (before["status"], after["status"]) == (200, 200)
    assert bad["status"] == 400
    assert bad["body"]["request_id"] == "mine"
    assert reason in bad["body"]["error"]
    assert bad["headers"]["content-type"] == "application/json"


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_a_form_is_refused_by_the_name_of_its_type(content_type: str, ask: Ask) -> None:
    fine = post({"instances": [[1, 2, 3]]})
    bad, after = ask(post(b"", content_type), fine)
    assert (bad["status"], after["status"]) == (415, 200)
    assert content_type.partition(";")[0] in bad["body"]["error"]


@pytest.mark.parametrize("number", [ENCODE_BUG, PREDICT_BUG, NOT_JSON])
def test_a_request_that_breaks_the_model_breaks_alone(number: float, ask: Ask) -> None:
    fine = post({"instances": [[1, 2, 3]]})
    before, bad, after = ask(fine, post({"instances": [[number, 0, 0]]}, x_torchrelay_request_id="mine"), fine)
    assert (before["status"], bad["status"], after["status"]) == (200, 500, 200)
    assert bad["body"]["request_id"] == "mine"
    assert "worker's log" in bad["body"]["error"]
    assert bad["headers"]["x-archive-digest"] == DIGEST


def test_a_batch_of_nothing_but_bad_requests(ask: Ask) -> None:
    answers = ask(post(b"{"), post({"instances": [[PREDICT_BUG, 0, 0]]}))
    assert [answer["status"] for answer in answers] == [400, 500]
    assert ask(post({"instances": [[1, 2, 3]]}))[0]["status"] == 200


def test_a_worker_keeps_the_digest_it_was_loaded_with(ask: Ask, unpacked: Path) -> None:
    file = unpacked / "instance" / "digests" / "tiny" / "7"
    file.write_text("e" * 64)
    [answer] = ask(post({"instances": [[1, 2, 3]]}))
    file.write_text(DIGEST)
    assert answer["headers"]["x-archive-digest"] == DIGEST


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({}, "TORCHRELAY_INSTANCE is not set"), ({"TORCHRELAY_INSTANCE": "nowhere"}, "does not exist")],
)
def test_a_worker_that_does_not_know_its_digest_does_not_load(
    environment: dict[str, str], reason: str, unpacked: Path, component_python: str
) -> None:
    worker = start(unpacked / "model", component_python, environment)
    _, said = worker.communicate(timeout=3000)
    assert worker.returncode != 0
    assert reason in said


@pytest.fixture(scope="module")
def logged(unpacked: Path, component_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """As `ask`, but it gives what the log then says of the batch, from a worker that may keep inputs."""
    folder = tmp_path_factory.mktemp("log")
    environment = {"TORCHRELAY_PREDICTIONS": str(folder), "TORCHRELAY_KEEP_INPUTS": "1"}
    seen = 0
    with working(unpacked, component_python, **environment) as (ask, _):

        def batch(*requests: dict[str, Any]) -> list[tuple[dict[str, Any], Prediction]]:
            nonlocal seen
            answers = ask(*requests)
            lines = lines_of(folder, seen + len(requests))[seen:]
            seen += len(requests)
            return list(zip(answers, lines, strict=True))

        yield batch


def lines_of(folder: Path, count: int) -> list[Prediction]:
    """What is logged, as soon as there are that many lines."""
    skipped = Skipped()
    end = time.monotonic() + 10
    while len(found := list(read(folder, "tiny", skipped=skipped))) < count and time.monotonic() < end:
        time.sleep(0.02)
    assert skipped.malformed == 0
    assert len(found) == count
    return found


def test_a_line_says_who_answered_what_to_whom(logged: Ask) -> None:
    before = time.time()
    [(answer, line)] = logged(post({"instances": [[1, 2, 3]]}, x_torchrelay_request_id="mine"))
    assert (line.id, line.version, line.digest, line.shadow, line.status) == ("mine", "7", DIGEST, False, 200)
    assert line.output == answer["body"]
    assert before <= line.time <= time.time()
    assert 0 < line.milliseconds < 10_000
    assert line.dropped == 0


def test_the_fields_of_a_line_have_one_order(unpacked: Path, component_python: str, tmp_path: Path) -> None:
    """And without leave, no input is logged."""
    with working(unpacked, component_python, TORCHRELAY_PREDICTIONS=str(tmp_path)) as (ask, worker):
        ask(post({"instances": [[123.5, 2, 3]]}))
        lines_of(tmp_path, 1)
        [segment] = (tmp_path / "tiny").glob(f"7-{worker.pid}-*-0.jsonl")
    [line] = segment.read_text().splitlines()
    fields = ["id", "time", "version", "digest", "shadow", "status", "milliseconds", "summary", "output"]
    assert list(json.loads(line)) == fields
    assert segment.stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("environment", [{}, {"TORCHRELAY_PREDICTIONS": ""}])
def test_no_log_is_written_unasked(
    environment: dict[str, str],
    unpacked: Path,
    component_python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with working(unpacked, component_python, **environment) as (ask, _):
        ask(post({"instances": [[1, 2, 3]]}))
    assert not list(tmp_path.iterdir())


def test_the_gateways_copies_are_known_by_its_own_header(logged: Ask) -> None:
    found = logged(
        post({"instances": [[1, 2, 3]]}, **{"x-torchrelay-shadow": "1"}),
        post({"instances": [[1, 2, 3]]}, Host="example.org-shadow"),
    )
    assert [line.shadow for _, line in found] == [True, False]


def test_inputs_of_a_few_requests_a_second_are_kept_and_of_the_rest_said_to_be_left_out(logged: Ask) -> None:
    found = logged(*[post({"instances": [[number, 2, 3]]}) for number in range(60)])
    kept = [line.instances for _, line in found if isinstance(line.instances, list)]
    assert 0 < len(kept) <= 25
    assert all(set(line.instances) == {"omitted"} for _, line in found if not isinstance(line.instances, list))


def test_each_request_of_a_batch_has_a_summary_of_its_own(logged: Ask) -> None:
    one, many = [[-3.0, 0.0, 5.0]], [[1.0, 2.0, 3.0], [4.0, 5.0, 600.0]]
    found = logged(post({"instances": one}), post(b"{"), post({"instances": many}))
    assert [line.status for _, line in found] == [200, 400, 200]
    assert found[1][1].summary is None
    assert found[1][1].output == found[1][0]["body"]
    for line, numbers in ((found[0][1], one), (found[2][1], many)):
        flat = [number for row in numbers for number in row]
        assert line.summary is not None
        assert (line.summary.rows, line.summary.shape, line.summary.dtype) == (len(numbers), (3,), "float32")
        assert (line.summary.min, line.summary.max, line.summary.not_finite) == (min(flat), max(flat), 0)
        assert line.summary.mean == pytest.approx(statistics.fmean(flat), rel=1e-5)
        assert line.summary.std == pytest.approx(statistics.pstdev(flat), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "low", "high", "mean", "not_finite"),
    [
        ([math.nan, 2.0, 4.0], 2, 4, 3, 1),
        ([math.inf, -math.inf, 4.0], 4, 4, 4, 2),
        ([math.nan] * 3, None, None, None, 3),
        ([3e38, 3e38, 0.0], 0, 3e38, 2e38, 0),
    ],
)
def test_a_summary_is_of_the_finite_numbers(
    row: list[float], low: float | None, high: float | None, mean: float | None, not_finite: int, logged: Ask
) -> None:
    """One request's NaN must not spoil its neighbour's figures either."""
    (_, line), (_, other) = logged(post({"instances": [row]}), post({"instances": [[1, 2, 3]]}))
    assert line.summary is not None
    assert other.summary is not None
    assert (line.summary.min, line.summary.max, line.summary.mean) == (
        (None,) * 3 if mean is None else pytest.approx((low, high, mean), rel=1e-5)
    )
    assert line.summary.not_finite == not_finite
    assert (other.summary.mean, other.summary.not_finite) == (2.0, 0)


def test_the_summary_is_of_what_was_encoded_not_of_what_predict_made_of_it(logged: Ask) -> None:
    [(answer, line)] = logged(post({"instances": [[IN_PLACE, 0, 0]]}))
    assert answer["status"] == 200
    assert line.summary is not None
    assert line.summary.max == IN_PLACE


@pytest.mark.parametrize("number", [ENCODE_BUG, PREDICT_BUG, NOT_JSON])
def test_a_failure_is_logged_as_it_was_answered(number: float, logged: Ask) -> None:
    [(answer, line)] = logged(post({"instances": [[number, 0, 0]]}))
    assert (answer["status"], line.status, line.output) == (500, 500, answer["body"])
    assert (line.summary is None) == (line.instances is None) == (number == ENCODE_BUG)


def test_a_long_answer_is_named_by_its_hash(logged: Ask) -> None:
    [(answer, line)] = logged(post({"instances": [[1, 2, 3]] * 1000}))
    body = json.dumps(answer["body"], separators=(",", ":")).encode()
    assert line.output == {"cut": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_inputs_that_are_too_long_are_left_out(logged: Ask) -> None:
    request = post({"instances": [[1, 2, 3]] * 9000}, content_length="81015")
    (_, said), (_, unsaid) = logged(request, post({"instances": [[1, 2, 3]] * 9000}))
    assert said.instances == {"omitted": 81015}
    assert list(unsaid.instances) == ["omitted"]


def test_inputs_that_are_not_json_are_left_out(logged: Ask) -> None:
    [(_, line)] = logged(post(b'{"instances": [[NaN, 2, 3]]}', content_length="29"))
    assert line.instances == {"omitted": 29}


def test_what_is_logged_can_be_asked_again(unpacked: Path, component_python: str, tmp_path: Path) -> None:
    environment = {"TORCHRELAY_PREDICTIONS": str(tmp_path), "TORCHRELAY_KEEP_INPUTS": "1"}
    requests = [
        post({"instances": tiny.INSTANCES}, parsed=True),
        post({"instances": [[1, 2, 3.25]], "more": 1}, "application/json; charset=utf-8"),
        post(b"1,0,0.5", "text/csv; header=absent"),
    ]
    with working(unpacked, component_python, **environment) as (ask, _):
        answers = ask(*requests)
        lines_of(tmp_path, 3)
        again = replayable(tmp_path, "tiny", 10)
        assert len(again) == 3
        replayed = ask(*(post(one.body, one.content_type) for one in again))
    assert [one["body"] for one in replayed] == [one.logged.output for one in again]
    assert sorted(str(one["body"]) for one in replayed) == sorted(str(one["body"]) for one in answers)


@pytest.mark.parametrize("value", ["0", "-5", "many", "1.5"])
def test_a_worker_that_cannot_tell_how_much_it_may_log_does_not_load(
    value: str, unpacked: Path, component_python: str, tmp_path: Path
) -> None:
    instance = {"TORCHRELAY_INSTANCE": str(unpacked / "instance"), "TORCHRELAY_PREDICTIONS": str(tmp_path)}
    worker = start(unpacked / "model", component_python, {**instance, "TORCHRELAY_PREDICTIONS_MB": value})
    _, said = worker.communicate(timeout=300)
    assert worker.returncode != 0
    assert f"TORCHRELAY_PREDICTIONS_MB is {value!r}" in said


@pytest.mark.parametrize("end", [signal.SIGTERM, None])
def test_the_last_lines_reach_the_disk(
    end: signal.Signals | None, unpacked: Path, component_python: str, tmp_path: Path
) -> None:
    """Whether the worker gets SIGTERM or TorchServe closes its connection."""
    with working(unpacked, component_python, TORCHRELAY_PREDICTIONS=str(tmp_path)) as (ask, worker):
        for _ in range(20):
            ask(post({"instances": [[1, 2, 3]]}))
        if end:
            worker.send_signal(end)
        began = time.monotonic()
        worker.communicate(timeout=60)
        assert time.monotonic() - began < 10
        assert worker.returncode == (-end if end else 0)
    assert len(lines_of(tmp_path, 20)) == 20


def test_a_full_queue_drops_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the writer hangs, as it does on a disk that does not answer, nobody waits for it."""
    disk = threading.Event()

    def hanging(identity: object, batches: list[handler.Batch], keep_inputs: bool) -> Iterator[bytes]:
        disk.wait(60)
        yield from (b'{"id":"%s"}\n' % entry[0].encode() for batch in batches for entry in batch[2])

    monkeypatch.setattr(handler, "_lines", hanging)
    log = handler.TorchrelayHandler.Log(tmp_path, {"x-model-version": "7"}, keep_inputs=False, limit=2**20)
    began = time.monotonic()
    for number in range(10_000):
        log.put(0.0, 1.0, [(f"r{number}", {}, 200, b"{}", None, {})])
    log.put(0.0, 1.0, [("large", {}, 200, bytes(2**25), None, {})])
    assert time.monotonic() - began < 10
    disk.set()
    log.thread.join(0.5)
    log.put(0.0, 1.0, [("next", {}, 200, b"{}", None, {})])
    log.close()
    log.thread.join(20)
    [segment] = tmp_path.iterdir()
    lines = [json.loads(line) for line in segment.read_text().splitlines()]
    written = [line["id"] for line in lines]
    assert written[:-1] == [f"r{number}" for number in range(len(written) - 1)]
    assert written[-1] == "next"
    assert 4096 <= len(written) <= 4096 + 257  # what the writer had in hand when the disk stopped, and the last
    assert sum(line.get("dropped", 0) for line in lines) == 10_002 - len(written)


def test_a_worker_that_has_grown_too_large_answers_and_ends(
    unpacked: Path, component_python: str, tmp_path: Path
) -> None:
    """Whoever keeps workers up starts another one; the answer is out, and its line is on the disk."""
    limit = {"TORCHRELAY_MEMORY_MB": "900", "TORCHRELAY_PREDICTIONS": str(tmp_path)}
    with working(unpacked, component_python, **limit) as (ask, worker):
        for _ in range(3):
            assert ask(post({"instances": [[1, 2, 3]]}))[0]["status"] == 200
        time.sleep(0.2)
        assert worker.poll() is None
        assert ask(post({"instances": [[LEAK, 2, 3]]}))[0]["status"] == 200
        assert worker.wait(10) == 1
        assert len(lines_of(tmp_path, 4)) == 4


def test_a_model_that_takes_more_than_it_may_does_not_load(unpacked: Path, component_python: str) -> None:
    environment = {"TORCHRELAY_INSTANCE": str(unpacked / "instance"), "TORCHRELAY_MEMORY_MB": "100"}
    with start(unpacked / "model", component_python, environment) as worker:
        _, complaint = worker.communicate(timeout=60)
    assert worker.returncode != 0
    assert re.search(r"the model alone takes \d{3} MB; serving.max_memory_mb allows 100", complaint)


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")
def test_a_model_loads_at_a_low_priority_and_answers_at_the_one_before() -> None:
    found: list[int] = []

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    handler._at_low_priority(lambda: found.append(priority()))
    assert (found, priority()) == ([5], before)


def test_what_keeps_a_model_from_loading_is_said_as_it_was() -> None:
    def load() -> None:
        raise RuntimeError("no such weights")

    with pytest.raises(RuntimeError, match="no such weights"):
        handler._at_low_priority(load)
