"""The base handler inside TorchServe's own worker classes: batches, bad requests, headers, loading."""

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchrelay import archive

DRIVER = Path(__file__).with_name("handler_driver.py")
DIGEST = "d" * 64
ENCODE_BUG, PREDICT_BUG, NOT_JSON = 1001.0, 1002.0, 1003.0

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
    worker = start(unpacked / "model", component_python, {"TORCHRELAY_INSTANCE": str(unpacked / "instance")})
    assert worker.stdin is not None
    assert worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout
    assert stdout.readline() == "loaded\n", worker.communicate()[1]

    def batch(*requests: dict[str, Any]) -> Batch:
        stdin.write(json.dumps(requests) + "\n")
        stdin.flush()
        answers: Batch = json.loads(stdout.readline())
        return answers

    yield batch
    worker.communicate(timeout=300)
    assert worker.returncode == 0


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
