"""What becomes of the log may cost lines, which are counted, and never a request: full disks, lost folders, kill -9.

The real handler answers in a worker of its own. The disks are small file systems in memory: root must mount them.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from torchrelay import archive
from torchrelay.serving.predictions import Prediction, Skipped, read

DRIVER = Path(__file__).parents[1] / "unit" / "handler_driver.py"
BODY = base64.b64encode(json.dumps({"instances": [[1, 2, 3]] * 100}).encode()).decode()  # a line of about 10 KB
PATIENCE_S = 20
SETTLE_S = 1.5  # a writer that is losing lines leaves no trace of how far it is

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")


class Worker:
    """Logs into `log`. Every request must be answered with 200."""

    def __init__(self, model: Path, python: str, log: Path, megabytes: int = 256) -> None:
        self.log, self.asked = log, 0
        environment = {
            "TORCHRELAY_INSTANCE": str(model.parent / "instance"),
            "TORCHRELAY_PREDICTIONS": str(log),
            "TORCHRELAY_PREDICTIONS_MB": str(megabytes),
        }
        self.process = subprocess.Popen(
            [python, str(DRIVER), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._answer() == "loaded\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, requests: int) -> None:
        assert self.process.stdin is not None
        for _ in range(requests):
            headers = {"content-type": "application/json", "x-torchrelay-request-id": f"r{self.asked}"}
            request = {"headers": headers, "content_type": "application/json", "body": BODY, "parsed": True}
            self.process.stdin.write(json.dumps([request]) + "\n")
            self.process.stdin.flush()
            [answer] = json.loads(self._answer())
            assert answer["status"] == 200
            self.asked += 1

    def lines(self) -> list[Prediction]:
        """In the log as it is; whatever happened to it, no line in it is spoiled."""
        skipped = Skipped()
        found = list(read(self.log, "tiny", skipped=skipped))
        assert skipped.malformed == 0
        return found

    def settle(self) -> list[Prediction]:
        """The lines, as soon as all that was asked is in them, or counted as dropped."""
        end = time.monotonic() + PATIENCE_S
        while (gap := self.asked - self.accounted()) and time.monotonic() < end:
            time.sleep(0.05)
        assert gap == 0
        return self.lines()

    def accounted(self) -> int:
        return sum(1 + line.dropped for line in self.lines())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def holds(folder: Path, text: bytes) -> bool:
    """Whether any segment has it, as far as they are not just being deleted."""
    return subprocess.run(["grep", "-rqsF", text, folder], check=False).returncode == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked archive, beside that of its instance."""
    folder = tmp_path_factory.mktemp("faults")
    tiny.pack(folder / "archive", version="7")
    archive.unpack(folder / "archive" / "model.mar", folder / "model")
    (folder / "instance" / "digests" / "tiny").mkdir(parents=True)
    (folder / "instance" / "digests" / "tiny" / "7").write_text("d" * 64)
    return folder / "model"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def worker(model: Path, component_python: str, tmp_path: Path) -> Iterator[Worker]:
    started = Worker(model, component_python, tmp_path / "log")
    yield started
    started.end()


@needs_root
def test_a_full_disk_costs_lines_and_the_log_goes_on_when_there_is_room(
    disk: Path, model: Path, component_python: str
) -> None:
    worker = Worker(model, component_python, disk)
    try:
        worker.ask(20)
        worker.settle()
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with filler.open("r+b") as file:  # room for a line and a half
            file.truncate(filler.stat().st_size - 16 * 1024)
        worker.ask(100)
        time.sleep(SETTLE_S)
        assert 20 <= len(worker.lines()) <= 22
        filler.unlink()
        worker.ask(30)
        found = worker.settle()
        assert [line.id for line in found[-25:]] == [f"r{number}" for number in range(125, 150)]
        assert max(line.dropped for line in found) >= 50
    finally:
        worker.end()


@needs_root
def test_a_read_only_disk_costs_lines_and_the_log_goes_on_when_it_is_not(
    disk: Path, model: Path, component_python: str
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    worker = Worker(model, component_python, disk)
    try:
        worker.ask(10)
        time.sleep(SETTLE_S)
        assert worker.lines() == []
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        worker.ask(1)
        assert [(line.id, line.dropped) for line in worker.settle()] == [("r10", 10)]
    finally:
        worker.end()


def test_a_folder_that_cannot_be_made_costs_lines_until_it_can(
    model: Path, component_python: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    (log / "tiny").write_text("in the way")
    worker = Worker(model, component_python, log)
    try:
        worker.ask(10)
        time.sleep(SETTLE_S)
        (log / "tiny").unlink()
        worker.ask(1)
        assert [(line.id, line.dropped) for line in worker.settle()] == [("r10", 10)]
    finally:
        worker.end()


def test_a_deleted_folder_is_made_again(worker: Worker) -> None:
    worker.ask(10)
    assert len(worker.settle()) == 10
    shutil.rmtree(worker.log)
    worker.ask(5)
    end = time.monotonic() + PATIENCE_S
    while not worker.lines() and time.monotonic() < end:
        time.sleep(0.05)
    assert [line.id for line in worker.lines()] == [f"r{number}" for number in range(10, 15)]


@pytest.mark.parametrize("requests", [40, 150, 400])
def test_kill_9_costs_the_last_lines_at_most(requests: int, worker: Worker) -> None:
    """All that is there is whole, in order and without a gap, and reaches to a moment before the end."""
    worker.ask(1)
    worker.settle()
    worker.ask(requests)
    killed = time.time()
    worker.end()
    found = worker.lines()
    assert [line.id for line in found] == [f"r{number}" for number in range(len(found))]
    assert len(found) > requests or found[-1].time > killed - 1


def test_the_folder_keeps_its_bound_and_its_newest_lines(model: Path, component_python: str, tmp_path: Path) -> None:
    """What other workers left goes first; a reader that holds a segment goes on reading what was deleted."""
    (tmp_path / "tiny").mkdir()
    left = [tmp_path / "tiny" / f"6-1-{number}-0.jsonl" for number in range(3)]
    for number, path in enumerate(left):
        path.write_bytes(b"x\n" * 200_000)
        os.utime(path, (number, number))
    worker = Worker(model, component_python, tmp_path, megabytes=1)
    try:
        worker.ask(1)
        end = time.monotonic() + PATIENCE_S
        while len(list((tmp_path / "tiny").glob("7-*"))) < 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert [path.exists() for path in left] == [False, True, True]
        with next((tmp_path / "tiny").glob("7-*")).open("rb") as held:
            worker.ask(300)  # about 3 MB
            end = time.monotonic() + PATIENCE_S
            while not holds(tmp_path / "tiny", b'"id":"r300"') and time.monotonic() < end:
                time.sleep(0.05)
            sizes = [path.stat().st_size for path in (tmp_path / "tiny").iterdir()]
            assert sum(sizes) <= 2**20
            assert max(path.stat().st_size for path in (tmp_path / "tiny").glob("7-*")) <= 2**17
            assert Prediction.model_validate_json(held.readline()).id == "r0"
        for path in left:
            path.unlink(missing_ok=True)
        found = [line.id for line in worker.lines()]
        assert len(found) >= 20
        assert found == [f"r{number}" for number in range(301 - len(found), 301)]
    finally:
        worker.end()
