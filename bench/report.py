"""What every benchmark reports besides its own figures: the machine, how busy it was, and where the results lie."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrelay.config import root, settings, write_file

_LOOK_S = 5


def say(text: str) -> None:
    """One line of progress on standard error; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def load() -> float:
    """The system's one-minute load average."""
    return os.getloadavg()[0]


def await_quiet(limit: float, patience_s: float) -> bool:
    """Wait until the load has fallen below `limit`, `patience_s` at most; whether it has."""
    end = time.monotonic() + patience_s
    if load() >= limit and patience_s:
        say(f"waiting up to {patience_s:.0f} s for a load below {limit} (it is {load():.2f})")
    while load() >= limit and time.monotonic() < end:
        time.sleep(_LOOK_S)
    return load() < limit


def machine() -> dict[str, Any]:
    """What somebody needs to know of this machine to judge a figure from it."""
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    cpu = re.search(r"^model name\s*: (.*)$", described, re.MULTILINE)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=root(), capture_output=True, text=True, check=False)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "none",
        "date": time.strftime("%F %T %z"),
        "load_before": round(load(), 2),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def verdict(met: bool) -> str:
    """How a table says whether a bar was met."""
    return "met" if met else "**missed**"


def results(name: str) -> Path:
    """Where a benchmark's results lie: in the state folder of this checkout."""
    return settings().state / "bench" / name


def save(folder: Path, content: dict[str, Any], text: str) -> None:
    """Write result.json and result.md into `folder` and print the latter."""
    write_file(folder / "result.json", (json.dumps(content, indent=2) + "\n").encode())
    write_file(folder / "result.md", f"{text}\n".encode())
    print(text, flush=True)
    say(f"written: {folder / 'result.json'} and result.md")
