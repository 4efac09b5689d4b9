"""What the prediction log costs: the handler of fashion_mnist with it, without it, and with inputs kept, in turns.

    .venv/bin/python bench/predictions/run

Needs the component's environment and nothing else. "Back to back" leaves the writer no moment of its own, which no
server does; "with pauses" is a worker that waits 2 ms for its next batch. Ratios are taken within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from torchrelay.components import environment
from torchrelay.config import root
from torchrelay.console import show_error
from torchrelay.errors import TorchrelayError

BAR = 0.03
COMPONENT = "fashion_mnist"
_DRIVE = Path(__file__).with_name("drive.py")

Turns = list[dict[str, Any]]


def main() -> None:
    """Measure and write the result."""
    given = arguments()
    try:
        python = environment(COMPONENT).python
    except TorchrelayError as error:
        show_error(error)
        sys.exit(error.exit_code)
    report.await_quiet(given.quiet, given.patience)
    machine = report.machine()
    turns = measure(given, python)
    machine["load_after"] = round(report.load(), 2)
    dropped = turns.pop()["dropped"]
    content = {"machine": machine, "dropped": dropped, "figures": figures(turns)}
    report.save(report.results("predictions"), content, text(content))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="how often each has its turn (default: 9)")
    parser.add_argument("--seconds", type=float, default=1, help="length of a turn (default: 1)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    return parser.parse_args()


def measure(given: argparse.Namespace, python: str) -> Turns:
    """Every turn as drive.py gives it, its own last line included."""
    component = root() / "components" / COMPONENT
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        folder.mkdir()
        for name in ("handler.py", "model.py"):
            (folder / name).write_bytes((component / name).read_bytes())
        ours = root() / "src" / "torchrelay" / "serving" / "handler.py"
        (folder / "torchrelay_handler.py").write_bytes(ours.read_bytes())
        command = [python, _DRIVE, folder, component, Path(made) / "log", str(given.rounds), str(given.seconds)]
        found: Turns = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout or ():
                found.append(json.loads(line))
        if child.returncode:
            sys.exit(f"{_DRIVE.name} ended with {child.returncode}")
    return found


def figures(turns: Turns) -> list[dict[str, Any]]:
    """For each pace, size and mode the medians over the rounds, and of the ratios to the same round without a log."""
    found = []
    for pace, size, mode in dict.fromkeys((one["pace"], one["size"], one["mode"]) for one in turns):
        ours = [summary(one) for one in turns if (one["pace"], one["size"], one["mode"]) == (pace, size, mode)]
        plain = [summary(one) for one in turns if (one["pace"], one["size"], one["mode"]) == (pace, size, "without")]
        values = {key: round(statistics.median(one[key] for one in ours), 1) for key in ours[0]}
        more = {
            f"{key}_more": round(statistics.median(a[key] / b[key] for a, b in zip(ours, plain, strict=True)) - 1, 4)
            for key in ours[0]
        }
        found.append({"pace": pace, "size": size, "mode": mode, **values, **more})
    return sorted(
        found, key=lambda one: (one["pace"], one["size"], one["mode"] == "with inputs", one["mode"] == "with")
    )


def summary(turn: dict[str, Any]) -> dict[str, float]:
    """Of one turn, in microseconds a call."""
    ordered = sorted(turn["us"])
    return {
        "mean": statistics.fmean(ordered),
        "p50": statistics.median(ordered),
        "p99": ordered[len(ordered) * 99 // 100],
        "cpu": turn["cpu_us"],
    }


def text(content: dict[str, Any]) -> str:
    """The result for people."""
    machine = content["machine"]
    head = ["batches", "of", "log", "mean µs", "more", "p50 µs", "more", "p99 µs", "more", "CPU µs", "more", ""]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']} before and {machine['load_after']} "
        f"after. Lines dropped: {content['dropped']}. Bar: a mean at most {BAR:.0%} longer with the log.\n\n"
        f"{report.table(head, [row(one) for one in content['figures']])}"
    )


def row(one: dict[str, Any]) -> list[str]:
    """One mode at one pace and size."""
    cells = []
    for key in ("mean", "p50", "p99", "cpu"):
        cells += [f"{one[key]:.0f}", "" if one["mode"] == "without" else f"{one[f'{key}_more']:+.1%}"]
    met = report.verdict(one["mean_more"] <= BAR) if one["mode"] == "with" else ""
    return [one["pace"], str(one["size"]), one["mode"], *cells, met]
