"""Runs a command to its end and says what it cost; summarises samples."""

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class BenchError(Exception):
    """A command of the benchmark failed; the message holds the end of its log."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: by the clock, and of processor time in it and all that it waited for."""

    wall: float
    cpu: float


def timed(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Sample:
    """Run `command` in `folder`, its output appended to `log`. Raises BenchError where it fails."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        began = time.monotonic()
        child = subprocess.Popen(command, cwd=folder, env=dict(environment), stdout=file, stderr=file)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise BenchError(f"{' '.join(command)} ended with {child.returncode}; {log} ends with:\n{tail}")
    return Sample(wall, used.ru_utime + used.ru_stime)


def tree_cpu(pid: int) -> float:
    """Processor seconds that the living process `pid` and its living descendants have used so far."""
    tick = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(fields[1])
        used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used.get(one, 0.0) for one in family)


def median(samples: Sequence[Sample]) -> Sample:
    """Medians, of wall and of processor time apart."""
    return Sample(statistics.median(s.wall for s in samples), statistics.median(s.cpu for s in samples))
