"""Reads the prediction log that handler.py writes (docs/prediction-log.md), on the node, in torchrelay's own Python.

A segment belongs to one worker, grows at its end, and may be deleted at any time. Only its last line can be torn.
"""

import base64
import binascii
import hashlib
import heapq
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError

from torchrelay.config import Frozen

_BLOCK = 2**18
_POLL_BYTES = 32 * 2**20
_EXPIRY_S = 60.0
_MTIME_SLACK_S = 1.0  # file systems round the time of a change down
_MAX_WAITING = 5000


class _Line(Frozen):
    """Archives carry the handler that they were packed with, so fields that are not known here are let pass."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class Summary(_Line):
    """What the encoded input of a request looked like; the figures are of its finite numbers, None without any."""

    rows: int
    shape: tuple[int, ...] = Field(description="Of one row.")
    dtype: str
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    not_finite: int


class Prediction(_Line):
    """One line: one request that a worker answered."""

    id: str
    time: float = Field(description="When its batch reached the handler, in unix seconds.")
    version: str
    digest: str
    shadow: bool
    status: int
    milliseconds: float = Field(description="Of its batch in the handler.")
    summary: Summary | None = Field(description="None: it could not be encoded.")
    output: Any = Field(description="The JSON that was answered; cut (its bytes) and sha256 where that was too long.")
    instances: Any = Field(None, description="A list, or base64 and content_type, or omitted (its bytes); None: no.")
    dropped: int = Field(0, description="Requests that this worker could not log since its line before.")

    @property
    def ours(self) -> bool:
        """Whether it is no caller's request but one of torchrelay's own, past the gateway: a proof or a replay."""
        return self.id.startswith(("golden-", "replay-"))


@dataclass
class Skipped:
    """What a reader could not read: lines that are no predictions. Torn last lines are not counted."""

    malformed: int = 0


class Request(Frozen):
    """A logged request that can be sent again, with what was answered to it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants"
    )

    body: bytes
    content_type: str
    logged: Prediction


def read(
    folder: Path,
    component: str,
    since: float = 0,
    limit: int | None = None,
    *,
    newest_first: bool = False,
    skipped: Skipped | None = None,
) -> Iterator[Prediction]:
    """Up to `limit` predictions of the component from `since` (unix seconds) on, in the order of their times.

    `folder` holds a folder a component; one that is missing has no predictions. Lazy: with `newest_first` and a
    limit only the ends of the newest segments are read.
    """
    skipped = Skipped() if skipped is None else skipped
    workers = _workers(folder / component, since)
    streams = [_worker_lines(segments, newest_first, skipped) for segments in workers]
    merged = heapq.merge(*streams, key=lambda one: one.time, reverse=newest_first)
    wanted = (
        takewhile(lambda one: one.time >= since, merged) if newest_first else (p for p in merged if p.time >= since)
    )
    return islice(wanted, limit)


class Tail:
    """Gives each time what is new. `state` is JSON: a Tail that is made with it goes on where another one stopped."""

    def __init__(self, folder: Path, component: str, state: dict[str, int] | None = None, since: float = 0) -> None:
        """Lines from before `since` (unix seconds) are passed over, whole segments without being read."""
        self.folder, self.since = folder / component, since
        self.state = dict(state or {})
        self.skipped = Skipped()

    def poll(self, limit: int = _POLL_BYTES) -> list[Prediction]:
        """All predictions that came since the last call, ordered by time; the rest next time where `limit` bytes
        are exceeded.
        """
        found: list[Prediction] = []
        sizes = {path.name: size for path, size, _ in _segments(self.folder, self.since)}
        self.state = {name: offset for name, offset in self.state.items() if name in sizes}
        for name, size in sizes.items():
            if limit > 0 and size > (offset := self.state.get(name, 0)):
                content = _whole_lines(self.folder / name, offset, limit)
                self.state[name] = offset + len(content)
                limit -= len(content)
                found += [one for one in _parsed(content.split(b"\n")[:-1], self.skipped) if one.time >= self.since]
        return sorted(found, key=lambda one: one.time)


Kind = Literal["number", "class", "value", "shape", "status"]
_RANK: dict[Kind, int] = {"number": 0, "class": 1, "value": 2, "shape": 3, "status": 4}


@dataclass(frozen=True)
class Difference:
    """How two answers differ: in what, and how much.

    `kind`: another status; another structure (shape) or text or truth value (value); another class; another number.
    `size`: of numbers the largest relative difference, of classes the share of the instances, else 1.
    """

    kind: Kind
    size: float

    def __lt__(self, other: "Difference") -> bool:
        return (_RANK[self.kind], self.size) < (_RANK[other.kind], other.size)


@dataclass(frozen=True)
class Disagreement:
    """A request that was answered differently."""

    difference: Difference
    live: Prediction
    candidate: Prediction

    def as_json(self) -> dict[str, Any]:
        """For a report: id, kind, size, both statuses and outputs, and the inputs where they were kept."""
        return {
            "id": self.live.id,
            "time": self.live.time,
            "kind": self.difference.kind,
            "size": self.difference.size,
            **{
                side: {"version": one.version, "status": one.status, "output": one.output}
                for side, one in (("live", self.live), ("candidate", self.candidate))
            },
            "instances": self.live.instances,
        }


@dataclass
class _Waiting:
    """Lines of one request id that have no partner yet."""

    since: float
    live: list[Prediction] = field(default_factory=list)
    shadow: list[Prediction] = field(default_factory=list)


class Pairing:
    """Joins the line of a request and that of its copy (live and shadow) by id as they come, in bounded memory.

    A line whose partner does not come within 60 s (by the lines' own times) has expired. An id that callers use
    twice at a time says nothing of who belongs to whom: such lines are dropped as ambiguous. All of it is counted.
    """

    def __init__(self, max_waiting: int = _MAX_WAITING) -> None:
        self.expired_live = self.expired_shadow = self.ambiguous = 0
        self._max_waiting = max_waiting
        self._newest = 0.0
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()

    def add(self, one: Prediction) -> tuple[Prediction, Prediction] | None:
        """The pair (live, shadow) that the line completes."""
        self._newest = max(self._newest, one.time)
        self._expire()
        waiting = self._waiting.setdefault(one.id, _Waiting(one.time))
        (waiting.shadow if one.shadow else waiting.live).append(one)
        if not (waiting.live and waiting.shadow):
            return None
        del self._waiting[one.id]
        if len(waiting.live) == len(waiting.shadow) == 1:
            return waiting.live[0], waiting.shadow[0]
        self.ambiguous += len(waiting.live) + len(waiting.shadow)
        return None

    def _expire(self) -> None:
        while self._waiting:
            oldest = next(iter(self._waiting))
            recent = self._waiting[oldest].since > self._newest - _EXPIRY_S
            if recent and len(self._waiting) <= self._max_waiting:
                return
            waiting = self._waiting.pop(oldest)
            self.expired_live += len(waiting.live)
            self.expired_shadow += len(waiting.shadow)


def paired(live: Iterable[Prediction], shadow: Iterable[Prediction]) -> Iterator[tuple[Prediction, Prediction]]:
    """The pairs (live, shadow) of the same request id. Both are ordered by time; memory is bounded as in Pairing."""
    pairing = Pairing()
    for one in heapq.merge(live, shadow, key=lambda line: line.time):
        if pair := pairing.add(one):
            yield pair


class Comparison:
    """Compares a candidate's answers with the live version's, line by line as they come, and keeps the worst.

    Either answers the caller, the other a copy of the same request.

    Disagreement: other keys, lengths or kinds of value; for predictions with a `class` another class; else any number
    that differs by more than `tolerance` relative to the larger of the two; any other value or status. Two answers that
    were both too long for the log agree if their hashes do and are `incomparable` else.
    """

    def __init__(self, candidate: str, live: str, tolerance: float = 0.05, worst: int = 20) -> None:
        """Of these two versions; lines of others are passed over."""
        self.candidate, self.live, self.tolerance, self.max_worst = candidate, live, tolerance, worst
        self.pairing = Pairing()
        self.compared = self.disagreed = self.incomparable = 0
        self.worst: list[Disagreement] = []

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Take in lines of both kinds, in any order that is roughly that of time."""
        for one in predictions:
            known = one.version in (self.candidate, self.live)
            if known and one.id and not one.ours and (pair := self.pairing.add(one)):
                by_version = {line.version: line for line in pair}
                if len(by_version) == 2:
                    self._compare(by_version[self.live], by_version[self.candidate])

    def _compare(self, live: Prediction, candidate: Prediction) -> None:
        if _incomparable(live, candidate):
            self.incomparable += 1
            return
        self.compared += 1
        found = difference(live, candidate, self.tolerance)
        if found is not None:
            self.disagreed += 1
            self.worst.append(Disagreement(found, live, candidate))
            self.worst.sort(key=lambda one: one.difference, reverse=True)
            del self.worst[self.max_worst :]


def difference(live: Prediction, shadow: Prediction, tolerance: float) -> Difference | None:
    """How two answers to one request differ, None where they agree; Comparison says what counts."""
    if live.status != shadow.status:
        return Difference("status", 1.0)
    if live.status != 200:
        return None  # the same refusal; its text names the request
    ours, theirs = (_predictions(one.output) for one in (live, shadow))
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None if live.output == shadow.output else Difference("shape", 1.0)
    if not _alike(ours, theirs):
        return Difference("shape", 1.0)
    if all(isinstance(one, dict) and "class" in one for one in (*ours, *theirs)):
        share = sum(a["class"] != b["class"] for a, b in zip(ours, theirs, strict=True)) / max(len(ours), 1)
        return Difference("class", share) if share else None
    found = max(_differences(ours, theirs), default=None)
    return None if found is None or (found.kind == "number" and found.size <= tolerance) else found


def replayable(folder: Path, component: str, limit: int) -> list[Request]:
    """The newest distinct requests of callers that were answered with 200 and carry inputs, `limit` at most."""
    found: dict[bytes, Request] = {}
    for one in read(folder, component, newest_first=True):
        if len(found) >= limit:
            break
        request = None if one.shadow or one.ours or one.status != 200 else _request(one)
        if request is not None:
            key = hashlib.sha256(f"{request.content_type}\n".encode() + request.body).digest()
            found.setdefault(key, request)
    return list(found.values())


def _request(one: Prediction) -> Request | None:
    match one.instances:
        case [*instances]:
            body = json.dumps({"instances": instances}, separators=(",", ":")).encode()
            return Request(body=body, content_type="application/json", logged=one)
        case {"base64": str(text), "content_type": str(content_type)}:
            try:
                body = base64.b64decode(text, validate=True)
                return Request(body=body, content_type=content_type, logged=one)
            except binascii.Error:
                return None
    return None


def _predictions(output: Any) -> list[Any] | None:
    return output["predictions"] if isinstance(output, dict) and isinstance(output.get("predictions"), list) else None


def _incomparable(live: Prediction, shadow: Prediction) -> bool:
    """Whether both are answers of which at least one is known by its hash alone, and that does not settle it."""
    cut = any(isinstance(one.output, dict) and "cut" in one.output for one in (live, shadow))
    return cut and live.status == shadow.status == 200 and live.output != shadow.output


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two structures have the same keys and lengths, and values of the same kind: what callers rely on."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_alike(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    return (_is_number(ours) and _is_number(theirs)) or type(ours) is type(theirs)


def _differences(ours: Any, theirs: Any) -> Iterator[Difference]:
    """Of every leaf in which two structures differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key, value in ours.items():
            yield from _differences(value, theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for a, b in zip(ours, theirs, strict=True):
            yield from _differences(a, b)
    elif _is_number(ours) and _is_number(theirs):
        if ours != theirs:
            yield Difference("number", _relative(ours, theirs))
    elif ours != theirs or type(ours) is not type(theirs):
        containers = isinstance(ours, dict | list) or isinstance(theirs, dict | list)
        yield Difference("shape" if containers else "value", 1.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _relative(ours: float, theirs: float) -> float:
    """|a - b| / max(|a|, |b|), which is between 0 and 2; 1 where a whole number is too large for a float."""
    scale = max(abs(ours), abs(theirs))
    try:
        return math.fabs(ours / scale - theirs / scale)
    except OverflowError:
        return 1.0


def _segments(folder: Path, since: float) -> Iterator[tuple[Path, int, float]]:
    """Path, size and last change of each segment that was written to after `since`."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        try:
            found = entry.stat()
        except FileNotFoundError:  # its worker deleted it
            continue
        if entry.name.endswith(".jsonl") and found.st_mtime >= since - _MTIME_SLACK_S:
            yield Path(entry.path), found.st_size, found.st_mtime


def _workers(folder: Path, since: float) -> list[list[Path]]:
    """The segments of each worker, the oldest first."""
    workers: dict[str, list[tuple[int, Path]]] = {}
    for path, _, _ in _segments(folder, since):
        worker, _, number = path.stem.rpartition("-")
        if number.isdecimal():
            workers.setdefault(worker, []).append((int(number), path))
    return [[path for _, path in sorted(segments)] for segments in workers.values()]


def _worker_lines(segments: list[Path], newest_first: bool, skipped: Skipped) -> Iterator[Prediction]:
    for path in reversed(segments) if newest_first else segments:
        yield from _parsed(_lines_backward(path) if newest_first else _lines_forward(path), skipped)


def _parsed(lines: Iterable[bytes], skipped: Skipped) -> Iterator[Prediction]:
    for line in lines:
        try:
            yield Prediction.model_validate_json(line)
        except ValidationError:
            skipped.malformed += 1


def _lines_forward(path: Path) -> Iterator[bytes]:
    """All whole lines; none of a segment that is gone."""
    try:
        with path.open("rb") as file:
            yield from takewhile(lambda line: line.endswith(b"\n"), file)
    except FileNotFoundError:
        return


def _lines_backward(path: Path) -> Iterator[bytes]:
    """All whole lines, the last one first, in memory of a block and a line."""
    try:
        with path.open("rb") as file:
            yield from _split_backward(file.fileno(), os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        return


def _split_backward(descriptor: int, end: int) -> Iterator[bytes]:
    rest, torn = b"", True
    while end > 0:
        start = max(end - _BLOCK, 0)
        rest, *lines = (os.pread(descriptor, end - start, start) + rest).split(b"\n")
        end = start
        while lines:
            if not torn:
                yield lines.pop()
            else:  # what stands after the last newline
                lines.pop()
                torn = False
    if not torn:
        yield rest


def _whole_lines(path: Path, offset: int, limit: int) -> bytes:
    """What stands from `offset` to the last newline, up to about `limit` bytes; empty if the segment is gone."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(limit)
            if len(content) == limit and b"\n" not in content:
                content += file.readline()
    except FileNotFoundError:
        return b""
    return content[: content.rfind(b"\n") + 1]
