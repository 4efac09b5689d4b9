"""Memory of everything that this checkout's site keeps running, while nobody asks anything of it.

    make deploy-dev && .venv/bin/python bench/memory/run

PSS counts a page that several processes share once, in parts; RSS counts it for each of them.
"""

import argparse
import os
import sys
import time
from typing import Any

import psutil

import report
from torchrelay.config import settings
from torchrelay.console import show_error
from torchrelay.errors import ServingError, TorchrelayError

BAR_GB = 2.5
_MB = 2**20


def main() -> None:
    """Wait, look, write the result."""
    given = arguments()
    try:
        daemon = supervisord()
    except TorchrelayError as error:
        show_error(error)
        sys.exit(error.exit_code)
    report.say(f"leaving everything alone for {given.idle:.0f} s")
    time.sleep(given.idle)
    found = sorted(map(measured, [daemon, *daemon.children(recursive=True)]), key=lambda one: -one["pss_mb"])
    machine = report.machine()
    report.save(report.results("memory"), {"machine": machine, "processes": found}, text(found))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=float, default=10, help="seconds without a request before looking (default: 10)")
    return parser.parse_args()


def supervisord() -> psutil.Process:
    """The one parent of all that runs here."""
    file = settings().state / "supervisor" / "supervisord.pid"
    try:
        return psutil.Process(int(file.read_text(encoding="ascii")))
    except (OSError, ValueError, psutil.NoSuchProcess) as error:
        raise ServingError(f"no supervisord runs ({file})", "a deployed component", "make deploy-dev") from error


def measured(process: psutil.Process) -> dict[str, Any]:
    """One process: what it is, and its memory in MB."""
    memory = process.memory_full_info()
    return {
        "pid": process.pid,
        "what": what(process),
        "pss_mb": round(memory.pss / _MB),
        "rss_mb": round(memory.rss / _MB),
    }


def what(process: psutil.Process) -> str:
    """A name that people know."""
    words = " ".join(process.cmdline())
    known = {
        "supervisor.supervisord": "supervisord",
        "torchrelay.serving.alone": "tracking server's guard",
        "mlflow.server": "MLflow: uvicorn",
        "mlflow server": "MLflow: command line",
        "org.pytorch.serve.ModelServer": "TorchServe: Java",
        "model_service_worker": "TorchServe: worker",
        "torchrelay apply": "apply --every",
        f"{os.sep}envoy": "Envoy",
    }
    return next((name for part, name in known.items() if part in words), process.name())


def text(found: list[dict[str, Any]]) -> str:
    """The result for people."""
    rows = [[one["what"], one["pss_mb"], one["rss_mb"]] for one in found]
    pss, rss = (sum(one[key] for one in found) for key in ("pss_mb", "rss_mb"))
    rows.append(["**together**", pss, rss])
    met = report.verdict(pss / 1024 <= BAR_GB)
    return f"{report.table(['process', 'PSS MB', 'RSS MB'], rows)}\n\nBar: at most {BAR_GB} GB, {met}."
