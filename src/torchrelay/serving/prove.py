"""Runs an archive's Predictor outside any engine: its golden outputs, a frozen test set, or logged requests.

This file is run by path, by the interpreter of the component's environment: torch, numpy and the standard library
only. It prints one JSON document; on failure that holds `found`, `expected` and `next_command`, and the exit code is 1.
"""

import argparse
import base64
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

_BATCH = 256
_ENOUGH_LATE = 20
_AGAIN = "train the component again in this environment: make deploy-dev"


class Failure(Exception):  # noqa: N818 - errors of torchrelay cannot be imported here
    """The archive does not do what it should; in three parts."""

    def __init__(self, found: str, expected: str, next_command: str = _AGAIN) -> None:
        super().__init__(found)
        self.parts = {"found": found, "expected": expected, "next_command": next_command}


def main(arguments: list[str]) -> int:
    """Run as the command line says; whatever a component prints goes to stderr."""
    options = _options(arguments)
    try:
        with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
            result = _run(options, Path(folder))
        code = 0
    except Failure as failure:
        result, code = failure.parts, 1
        sys.stderr.write("{found}\n  expected: {expected}\n  next:     {next_command}\n".format(**failure.parts))
    sys.stdout.write(json.dumps(result) + "\n")
    return code


def prove(folder: Path, predictor: Any) -> dict[str, Any]:
    """How many golden samples there are, and the largest difference of any number in their outputs."""
    golden = _json(folder / "golden.json")
    found = json.loads(json.dumps(_predict(predictor, golden["instances"])))
    difference = _largest_difference(golden["predictions"], found)
    if not difference <= golden["tolerance"]:
        raise Failure(
            f"the archive's outputs differ from its golden outputs by {difference:.6g}",
            f"at most {golden['tolerance']:.6g}",
        )
    release = _json(folder / "release.json")
    return {
        "component": release["component"],
        "version": release["version"],
        "samples": len(golden["instances"]),
        "largest_difference": difference,
    }


def evaluate(predictor: Any, test_set: Path, task: str) -> dict[str, Any]:
    """One score per sample of the test set (arrays `instances` and `labels`), in its order."""
    import numpy as np

    score = _SCORES[task]
    with np.load(test_set, allow_pickle=False) as arrays:
        instances, labels = arrays["instances"], arrays["labels"].tolist()
    if len(instances) != len(labels):
        raise Failure(f"{test_set} has {len(instances)} instances and {len(labels)} labels", "one label per instance")
    predictions = _batches(predictor, instances)
    scores = [score(prediction, label) for prediction, label in zip(predictions, labels, strict=True)]
    slices = {"class": [str(label) for label in labels]} if task == "classification" else {}
    return {"test_set": _sha256(test_set), "scores": scores, "slices": slices}


def replay(predictor: Any, requests: list[dict[str, Any]], patience_ms: float) -> list[dict[str, Any]]:
    """The answer to each logged request, one by one, with its status and the milliseconds that it took.

    A request holds `id` and its `inputs`: a list of instances, or `base64` and `content_type`. An answer that took
    longer than `patience_ms` counts as none (504); after twenty of these the rest is not asked, and counts as none.
    """
    answers: list[dict[str, Any]] = []
    late = 0
    for request in requests:
        if late >= _ENOUGH_LATE:
            answers.append({"id": request["id"], "status": 504, "output": None, "milliseconds": patience_ms})
            continue
        answer = _replayed(predictor, request)
        if answer["milliseconds"] > patience_ms:
            late += 1
            answer["status"] = 504
        answers.append(answer)
    return answers


def _replayed(predictor: Any, request: dict[str, Any]) -> dict[str, Any]:
    began, waited = time.perf_counter(), _waited_s()
    status: int
    output: dict[str, Any]
    try:
        answered = {"predictions": _predict(predictor, _inputs(predictor, request["inputs"]))}
        status, output = 200, json.loads(json.dumps(answered, allow_nan=False))
    except Failure as failure:
        status, output = 400, {"error": failure.parts["found"]}
    except Exception as error:  # whatever a component's code raises is its answer to this request
        status, output = 500, {"error": f"{type(error).__name__}: {error}"}
    waited = _waited_s() - waited
    milliseconds = 1000 * (time.perf_counter() - began - waited)
    return {"id": request["id"], "status": status, "output": output, "milliseconds": milliseconds}


def _waited_s() -> float:
    """Seconds that this thread could have run and got no processor, where the system counts that (Linux).

    What a request takes is the model's; that others are busy beside it, and come first, is not.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, LookupError):
        return 0.0


def _inputs(predictor: Any, inputs: Any) -> list[Any]:
    if isinstance(inputs, list):
        return inputs
    found: list[Any] = predictor.decode(base64.b64decode(inputs["base64"]), inputs["content_type"])
    return found


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a model archive's Predictor.")
    parser.add_argument(
        "--archive", type=Path, help="the model.mar; default: named on standard input, after torch is up"
    )
    parser.add_argument("--golden", action="store_true", help="prove the golden outputs; the default where all else is")
    parser.add_argument("--evaluate", type=Path, metavar="TEST_NPZ", help="score this test set")
    parser.add_argument("--scores", type=Path, help="where --evaluate writes what it found")
    parser.add_argument("--replay", type=Path, metavar="JSON", help="answer these logged requests")
    parser.add_argument("--answers", type=Path, help="where --replay writes what it found")
    parser.add_argument(
        "--patience-ms", type=float, default=30_000.0, help="a replayed answer that takes longer is none"
    )
    parser.add_argument("--task", choices=sorted(_SCORES), default="classification")
    options = parser.parse_args(arguments)
    if bool(options.evaluate) != bool(options.scores) or bool(options.replay) != bool(options.answers):
        parser.error("--evaluate goes with --scores, --replay with --answers")
    return options


def _run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    _unpack(options.archive or _named(), folder)
    predictor = _predictor(folder)
    proof = prove(folder, predictor) if options.golden or not (options.evaluate or options.replay) else {}
    if options.evaluate:
        _write(options.scores, json.dumps(evaluate(predictor, options.evaluate, options.task)).encode())
    if options.replay:
        answers = replay(predictor, json.loads(options.replay.read_bytes()), options.patience_ms)
        _write(options.answers, json.dumps(answers).encode())
    return proof


def _named() -> Path:
    """The archive, from a caller who makes use of the seconds that torch takes."""
    import torch  # noqa: F401 - the import itself is what takes long

    line = sys.stdin.readline().strip()
    if not line:
        raise Failure("nobody named an archive", "its path on standard input, or as --archive")
    return Path(line)


def _unpack(archive: Path, folder: Path) -> None:
    """An archive's members lie flat and are stored, so they can neither leave the folder nor grow."""
    try:
        with zipfile.ZipFile(archive) as mar:
            for entry in mar.infolist():
                if entry.filename == "MAR-INF/MANIFEST.json":
                    continue
                if Path(entry.filename).name != entry.filename or entry.compress_type != zipfile.ZIP_STORED:
                    raise Failure(f"{archive} holds {entry.filename!r}", "stored files without folders")
                mar.extract(entry, folder)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise Failure(f"{archive} cannot be read: {error}", "a whole archive") from error


def _predictor(folder: Path) -> Any:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    return importlib.import_module("handler").Predictor(folder)


def _predict(predictor: Any, instances: list[Any]) -> list[Any]:
    import torch

    try:
        batch = predictor.encode(instances)
    except ValueError as error:
        raise Failure(f"the Predictor refuses its own input: {error}", "inputs that it accepts") from error
    with torch.inference_mode():
        predictions = list(predictor.predict(batch))
    if len(predictions) != len(instances):
        raise Failure(f"{len(predictions)} predictions for {len(instances)} instances", "one for each")
    return predictions


def _batches(predictor: Any, instances: Any) -> Iterator[Any]:
    for start in range(0, len(instances), _BATCH):
        yield from _predict(predictor, instances[start : start + _BATCH].tolist())


def _hit(prediction: dict[str, Any], label: Any) -> float:
    return float(prediction["class"] == label)


def _closeness(prediction: dict[str, Any], label: Any) -> float:
    return -abs(float(prediction["value"]) - float(label))


_SCORES: dict[str, Callable[[dict[str, Any], Any], float]] = {"classification": _hit, "regression": _closeness}


def _largest_difference(expected: Any, found: Any) -> float:
    """From golden.py beside this file, loaded by path: this process has no torchrelay to import it from."""
    spec = importlib.util.spec_from_file_location("torchrelay_golden", Path(__file__).with_name("golden.py"))
    if spec is None or spec.loader is None:
        raise ImportError("golden.py is not beside prove.py")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    return float(golden.largest_difference(expected, found))


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
