"""The base handler, which answers requests inside a TorchServe worker.

It is copied into every archive as `torchrelay_handler.py` and runs in the component's environment, where nothing of
torchrelay is importable: torch and the standard library only. TorchServe wants exactly one class in this module, so
the writer of the prediction log (docs/prediction-log.md) stands inside that class. TorchServe hands over a batch of
requests as rows (`body`, or `data`, already parsed when TorchServe could parse it as JSON) and takes one answer per
row; each has a status and headers of its own.
"""

import atexit
import base64
import hashlib
import importlib
import json
import logging
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
Reply = tuple[int, dict[str, Any]]
# What the log needs of one request: id, headers, status, the answer, the tensor it was encoded to, and its row.
Entry = tuple[str, dict[str, Any], int, bytes, "torch.Tensor | None", Row]
# A batch of them: when it came in (unix seconds), how long it took (milliseconds), and about how many bytes it holds.
Batch = tuple[float, float, list[Entry], int]

logger = logging.getLogger(__name__)
# What curl sends unless told otherwise: TorchServe takes such a body apart, so there is nothing left to read.
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data"})
_INTERNAL: Reply = (500, {"error": "the model failed on this request; the worker's log has the details"})

_MAX_OUTPUT = 16 * 2**10  # bytes of an answer that are logged; a longer one is named by its hash
_MAX_INPUTS = 64 * 2**10  # bytes of a request's inputs that are logged, if any may be
_INPUTS_PER_S = 20
_SEGMENT_BYTES, _SEGMENT_S = 8 * 2**20, 600
_OWN_SEGMENTS = 4  # of one worker: 32 MB
_FLUSH_S = 0.1
_LOADING_NICENESS = 5
_LEAVE_S = 0.02
_STOP_S = 0.5  # for the last lines, when the worker is stopped
_MAX_QUEUED, _MAX_QUEUED_BYTES = 4096, 16 * 2**20
# So many requests are summarized at a time, since that costs little more than one. After every few lines the writer
# stands aside: a thread that wants Python's lock gets it only when the other one lets go of it, or after 5 ms.
_CHUNK, _CHUNK_BYTES = 256, 2**20
_AT_A_STRETCH = 16 * 2**10  # bytes of lines
_ASIDE_S = 0.0001


class TorchrelayHandler:
    """One worker: a predictor, and who it is (component, version, archive digest), read once when it loads."""

    def initialize(self, context: Any) -> None:
        """Load the predictor from TorchServe's model folder and warm it up with the golden inputs.

        TORCHRELAY_INSTANCE names the engine's folder, where `digests/<component>/<version>` holds the digest of the
        archive that the engine was given. Raises RuntimeError without it: an answer must be traceable.
        TORCHRELAY_MEMORY_MB is what this worker may grow to; RuntimeError where the model alone takes more.
        """
        logging.getLogger().setLevel(logging.WARNING)  # TorchServe's worker logs a line per batch
        folder = Path(context.system_properties["model_dir"])
        release = json.loads((folder / "release.json").read_bytes())
        self.headers = _identity(release)
        _at_low_priority(lambda: self._load(folder))
        import torch

        torch.set_num_threads(1)
        self.most_mb, self.leaving = _memory_limit(), False
        self.log = _prediction_log(release["component"], self.headers)

    def _load(self, folder: Path) -> None:
        """The predictor, and its first passes, which are the slowest."""
        self.predictor = _predictor(folder)
        golden = json.loads((folder / "golden.json").read_bytes())["instances"]
        for instances in (golden, golden[:1]):
            self._forward(self.predictor.encode(instances))

    def handle(self, rows: list[Row], context: Any) -> list[bytes]:
        """Answer every row. A bad request gets a 4xx and never spoils its neighbours in the batch.

        Raises MemoryError in a worker that is about to end: TorchServe makes a 507 of it, and the gateway asks another.
        """
        if self.leaving:
            raise MemoryError("this worker has grown too large and ends")
        began, clock = time.time(), time.perf_counter()
        replies: dict[int, Reply] = {}
        encoded: dict[int, torch.Tensor] = {}
        asked = [_headers(context, index) for index in range(len(rows))]
        ids = [_request_id(context, index, headers) for index, headers in enumerate(asked)]
        for index, row in enumerate(rows):
            content_type = _content_type(asked[index])
            if content_type in _FORMS:
                replies[index] = _unsupported(content_type)
                continue
            try:
                encoded[index] = self._encode(row, content_type)
            except ValueError as error:
                replies[index] = (400, {"error": str(error)})
            except RecursionError:
                replies[index] = (400, {"error": "the body is nested too deeply"})
            except Exception:  # whatever a component's code raises concerns this request alone
                logger.exception("encoding a request failed")
                replies[index] = _INTERNAL
        replies |= self._predict(encoded)
        answers = [self._answer(context, index, replies[index], ids[index]) for index in range(len(rows))]
        if self.log:
            kept = self.log.sampled(rows)
            entries = [
                (request_id, headers, *answer, encoded.get(index), row)
                for index, (request_id, headers, answer, row) in enumerate(zip(ids, asked, answers, kept, strict=True))
            ]
            self.log.put(began, (time.perf_counter() - clock) * 1e3, entries)
        if self.most_mb and _peak_mb() > self.most_mb:
            self._leave()
        return [body for _, body in answers]

    def _leave(self) -> None:
        """End this worker once its answers are out; TorchServe starts another one, and neighbours answer meanwhile."""
        logger.error("this worker has grown beyond serving.max_memory_mb, %d MB: another one takes over", self.most_mb)
        self.leaving = True

        def end() -> None:
            if self.log:
                self.log.close()
            os._exit(1)

        threading.Timer(_LEAVE_S, end).start()

    def _encode(self, row: Row, content_type: str) -> "torch.Tensor":
        """(N, …) for one request; ValueError says what is wrong with it."""
        body = row.get("body", row.get("data"))
        if body is None:
            raise ValueError('the request has no body; expected JSON {"instances": [...]} or an image')
        if content_type in ("", "application/json"):
            return self.predictor.encode(_instances(body))
        raw = body.encode() if isinstance(body, str) else body if isinstance(body, bytes) else bytes(body)
        return self.predictor.encode(self.predictor.decode(raw, content_type))

    def _predict(self, encoded: "dict[int, torch.Tensor]") -> dict[int, Reply]:
        """One forward pass over all; if it fails, one for each, so that only the culprits get a 500."""
        if not encoded:
            return {}
        try:
            return self._split(encoded)
        except Exception:  # whatever a component's code raises concerns these requests alone
            logger.exception("a forward pass over %d requests failed", len(encoded))
        if len(encoded) == 1:
            return dict.fromkeys(encoded, _INTERNAL)
        return {index: self._predict({index: part})[index] for index, part in encoded.items()}

    def _split(self, encoded: "dict[int, torch.Tensor]") -> dict[int, Reply]:
        import torch

        parts = list(encoded.values())
        # A predictor may write into its batch, and the log looks at the parts later: then even one is copied.
        rest = iter(self._forward(torch.cat(parts) if len(parts) > 1 or self.log else parts[0]))
        return {
            index: (200, {"predictions": [next(rest) for _ in range(len(part))]}) for index, part in encoded.items()
        }

    def _forward(self, batch: "torch.Tensor") -> list[Any]:
        import torch

        with torch.inference_mode():
            predictions = list(self.predictor.predict(batch))
        if len(predictions) != len(batch):
            raise RuntimeError(f"predict gave {len(predictions)} predictions for {len(batch)} instances")
        return predictions

    def _answer(self, context: Any, index: int, reply: Reply, request_id: str) -> tuple[int, bytes]:
        """Set status and headers of the row, and give its status and body."""
        status, content = reply
        try:
            body = _json(content if status == 200 else content | {"request_id": request_id})
        except (TypeError, ValueError, RecursionError):
            logger.exception("a prediction is not JSON")
            status, content = _INTERNAL
            body = _json(content | {"request_id": request_id})
        context.set_response_status(status, HTTPStatus(status).phrase, index)
        for name, value in (*self.headers.items(), ("x-torchrelay-request-id", request_id)):
            context.set_response_header(index, name, value)
        return status, body

    class Log:
        """Writes a line per request into segment files, in a thread of its own: no answer ever waits for it.

        What cannot be kept or written is dropped and counted; the next line that is written says how many were.
        """

        def __init__(self, folder: Path, headers: dict[str, str], keep_inputs: bool, limit: int) -> None:
            """`folder` is the component's; `limit` the bytes of all segments in it, whoever wrote them."""
            self.folder, self.headers, self.keep_inputs, self.limit = folder, headers, keep_inputs, limit
            self.stem = f"{headers['x-model-version']}-{os.getpid()}-{int(time.time() * 1000)}"
            self.segment_bytes = min(_SEGMENT_BYTES, limit // 8)
            self.file, self.size, self.opened, self.number = -1, 0, 0.0, 0
            self.queue: deque[Batch] = deque()
            # Each of these is written by one thread alone, so none needs a lock.
            self.put_rows = self.put_bytes = self.refused = 0
            self.taken_rows = self.taken_bytes = self.lost = self.reported = 0
            self.failing = False
            self.allowed, self.counted = float(_INPUTS_PER_S), time.monotonic()
            self.wake, self.stop = threading.Event(), threading.Event()
            self.thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
            self.thread.start()

        def sampled(self, rows: list[Row]) -> list[Row]:
            """The rows whose inputs are kept, and an empty one in the place of every other.

            A few a second are kept: to write all of them out again would cost a busy worker a third of its time.
            """
            if not self.keep_inputs:
                return [{}] * len(rows)
            now = time.monotonic()
            self.allowed = min(_INPUTS_PER_S, self.allowed + (now - self.counted) * _INPUTS_PER_S)
            self.counted = now
            count = min(len(rows), int(self.allowed))
            self.allowed -= count
            return [*rows[:count], *[{}] * (len(rows) - count)]

        def put(self, began: float, milliseconds: float, entries: list[Entry]) -> None:
            """Queue a batch that came in at `began` (unix seconds), or drop it if the queue is full."""
            if self.keep_inputs:
                entries = [entry if _input_bytes(entry) <= _MAX_INPUTS else (*entry[:5], {}) for entry in entries]
            weight = sum(map(_weight, entries))
            rows, size = self.put_rows - self.taken_rows, self.put_bytes - self.taken_bytes
            if rows and (rows + len(entries) > _MAX_QUEUED or size + weight > _MAX_QUEUED_BYTES):
                self.refused += len(entries)
                return
            self.put_rows += len(entries)
            self.put_bytes += weight
            self.queue.append((began, milliseconds, entries, weight))
            if not self.wake.is_set():
                self.wake.set()

        def close(self) -> None:
            """Have what is queued written, for half a second at most."""
            self.stop.set()
            self.wake.set()
            self.thread.join(_STOP_S)

        def _run(self) -> None:
            while not self.stop.is_set() or self.queue:
                self.wake.wait()
                self.stop.wait(_FLUSH_S)
                self.wake.clear()
                self._flush()

        def _flush(self) -> None:
            lines: list[bytes] = []
            size = stretch = 0
            while self.queue:
                for line in self._take():
                    lines.append(line)
                    size += len(line)
                    stretch += len(line)
                    if stretch > _AT_A_STRETCH:
                        time.sleep(_ASIDE_S)
                        stretch = 0
                    if size > self.segment_bytes // 8:
                        self._write(lines)
                        lines, size = [], 0
            self._write(lines)

        def _take(self) -> Iterator[bytes]:
            """The lines of the batches that have waited longest."""
            batches, rows, size = [], 0, 0
            while self.queue and rows < _CHUNK and size < _CHUNK_BYTES:
                batches.append(self.queue.popleft())
                rows += len(batches[-1][2])
                size += batches[-1][3]
            self.taken_rows += rows
            self.taken_bytes += size
            try:
                for line in _lines(self.headers, batches, self.keep_inputs):
                    rows -= 1
                    yield line
            except Exception:  # the thread must live on, whatever a component's tensors are; the loss is counted
                logger.exception("%d requests could not be described for the prediction log", rows)
                self.lost += rows

        def _write(self, lines: list[bytes]) -> None:
            if not lines:
                return
            dropped = self.refused + self.lost - self.reported
            if dropped:
                lines[0] = b'%s,"dropped":%d}\n' % (lines[0][:-2], dropped)
            content = b"".join(lines)
            whole = content[: self._append(content)].count(b"\n")
            self.lost += len(lines) - whole
            self.reported += dropped if whole else 0

        def _append(self, content: bytes) -> int:
            """How many bytes could be written. A line that is cut short is the last one of its segment."""
            written, problem = 0, ""
            try:
                self._open(len(content))
                written = os.write(self.file, content)
                problem = "no room" if written < len(content) else ""
            except OSError as error:
                problem = str(error)
            self._say(problem)
            self.size += written
            if 0 < written < len(content):
                self._close()
            return written

        def _say(self, problem: str) -> None:
            """One line when an outage begins, and one when it ends."""
            if problem and not self.failing:
                logger.warning("the prediction log loses lines: %s", problem)
            elif self.failing and not problem:
                logger.warning("the prediction log is written again")
            self.failing = bool(problem)

        def _open(self, size: int) -> None:
            """Have a segment open that `size` bytes still go into; one that somebody deleted is left."""
            fits = self.size + size <= self.segment_bytes and time.monotonic() - self.opened < _SEGMENT_S
            if self.file >= 0 and fits and os.fstat(self.file).st_nlink:
                return
            self._close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room()
            path = self.folder / f"{self.stem}-{self.number}.jsonl"
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            self.size, self.opened, self.number = 0, time.monotonic(), self.number + 1

        def _close(self) -> None:
            if self.file >= 0:
                os.close(self.file)
            self.file = -1

        def _make_room(self) -> None:
            """Delete this worker's segments but the newest three, then the oldest of all until one more fits."""
            (self.folder / f"{self.stem}-{self.number - _OWN_SEGMENTS}.jsonl").unlink(missing_ok=True)
            found = sorted(_segments(self.folder))
            total = sum(size for _, size, _ in found)
            for _, size, path in found:
                if total + self.segment_bytes <= self.limit:
                    return
                path.unlink(missing_ok=True)
                total -= size


def _at_low_priority(load: Callable[[], None]) -> None:
    """Run it where it yields to what answers: Linux has a priority for each thread, and none comes up again.

    Loading keeps a core busy for seconds, and it is beside a version in service that a version loads.
    """
    if sys.platform != "linux":
        return load()

    def lower() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(_LOADING_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))

    with ThreadPoolExecutor(1, initializer=lower) as aside:
        return aside.submit(load).result()


def _memory_limit() -> int:
    """What this worker may grow to, in MB; 0: whatever it likes."""
    limit = int(os.environ.get("TORCHRELAY_MEMORY_MB") or 0)
    if limit and _peak_mb() > limit:
        raise RuntimeError(f"the model alone takes {_peak_mb()} MB; serving.max_memory_mb allows {limit}")
    return limit


def _peak_mb() -> int:
    """The most memory that this process has had, in MB. Linux counts kilobytes, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


def _prediction_log(component: str, headers: dict[str, str]) -> "TorchrelayHandler.Log | None":
    """The log of this worker where TORCHRELAY_PREDICTIONS names a folder; it is closed when the worker ends."""
    folder = os.environ.get("TORCHRELAY_PREDICTIONS")
    if not folder:
        return None
    megabytes = os.environ.get("TORCHRELAY_PREDICTIONS_MB") or "256"
    if not re.fullmatch(r"[1-9][0-9]{0,8}", megabytes):
        raise RuntimeError(f"TORCHRELAY_PREDICTIONS_MB is {megabytes!r}; expected a whole number of megabytes above 0")
    keep_inputs = os.environ.get("TORCHRELAY_KEEP_INPUTS") == "1"
    log = TorchrelayHandler.Log(Path(folder) / component, headers, keep_inputs, int(megabytes) * 2**20)
    atexit.register(log.close)
    if threading.current_thread() is threading.main_thread():
        _close_at_sigterm(log)
    return log


def _close_at_sigterm(log: "TorchrelayHandler.Log") -> None:
    """Have SIGTERM still end the worker at once, but for the last lines."""
    before = signal.getsignal(signal.SIGTERM)

    def close(number: int, _: object) -> None:
        log.close()
        signal.signal(number, before or signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, close)


def _segments(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each segment was last written to, its bytes and its path."""
    for path in folder.glob("*.jsonl"):
        try:
            found = path.stat()
        except FileNotFoundError:  # another worker deleted it
            continue
        yield found.st_mtime, found.st_size, path


def _input_bytes(entry: Entry) -> int:
    """How large the request's body is, as far as its headers or its tensor say."""
    length = str(entry[1].get("content-length", ""))
    if length.isdecimal():
        return int(length)
    return 0 if entry[4] is None else entry[4].numel()


def _weight(entry: Entry) -> int:
    """About how much memory an entry holds on to, in bytes."""
    _, _, _, answer, part, row = entry
    return len(answer) + (0 if part is None else part.nbytes) + (_input_bytes(entry) if row else 0)


def _lines(identity: dict[str, str], batches: list[Batch], keep_inputs: bool) -> Iterator[bytes]:
    """A line of JSON for each request."""
    version, digest = json.dumps(identity["x-model-version"]), json.dumps(identity["x-archive-digest"])
    summaries = iter(_summaries([entry[4] for batch in batches for entry in batch[2]]))
    for began, milliseconds, entries, _ in batches:
        when, took = f'"time":{began:.6f},"version":{version},"digest":{digest}', f"{milliseconds:.3f}"
        for entry in entries:
            yield _line(entry, when, took, next(summaries), keep_inputs)


def _line(entry: Entry, when: str, milliseconds: str, summary: str, keep_inputs: bool) -> bytes:
    request_id, headers, status, answer, part, _ = entry
    shadow = "true" if _is_shadow(headers) else "false"
    head = (
        f'{{"id":{json.dumps(request_id)},{when},"shadow":{shadow},"status":{status},"milliseconds":{milliseconds},'
        f'"summary":{summary},"output":'
    )
    inputs = _inputs(entry) if keep_inputs and part is not None else b""
    return b"%s%s%s}\n" % (head.encode(), _output(answer), inputs)


def _is_shadow(headers: dict[str, Any]) -> bool:
    """Whether the gateway made this copy of a request. It lets no caller set this header."""
    return bool(headers.get("x-torchrelay-shadow"))


def _output(answer: bytes) -> bytes:
    """The answer itself, or what names it if it is long."""
    if len(answer) <= _MAX_OUTPUT:
        return answer
    return b'{"cut":%d,"sha256":"%s"}' % (len(answer), hashlib.sha256(answer).hexdigest().encode())


def _inputs(entry: Entry) -> bytes:
    """The field `instances`: what the same request can be made of again, or how many bytes were left out."""
    headers, row = entry[1], entry[5]
    try:
        text = json.dumps(_replayable(row, headers), allow_nan=False, separators=(",", ":")) if row else ""
    except (TypeError, ValueError, RecursionError):  # not JSON, for example NaN, which Python's parser lets in
        text = ""
    if 0 < len(text) <= _MAX_INPUTS:
        return b',"instances":%s' % text.encode()
    return b',"instances":{"omitted":%d}' % _input_bytes(entry)


def _replayable(row: Row, headers: dict[str, Any]) -> Any:
    body: Any = row.get("body", row.get("data"))
    if _content_type(headers) in ("", "application/json"):
        return _instances(body)
    raw = body.encode() if isinstance(body, str) else bytes(body)
    return {"base64": base64.b64encode(raw).decode(), "content_type": str(headers["content-type"])}


def _summaries(parts: "list[torch.Tensor | None]") -> list[str]:
    """For each request the JSON of what its tensor looks like; null where it was not encoded."""
    import torch

    with torch.inference_mode():
        rows = iter(_row_figures([part for part in parts if part is not None]))
        return ["null" if part is None else _summary(part, part.shape, rows) for part in parts]


def _row_figures(tensors: "list[torch.Tensor]") -> list[list[float]]:
    """Minimum, maximum, mean and standard deviation of each row; of all tensors at once where they are alike."""
    import torch

    if len({tensor.shape[1:] for tensor in tensors}) != 1:
        return [figures for tensor in tensors for figures in _row_figures([tensor])]
    batch = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    flat = batch.reshape(len(batch), math.prod(batch.shape[1:]))
    if not flat.numel():
        return [[math.nan] * 4] * len(batch)
    wide = flat.dtype in (torch.int32, torch.int64, torch.float64)
    flat = flat.to(torch.float64 if wide else torch.float32)
    mean = flat.sum(1, keepdim=True) / flat.shape[1]
    deviation = torch.linalg.vector_norm(flat - mean, dim=1) / math.sqrt(flat.shape[1])
    figures: list[list[float]] = torch.stack((flat.amin(1), flat.amax(1), mean[:, 0], deviation), 1).tolist()
    return figures


def _summary(part: "torch.Tensor", shape: "torch.Size", rows: Iterator[list[float]]) -> str:
    """Of one request, whose rows' figures come next in `rows`."""
    figures, not_finite = next(rows) if shape[0] == 1 else _over_rows([next(rows) for _ in range(shape[0])]), 0
    if not all(map(math.isfinite, figures)):
        figures, not_finite = _finite_figures(part)
    low, high, mean, deviation = (f"{figure:.6g}" if math.isfinite(figure) else "null" for figure in figures)
    kind = _kind(shape, part.dtype)
    return f'{kind},"min":{low},"max":{high},"mean":{mean},"std":{deviation},"not_finite":{not_finite}}}'


@lru_cache(maxsize=64)
def _kind(shape: "torch.Size", dtype: "torch.dtype") -> str:
    """How a summary begins; most requests of a component are of one kind."""
    return f'{{"rows":{shape[0]},"shape":{list(shape[1:])},"dtype":"{str(dtype).removeprefix("torch.")}"'


def _over_rows(rows: list[list[float]]) -> list[float]:
    """The figures of rows of one size together; NaN where there is none."""
    if not rows:
        return [math.nan] * 4
    lows, highs, means, deviations = zip(*rows, strict=True)
    mean = sum(means) / len(rows)
    variance = sum(d * d + (m - mean) ** 2 for m, d in zip(means, deviations, strict=True)) / len(rows)
    return [min(lows), max(highs), mean, math.sqrt(variance) if math.isfinite(variance) else math.nan]


def _finite_figures(part: "torch.Tensor") -> tuple[list[float], int]:
    """The same of its finite numbers alone, and how many are not finite."""
    flat = part.reshape(-1).double()
    finite = flat[flat.isfinite()]
    if not len(finite):
        return [math.nan] * 4, len(flat)
    figures = (finite.min(), finite.max(), finite.mean(), finite.std(correction=0))
    return [figure.item() for figure in figures], len(flat) - len(finite)


def _identity(release: dict[str, str]) -> dict[str, str]:
    """The headers that say which worker answered."""
    component, version = release["component"], release["version"]
    instance = os.environ.get("TORCHRELAY_INSTANCE")
    if not instance:
        raise RuntimeError("TORCHRELAY_INSTANCE is not set; expected the folder of the engine instance")
    file = Path(instance) / "digests" / component / version
    if not file.is_file():
        raise RuntimeError(f"{file} does not exist; expected the digest of the archive, written before it is loaded")
    return {
        "content-type": "application/json",
        "x-component": component,
        "x-model-version": version,
        "x-archive-digest": file.read_text(encoding="ascii").strip(),
    }


def _predictor(folder: Path) -> Any:
    """The component's own Predictor; its modules are found by plain name, before any other of that name."""
    sys.path.insert(0, str(folder))
    return importlib.import_module("handler").Predictor(folder)


def _headers(context: Any, index: int) -> dict[str, Any]:
    return {name.lower(): value for name, value in context.get_all_request_header(index).items()}


def _content_type(headers: dict[str, Any]) -> str:
    """Without parameters, in lower case; empty where none is given."""
    return str(headers.get("content-type", "")).partition(";")[0].strip().lower()


def _unsupported(content_type: str) -> Reply:
    expected = 'application/json with {"instances": [...]}, or the type of an image'
    return 415, {"error": f"the content-type is {content_type}; expected {expected}"}


def _request_id(context: Any, index: int, headers: dict[str, Any]) -> str:
    """The gateway's id of the request; TorchServe's own where no gateway stands before it."""
    return str(headers.get("x-torchrelay-request-id") or context.get_request_id(index) or "")


def _instances(body: Any) -> list[Any]:
    """The instances of a JSON body, which TorchServe has parsed unless it could not."""
    if isinstance(body, bytes | bytearray | str):
        try:
            body = json.loads(body)
        except ValueError as error:
            raise ValueError(f"the body is not JSON: {error}") from error
    match body:
        case {"instances": [*instances]} if instances:
            return instances
        case {"instances": []}:
            raise ValueError('"instances" is empty; expected at least one instance')
    raise ValueError('the body has no list named "instances"; expected {"instances": [...]}')


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
