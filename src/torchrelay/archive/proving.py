"""Runs an archive in its own environment, in a process of its own: the golden proof, and the frozen test set."""

import json
import subprocess
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from pydantic import BaseModel, ValidationError

from torchrelay.archive import mar
from torchrelay.config import Json
from torchrelay.errors import ArchiveError
from torchrelay.handover import Evaluation, Proof

_TAIL = 2000


class _Outcome(BaseModel):
    """What the program says of the archive it ran."""

    component: str
    version: str
    samples: int
    largest_difference: float


def prove(archive: Path, python: str, timeout_s: float = 300) -> Proof:
    """The proof that `archive` (a .mar), run by the interpreter `python`, reproduces its golden outputs.

    Raises ArchiveError when it does not, or does not run at all.
    """
    mar.check(archive)
    outcome = _parsed(archive, _run(archive, python, [], timeout_s))
    return Proof(**outcome.model_dump(), digest=mar.digest(archive))


def evaluate(archive: Path, python: str, test_set: Path, task: str, timeout_s: float = 1800) -> Evaluation:
    """One score per sample of `test_set` (test.npz), from the archive as it is, not from the weights it came from."""
    mar.check(archive)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "evaluation.json"
        arguments = ["--evaluate", str(test_set), "--task", task, "--output", str(output)]
        _run(archive, python, arguments, timeout_s)
        return Evaluation.model_validate_json(output.read_bytes())


def _run(archive: Path, python: str, arguments: list[str], timeout_s: float) -> str:
    """Isolated (-I): no variable and no folder of ours changes what the environment imports."""
    with as_file(files("torchrelay.serving")) as folder:
        command = [python, "-I", "-B", str(folder / "prove.py"), "--archive", str(archive), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except OSError as error:
            raise ArchiveError(f"{python} does not start: {error}", "the environment's Python", mar.REPACK) from error
        except subprocess.TimeoutExpired as error:
            raise ArchiveError(f"{archive} ran for {timeout_s:.0f} s without an end", "an end", mar.REPACK) from error
    if done.returncode:
        raise _failure(archive, done)
    return done.stdout


def _failure(archive: Path, done: subprocess.CompletedProcess[str]) -> ArchiveError:
    """The program's own three parts if it got that far, else the end of what it wrote."""
    try:
        said: Json = json.loads(done.stdout)
        return ArchiveError(said["found"], said["expected"], said["next_command"])
    except (ValueError, LookupError, TypeError):
        return ArchiveError(
            f"{archive} did not run (exit {done.returncode}): {done.stderr.strip()[-_TAIL:]}",
            "an archive that runs in its environment",
            mar.REPACK,
        )


def _parsed(archive: Path, said: str) -> _Outcome:
    try:
        return _Outcome.model_validate_json(said)
    except ValidationError as error:
        raise ArchiveError(f"{archive} proved nothing: {error}", "samples and a difference", mar.REPACK) from error
