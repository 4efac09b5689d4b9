"""How long each call of the console script takes where a component is deployed, with MLflow's beside it.

    make deploy-dev && .venv/bin/python bench/cli/run

Every call runs once uncounted; then, in every round, once each in another order. What a call asks of the servers
counts by the clock; their processor time is not in its own.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import report
from serving.targets import deployed
from timing import BenchError, environment, rounds, timed
from torchrelay import components
from torchrelay.config import root
from torchrelay.console import show_error
from torchrelay.errors import ServingError, TorchrelayError

BAR_S = 2.0
BAR_QUICK_S = 1.0
QUICK = ("--help", "deploy-dev --help", "status", "status --json")
CALLS = (*QUICK, "plan", "doctor", "converge", "predict --component {component}")
# Ends with 1 when it found something, which takes it as long.
FINDING = ("torchrelay doctor",)
PEERS = ("--version", "deployments --help")


def main() -> None:
    """See that something is deployed, time the calls, write the result."""
    given = arguments()
    try:
        require_deployed(given.component)
        commands = calls(given.component)
        report.await_quiet(given.quiet, given.patience)
        machine = report.machine()
        found = measure(given, commands)
    except TorchrelayError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except BenchError as error:
        sys.exit(str(error))
    machine["load_after"] = round(report.load(), 2)
    content = {"machine": machine, "rounds": given.rounds, "calls": found}
    report.save(report.results("cli"), content, text(content))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", default="fashion_mnist", help="a deployed component (default: fashion_mnist)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each call is timed (default: 5)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the calls")
    return parser.parse_args()


def require_deployed(component: str) -> None:
    """ServingError where this site does not serve the component: most calls would have nothing to do."""
    try:
        deployed(component)
    except TorchrelayError as error:
        expected, command = "a running site that serves it", f"make deploy-dev COMPONENT={component}"
        raise ServingError(f"{component} is not deployed: {error.found}", expected, command) from error


def calls(component: str) -> dict[str, list[str]]:
    """Every command that is timed, by the name that the table gives it: ours, MLflow's, and an empty Python."""
    programs = root() / ".venv" / "bin"
    mlflow = programs / "mlflow"
    if not mlflow.is_file():
        mlflow = Path(components.environment(component).python).with_name("mlflow")
    ours = [words.format(component=component) for words in CALLS]
    return {
        **{f"torchrelay {words}": [str(programs / "torchrelay"), *words.split()] for words in ours},
        **{f"mlflow {words}": [str(mlflow), *words.split()] for words in PEERS},
        "python -c pass": [str(programs / "python"), "-c", "pass"],
    }


def measure(given: argparse.Namespace, commands: dict[str, list[str]]) -> dict[str, Any]:
    """Run each once, then let them take turns."""
    log = report.results("cli") / "run.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    cases = {
        name: partial(timed, command, root(), environment(), log, (0, 1) if name in FINDING else (0,))
        for name, command in commands.items()
    }
    for case in cases.values():
        case()
    return rounds(given, cases)


def text(content: dict[str, Any]) -> str:
    """The result for people."""
    machine = content["machine"]
    rows = [row(name, one) for name, one in content["calls"].items()]
    head = ["call", "median s", "worst s", "CPU s", "bar", ""]
    return (
        f"{content['rounds']} rounds. {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_before']} before and {machine['load_after']} after.\n\n{report.table(head, rows)}"
    )


def row(name: str, one: dict[str, Any]) -> list[str]:
    """One call; its worst is what the bar is for."""
    figures = [f"{one[key]:.2f}" for key in ("wall", "worst", "cpu")]
    program, _, words = name.partition(" ")
    if program != "torchrelay":
        return [name, *figures, "", ""]
    bar = BAR_QUICK_S if words in QUICK else BAR_S
    return [name, *figures, f"{bar:.0f}", report.verdict(one["worst"] <= bar)]
