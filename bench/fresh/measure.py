"""A fresh clone to a served prediction, with an empty home and empty caches; then the same with nothing changed.

    .venv/bin/python bench/fresh/run

What is measured is HEAD, in a temporary clone with ports of its own. Packages and data are fetched anew from wherever
this machine is told to look, so the line counts. No peer is timed beside it: we know of none that goes all the way by
one command. What the commands say is kept in run.log beside the result.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
from fresh.clone import Clone
from timing import BenchError, summary

BAR_FRESH_S = 8 * 60
BAR_AGAIN_S = 4
_LEG = re.compile(r"^✓ (\w+) ([\d.]+) s$", re.MULTILINE)
_SETUP = re.compile(r"^(setup): done in ([\d.]+) s$", re.MULTILINE)


def main() -> None:
    """Clone, deploy, deploy again, write the result; the clone is stopped and removed whatever happens."""
    given = arguments()
    try:
        report.await_quiet(given.quiet, given.patience)
        machine = report.machine()
        with cloned(given, report.results("fresh")) as clone:
            measured = measure(given, clone)
    except BenchError as error:
        sys.exit(str(error))
    machine["load_after"] = round(report.load(), 2)
    found = {"machine": machine, **measured}
    report.save(report.results("fresh"), found, text(found))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=int, default=3, help="how often with nothing changed (default: 3)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to lay the clone (default: /tmp)")
    parser.add_argument("--keep", action="store_true", help="keep the clone, and what it serves")
    return parser.parse_args()


@contextmanager
def cloned(given: argparse.Namespace, results: Path) -> Iterator[Clone]:
    """An empty folder for the clone; in the end its servers are stopped and it goes, all but its logs if it failed."""
    clone = Clone(Path(tempfile.mkdtemp(prefix="torchrelay-fresh-", dir=given.folder)), results / "run.log")
    report.say(f"working in {clone.folder}, log in {clone.log}")
    shutil.rmtree(results / "logs", ignore_errors=True)
    try:
        yield clone
    except BenchError:
        if clone.logs.is_dir():
            shutil.copytree(clone.logs, results / "logs")
            report.say(f"the clone's own logs are kept in {results / 'logs'}")
        raise
    finally:
        if given.keep:
            report.say(f"kept: {clone.command('status')}")
        else:
            clone.remove()


def measure(given: argparse.Namespace, clone: Clone) -> dict[str, Any]:
    """Seconds of the clone and of its first deploy-dev with its legs, and samples of those with nothing changed."""
    copied = clone.copy()
    first, said = clone.deploy()
    report.say(f"served after {copied.wall + first.wall:.0f} s")
    report.await_quiet(given.quiet, given.patience)
    load = round(report.load(), 2)
    again = []
    for _ in range(given.again):
        sample, words = clone.deploy()
        if "nothing had changed" not in words:
            raise BenchError(f"a second deploy-dev found something to do; read {clone.log}")
        report.say(f"nothing changed: {sample.wall:.2f} s, CPU {sample.cpu:.2f} s, load {report.load():.2f}")
        again.append(sample)
    return {
        "fresh": {"wall": round(copied.wall + first.wall, 1), "cpu": round(copied.cpu + first.cpu, 1)},
        "legs": {"git clone": round(copied.wall, 1), **legs(said)},
        "nothing changed": {"load_before": load, **summary(again)},
    }


def legs(said: str) -> dict[str, float]:
    """Seconds of setup and of each leg, as deploy-dev itself said."""
    return {name: float(seconds) for name, seconds in [*_SETUP.findall(said), *_LEG.findall(said)]}


def text(found: dict[str, Any]) -> str:
    """The result for people."""
    machine, again = found["machine"], found["nothing changed"]
    head = (
        f"Commit {machine['commit']}, empty home and caches. {machine['cpu']}, {machine['cores']} cores, load "
        f"{machine['load_before']} before, {again['load_before']} before the second part."
    )
    return f"{head}\n\n{report.table(['', 's', 'bar, s', ''], rows(found))}"


def rows(found: dict[str, Any]) -> list[list[object]]:
    """The way to the prediction and what it is made of; then nothing changed."""
    fresh, again = found["fresh"]["wall"], found["nothing changed"]
    rest = fresh - sum(found["legs"].values())
    parts = {**found["legs"], "all else": rest}
    what = f"nothing changed, median (worst) of {len(again['samples'])}"
    seconds = f"{again['wall']:.1f} ({again['worst']:.1f})"
    return [
        ["fresh clone → served prediction", fresh, BAR_FRESH_S, report.verdict(fresh <= BAR_FRESH_S)],
        *([f"- {name}", f"{took:.1f}", "", ""] for name, took in parts.items()),
        [what, seconds, BAR_AGAIN_S, report.verdict(again["wall"] <= BAR_AGAIN_S)],
    ]
