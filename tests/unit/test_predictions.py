"""Reading the prediction log: order, torn and malformed lines, tails, and the comparison of shadow with live."""

import base64
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.serving import predictions
from torchrelay.serving.predictions import Comparison, Pairing, Prediction, Skipped, Tail, paired, read, replayable


def line(number: int, **fields: Any) -> Prediction:
    summary = {"rows": 1, "shape": [3], "dtype": "float32", "min": 0, "max": 1, "mean": 0.5, "std": 0, "not_finite": 0}
    known = {"id": f"r{number}", "time": float(number), "version": "7", "digest": "d", "shadow": False, "status": 200}
    content = {**known, "milliseconds": 1.5, "summary": summary, "output": {"predictions": [{"class": 1}]}, **fields}
    return Prediction.model_validate(content)


def copy(number: int, **fields: Any) -> Prediction:
    return line(number, **{"version": "8", "shadow": True, **fields})


def write(folder: Path, name: str, lines: Iterable[Prediction], more: bytes = b"", component: str = "tiny") -> Path:
    (folder / component).mkdir(parents=True, exist_ok=True)
    path = folder / component / f"{name}.jsonl"
    with path.open("ab") as file:
        file.write(b"".join(one.model_dump_json().encode() + b"\n" for one in lines) + more)
    return path


def ids(found: Iterable[Prediction]) -> list[str]:
    return [one.id for one in found]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two workers, the first with eleven segments; every third line is the second one's."""
    for number in range(0, 99):
        if number % 3:
            write(tmp_path, f"7-dev-100-5-{number // 9}", [line(number)])
        else:
            write(tmp_path, "8-200-6-0", [line(number, version="8")])
    return tmp_path


def test_workers_are_merged_by_time(log: Path) -> None:
    assert ids(read(log, "tiny")) == [f"r{number}" for number in range(99)]
    assert ids(read(log, "tiny", newest_first=True)) == [f"r{number}" for number in reversed(range(99))]


def test_since_and_limit(log: Path) -> None:
    assert ids(read(log, "tiny", since=50, limit=3)) == ["r50", "r51", "r52"]
    assert ids(read(log, "tiny", since=95, newest_first=True)) == ["r98", "r97", "r96", "r95"]
    assert ids(read(log, "tiny", limit=2, newest_first=True)) == ["r98", "r97"]


def test_nothing_logged_is_nothing_read(tmp_path: Path) -> None:
    assert list(read(tmp_path, "tiny")) == []
    assert Tail(tmp_path, "tiny").poll() == []
    (tmp_path / "tiny").mkdir()
    assert list(read(tmp_path, "tiny")) == []


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_torn_last_line_is_passed_over_and_a_malformed_one_counted(newest_first: bool, tmp_path: Path) -> None:
    write(tmp_path, "7-1-1-0", [line(1)], b'{"id": 1}\nnot json\n')
    write(tmp_path, "7-1-1-0", [line(2)], b'{"id":"r3","ti')
    skipped = Skipped()
    found = ids(read(tmp_path, "tiny", newest_first=newest_first, skipped=skipped))
    assert found == (["r2", "r1"] if newest_first else ["r1", "r2"])
    assert skipped.malformed == 2


@given(st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=30), st.integers(1, 12))
def test_backward_is_forward_backwards(lines: list[bytes], block: int) -> None:
    """Whatever the size of a block, and with a torn line at the end."""
    content = b"".join(one + b"\n" for one in lines) + b"torn"
    descriptor = os.memfd_create("lines")
    try:
        os.write(descriptor, content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictions, "_BLOCK", block)
            assert list(predictions._split_backward(descriptor, len(content))) == lines[::-1]
    finally:
        os.close(descriptor)


def test_a_field_that_a_newer_handler_writes_is_let_pass(tmp_path: Path) -> None:
    write(tmp_path, "7-1-1-0", [], line(1).model_dump_json().replace("{", '{"new":1,', 1).encode() + b"\n")
    assert ids(read(tmp_path, "tiny")) == ["r1"]


def test_a_tail_reads_what_is_new_and_remembers_it(tmp_path: Path) -> None:
    first = write(tmp_path, "7-1-1-0", [line(1), line(3)], b'{"id":"r')
    write(tmp_path, "7-2-1-0", [line(2)])
    tail = Tail(tmp_path, "tiny")
    assert ids(tail.poll()) == ["r1", "r2", "r3"]
    assert tail.poll() == []
    rest = line(4).model_dump_json().removeprefix('{"id":"r').encode() + b"\n"
    write(tmp_path, "7-1-1-0", [], rest)
    assert ids(tail.poll()) == ["r4"]
    resumed = Tail(tmp_path, "tiny", json.loads(json.dumps(tail.state)))
    first.unlink()
    write(tmp_path, "7-1-1-1", [line(5)])
    assert ids(resumed.poll()) == ["r5"]
    assert sorted(resumed.state) == ["7-1-1-1.jsonl", "7-2-1-0.jsonl"]


@pytest.mark.parametrize("seed", range(40))
def test_a_tail_misses_nothing_and_repeats_nothing(seed: int, tmp_path: Path) -> None:
    """However the bytes arrive, and however few of them one poll may read."""
    draw = random.Random(seed)
    limit = draw.randint(1, 2000)
    contents = {
        f"7-{worker}-1-0": b"".join(line(n).model_dump_json().encode() + b"\n" for n in range(worker, 12, 3))
        for worker in range(3)
    }
    tail, found = Tail(tmp_path, "tiny"), []
    while any(contents.values()):
        name = draw.choice([name for name, content in contents.items() if content])
        cut = draw.randint(1, 700)
        write(tmp_path, name, [], contents[name][:cut])
        contents[name] = contents[name][cut:]
        found += tail.poll(limit)
    while more := tail.poll(limit):
        found += more
    assert sorted(ids(found)) == sorted(f"r{number}" for number in range(12))


def test_a_tail_from_a_time_on(tmp_path: Path) -> None:
    old = write(tmp_path, "7-1-1-0", [line(1), line(8)])
    os.utime(old, (4, 4))
    write(tmp_path, "7-2-1-0", [line(9), line(11)])
    assert ids(Tail(tmp_path, "tiny", since=10).poll()) == ["r11"]


def test_lines_are_joined_by_id() -> None:
    live = [line(number) for number in range(10)]
    shadow = [line(number, time=number + 0.5, shadow=True) for number in range(5, 15)]
    assert [(a.id, b.id, a.shadow, b.shadow) for a, b in paired(live, shadow)] == [
        (f"r{number}", f"r{number}", False, True) for number in range(5, 10)
    ]


def test_what_finds_no_partner_expires_and_is_counted() -> None:
    pairing = Pairing(max_waiting=100)
    for number in range(50):
        assert pairing.add(line(number, time=0, shadow=number % 5 == 0)) is None
    pairing.add(line(99, time=61))
    assert (pairing.expired_live, pairing.expired_shadow) == (40, 10)
    for number in range(1000, 1300):
        pairing.add(line(number, time=61))
    assert pairing.expired_live == 40 + 200
    assert len(pairing._waiting) == 101


def test_an_id_that_callers_use_twice_at_a_time_is_not_guessed_at() -> None:
    pairing = Pairing()
    assert [pairing.add(line(1, shadow=shadow)) for shadow in (False, False, True)] == [None] * 3
    assert pairing.ambiguous == 3
    assert pairing.add(line(1)) is None
    assert pairing.add(line(1, shadow=True)) is not None


def answer(*found: Any) -> dict[str, Any]:
    return {"output": {"predictions": list(found)}}


@pytest.mark.parametrize(
    ("live", "shadow", "kind", "size"),
    [
        (answer({"class": 1, "probabilities": [0.1, 0.9]}), answer({"class": 1, "probabilities": [0.4, 0.6]}), None, 0),
        (answer({"class": 1}, {"class": 2}), answer({"class": 1}, {"class": 3}), "class", 0.5),
        (answer({"class": "cat"}), answer({"class": "dog"}), "class", 1),
        (answer({"value": 100.0}), answer({"value": 104.9}), None, 0),
        (answer({"value": 100.0}), answer({"value": 110.0}), "number", 10 / 110),
        (answer({"value": -1.0}), answer({"value": 1.0}), "number", 2),
        (answer({"value": 0}), answer({"value": 1e-30}), "number", 1),
        (answer({"value": 0.0}), answer({"value": 0}), None, 0),
        (answer({"value": 10**400}), answer({"value": 1.5}), "number", 1),
        (answer([1.0, [2.0, 3.0]]), answer([1.0, [2.0, 4.0]]), "number", 0.25),
        (answer([1.0, 2.0]), answer([1.0]), "shape", 1),
        (answer({"class": 1}), answer({"value": 1}), "shape", 1),
        (answer({"class": 1}), answer({"class": 1}, {"class": 1}), "shape", 1),
        (answer({"text": "a"}), answer({"text": "b"}), "value", 1),
        (answer({"flag": True}), answer({"flag": False}), "value", 1),
        (answer({"flag": True}), answer({"flag": 1}), "shape", 1),
        (answer({"class": 1, "probabilities": [0.2, 0.8]}), answer({"class": 1, "probabilities": [1.0]}), "shape", 1),
        (answer({"class": 1}), answer({"class": 1, "label": "cat"}), "shape", 1),
        ({}, {"status": 500, "output": {"error": "the model failed"}}, "status", 1),
        ({"status": 400, "output": {"error": "a"}}, {"status": 400, "output": {"error": "b"}}, None, 0),
    ],
)
def test_what_a_disagreement_is(live: dict[str, Any], shadow: dict[str, Any], kind: str | None, size: float) -> None:
    comparison = Comparison("8", "7")
    comparison.add([line(1, **live), copy(1, **shadow)])
    assert comparison.compared == 1
    assert comparison.disagreed == (kind is not None)
    assert [(one.difference.kind, one.difference.size) for one in comparison.worst] == (
        [(kind, pytest.approx(size))] if kind else []
    )


def test_answers_known_by_their_hash_alone_are_compared_by_it() -> None:
    cut = [{"output": {"cut": 20000, "sha256": hash}} for hash in "ab"]
    comparison = Comparison("8", "7")
    comparison.add([line(1, **cut[0]), copy(1, **cut[0]), line(2, **cut[0]), copy(2, **cut[1])])
    comparison.add([line(3, **cut[0]), copy(3, status=500)])
    assert (comparison.compared, comparison.disagreed, comparison.incomparable) == (2, 1, 1)


def test_the_worst_are_kept_with_all_that_a_report_needs() -> None:
    comparison = Comparison("8", "7", tolerance=0.01, worst=3)
    for number in range(1, 50):
        comparison.add([line(number, instances=[[number]], **answer(100.0))])
        shadow = {"status": 500} if number == 30 else answer(100.0 + number)
        comparison.add([copy(number, **shadow)])
        comparison.add([line(number, shadow=True, version="9", **answer(0))])
    assert (comparison.compared, comparison.disagreed) == (49, 48)
    worst = [one.as_json() for one in comparison.worst]
    assert [(one["id"], one["kind"]) for one in worst] == [("r30", "status"), ("r49", "number"), ("r48", "number")]
    assert worst[1]["live"] == {"version": "7", "status": 200, "output": {"predictions": [100.0]}}
    assert worst[1]["candidate"]["output"] == {"predictions": [149.0]}
    assert worst[1]["instances"] == [[49]]
    json.dumps(worst)


def test_the_live_versions_answer_to_a_copy_is_compared_as_well() -> None:
    comparison = Comparison("8", "7")
    comparison.add([line(1, version="8", **answer({"class": 1})), line(1, shadow=True, **answer({"class": 2}))])
    comparison.add([line(2), line(3, version="8"), copy(3, version="6"), copy(3, version="7")])
    assert (comparison.compared, comparison.disagreed) == (2, 1)
    (worst,) = (one.as_json() for one in comparison.worst)
    assert (worst["live"]["version"], worst["live"]["output"]) == ("7", {"predictions": [{"class": 2}]})


def test_two_lines_of_one_version_are_no_comparison() -> None:
    comparison = Comparison("8", "7")
    comparison.add([line(1), line(1, shadow=True), line(2, version="8"), copy(2)])
    assert comparison.compared == 0


def test_lines_without_an_id_are_nobodys_partner_nor_are_proofs() -> None:
    comparison = Comparison("8", "7")
    comparison.add([line(1, id="golden-0123"), copy(2, id="golden-0123")])
    comparison.add([line(1, id=""), copy(2, id="")])
    assert comparison.compared == 0


def test_replayable_gives_the_newest_distinct_requests(tmp_path: Path) -> None:
    image = {"base64": base64.b64encode(b"\x89PNG").decode(), "content_type": "image/png"}
    kept = [
        line(1, instances=[[1]]),
        line(2, instances=[[2]]),
        line(3, instances=image),
        line(4, instances=[[2]]),
        line(5, instances=[[5]], shadow=True),
        line(6, instances=[[6]], status=500),
        line(7, instances={"omitted": 99999}),
        line(8),
        line(9, id="golden-0123", instances=[[9]]),
        line(10, id="replay-r1", instances=[[10]]),
    ]
    write(tmp_path, "7-1-1-0", kept)
    found = replayable(tmp_path, "tiny", 10)
    assert [(one.body, one.content_type, one.logged.id) for one in found] == [
        (b'{"instances":[[2]]}', "application/json", "r4"),
        (b"\x89PNG", "image/png", "r3"),
        (b'{"instances":[[1]]}', "application/json", "r1"),
    ]
    assert [one.logged.id for one in replayable(tmp_path, "tiny", 2)] == ["r4", "r3"]
    assert replayable(tmp_path, "tiny", 0) == []
