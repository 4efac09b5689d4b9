"""Runs an archive in its own environment, in a process of its own: the golden proof, and the frozen test set."""

import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from torchrelay.archive import mar
from torchrelay.config import Json
from torchrelay.errors import ArchiveError, BrokenOffError
from torchrelay.handover import Evaluation, Proof

_TAIL = 2000
# No model sends itself these; the kernel does where memory is short, and people do.
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)


class _Outcome(BaseModel):
    """What the program says of the archive it ran."""

    component: str
    version: str
    samples: int
    largest_difference: float


def prove(archive: Path, python: str, timeout_s: float = 300, admit: Callable[[], object] = lambda: None) -> Proof:
    """The proof that `archive` (a .mar), run by the interpreter `python`, reproduces its golden outputs.

    `admit` says by an error that it must not run; it is called while that interpreter imports torch, and the archive
    is named to it only afterwards. Raises ArchiveError when the outputs differ, or it does not run at all.
    """
    outcome = _parsed(archive, _run(archive, python, [], timeout_s, admit))
    return Proof(**outcome.model_dump(), digest=mar.digest(archive))


def evaluate(archive: Path, python: str, test_set: Path, task: str, timeout_s: float = 1800) -> Evaluation:
    """One score per sample of `test_set` (test.npz), from the archive as it is, not from the weights it came from."""
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.json"
        _run(archive, python, _evaluating(test_set, task, scores), timeout_s)
        return Evaluation.model_validate_json(scores.read_bytes())


def replay(archive: Path, python: str, requests: list[Json], patience_s: float, timeout_s: float = 300) -> list[Json]:
    """The archive's answers to logged requests (`id` and `inputs`): `id`, `status`, `output` and `milliseconds`.

    The time is the model's own: what it had to wait for a processor is not counted. An answer that takes longer than
    `patience_s` is none. ArchiveError when all together take longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(archive, python, _replaying(requests, patience_s, folder), timeout_s)
        return _answers(folder)


class Examination(NamedTuple):
    """What an archive did in one run: `prove`, `evaluate` and `replay` have more on each."""

    proof: Proof
    evaluation: Evaluation
    answers: list[Json]


def examine(
    archive: Path,
    python: str,
    *,
    test_set: Path,
    task: str,
    requests: list[Json],
    patience_s: float,
    timeout_s: float,
) -> Examination:
    """All three in one process, which imports torch once. ArchiveError when any of them fails, or all take longer."""
    with tempfile.TemporaryDirectory() as name:
        folder, scores = Path(name), Path(name) / "scores.json"
        arguments = ["--golden", *_evaluating(test_set, task, scores), *_replaying(requests, patience_s, folder)]
        said = _run(archive, python, arguments, timeout_s)
        proof = Proof(**_parsed(archive, said).model_dump(), digest=mar.digest(archive))
        return Examination(proof, Evaluation.model_validate_json(scores.read_bytes()), _answers(folder))


def _evaluating(test_set: Path, task: str, scores: Path) -> list[str]:
    return ["--evaluate", str(test_set), "--task", task, "--scores", str(scores)]


def _replaying(requests: list[Json], patience_s: float, folder: Path) -> list[str]:
    given = folder / "requests.json"
    given.write_text(json.dumps(requests), encoding="utf-8")
    patience = ["--patience-ms", str(1000 * patience_s)]
    return ["--replay", str(given), "--answers", str(folder / "answers.json"), *patience]


def _answers(folder: Path) -> list[Json]:
    found: list[Json] = json.loads((folder / "answers.json").read_bytes())
    return found


def _run(
    archive: Path, python: str, arguments: list[str], timeout_s: float, admit: Callable[[], object] = lambda: None
) -> str:
    """What the program prints. Isolated (-I): no variable, no folder of ours changes what the environment imports."""
    with as_file(files("torchrelay.serving")) as folder:
        command = [python, "-I", "-B", str(folder / "prove.py"), *arguments]
        with _started(command) as child:
            mar.check(archive)
            admit()
            try:
                said, complaint = child.communicate(f"{archive}\n", timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise ArchiveError(
                    f"{archive} ran for {timeout_s:.0f} s without an end", "an end", mar.REPACK
                ) from error
    if child.returncode:
        raise _failure(archive, child.returncode, said, complaint)
    return said


@contextmanager
def _started(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A running program; whatever goes wrong meanwhile ends it."""
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    except OSError as error:
        raise BrokenOffError(f"{command[0]} does not start: {error}", "the environment's Python", mar.REPACK) from error
    with child:
        try:
            yield child
        except BaseException:
            child.kill()
            raise


def _failure(archive: Path, status: int, said: str, complaint: str) -> ArchiveError:
    """The program's own three parts if it got that far, else the end of what it wrote."""
    if status in _FROM_OUTSIDE:
        return BrokenOffError(f"{archive} was ended by signal {-status}", "a run to its end", "make doctor")
    try:
        parts: Json = json.loads(said)
        return ArchiveError(parts["found"], parts["expected"], parts["next_command"])
    except (ValueError, LookupError, TypeError):
        return ArchiveError(
            f"{archive} did not run (exit {status}): {complaint.strip()[-_TAIL:]}",
            "an archive that runs in its environment",
            mar.REPACK,
        )


def _parsed(archive: Path, said: str) -> _Outcome:
    try:
        return _Outcome.model_validate_json(said)
    except ValidationError as error:
        raise ArchiveError(f"{archive} proved nothing: {error}", "samples and a difference", mar.REPACK) from error
