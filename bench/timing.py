"""Runs commands to their end and says what they cost; gives every case its turn; summarises samples."""

import argparse
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report


class BenchError(Exception):
    """A command of the benchmark failed; the message holds the end of its log."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: by the clock, and of processor time in it and all that it waited for."""

    wall: float
    cpu: float


Case = Callable[[], Sample]


def environment() -> dict[str, str]:
    """The same for all: Python keeps its bytecode, nothing is asked of a virtual environment around us."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "VIRTUAL_ENV", "MLFLOW_", "SNAKEMAKE_")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)}


def timed(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    statuses: Collection[int] = (0,),
) -> Sample:
    """Run `command` in `folder`, its output appended to `log`. BenchError where it ends with none of `statuses`."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        began = time.monotonic()
        child = subprocess.Popen(command, cwd=folder, env=dict(environment), stdout=file, stderr=file)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in statuses:
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


def rounds(given: argparse.Namespace, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Every case once in each of `given.rounds`, in an order drawn anew each time from `given.seed`."""
    draw = random.Random(given.seed)
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for number in range(1, given.rounds + 1):
        for name in draw.sample(list(cases), len(cases)):
            sample = cases[name]()
            samples[name].append(sample)
            took = f"{sample.wall:.2f} s, CPU {sample.cpu:.2f} s, load {report.load():.2f}"
            report.say(f"round {number}/{given.rounds} {name}: {took}")
    return {name: summary(found) for name, found in samples.items()}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians of wall and of processor time apart, the longest by the clock, and every sample."""
    return {
        "wall": round(statistics.median(sample.wall for sample in samples), 3),
        "worst": round(max(sample.wall for sample in samples), 3),
        "cpu": round(statistics.median(sample.cpu for sample in samples), 3),
        "samples": [[round(sample.wall, 3), round(sample.cpu, 3)] for sample in samples],
    }
