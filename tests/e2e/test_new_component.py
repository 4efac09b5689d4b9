"""Adding a component is adding a folder: docs/how-to/add-a-component.md, followed command by command.

It takes minutes because the commands deploy a new component with real servers and deploy it again after a change.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import urllib3

from tests.conftest import ROOT, Checkout

pytestmark = [pytest.mark.real, pytest.mark.slow]

DOCUMENT = ROOT / "docs" / "how-to" / "add-a-component.md"
COMPONENT = "tiny_moons"
ENVIRONMENT = r"py3\d+-(?:cpu|cuda)-[0-9a-f]{12}"
# The state of .venv is the business of the checkout that it was borrowed from.
MAKE = "make --no-print-directory -o .venv/run.stamp -o .venv/dev.stamp"
# What differs from run to run: hashes, numbers, pytest's dot per test, and its seconds, which it writes as
# "69.75s (0:01:09)" after a minute.
VARYING = re.compile(r"[0-9a-f]{8,}|^\.{9,}|\d+(?:\.\d+)?(?:e[+-]\d+)?(?:s(?: \(\d+:\d\d:\d\d\))?$)?")


@dataclass
class Step:
    """One command of the document, what it is said to print, and what it printed."""

    command: str
    promised: list[str]
    printed: str = ""


def documented() -> list[Step]:
    """The commands of the document's console blocks, each with the lines below it."""
    steps: list[Step] = []
    for block in re.findall(r"```console\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append(Step(line.removeprefix("$ "), []))
            else:
                steps[-1].promised.append(line)
    return steps


def follow(step: Step, checkout: Checkout, environment: str) -> None:
    """Run the command as it stands but for this checkout's ports, environment and borrowed .venv."""
    command = re.sub(r"^make\b", MAKE, step.command)
    command = re.sub(ENVIRONMENT, environment, command).replace(":18510/", f":{checkout.port_base + 10}/")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=checkout.folder,
        env=checkout.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=540,
        check=False,
    )
    step.printed = done.stdout
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}"


@pytest.fixture(scope="module")
def followed(checkout: Checkout, component_python: str) -> Iterator[tuple[Checkout, list[Step]]]:
    """A committed checkout in which every command of the document was run."""
    # Threads of their own would fight for the cores with the other tests' servers.
    checkout.environment.setdefault("OMP_NUM_THREADS", "1")
    git = ["git", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "add", "--all"], cwd=checkout.folder, env=checkout.environment, check=True)
    subprocess.run([*git, "commit", "-qm", "all"], cwd=checkout.folder, env=checkout.environment, check=True)
    steps = documented()
    for step in steps:
        follow(step, checkout, Path(component_python).parents[1].name)
    yield checkout, steps


def test_every_command_prints_what_the_document_promises(followed: tuple[Checkout, list[Step]]) -> None:
    """Line by line, in order; the document may leave lines out where it says so by a line of dots."""
    for step in followed[1]:
        lines = iter([_constant(line) for line in step.printed.splitlines()])
        for promised in step.promised:
            if promised.strip() != "…":
                assert _constant(promised) in lines, f"{step.command}: no line {promised!r} in\n{step.printed}"


def _constant(line: str) -> str:
    return " ".join(VARYING.sub("#", line).split())


def test_the_document_shows_the_whole_way() -> None:
    commands = [shlex.split(step.command) for step in documented()]
    assert ["make", "new-component", f"NAME={COMPONENT}"] in commands
    assert ["make", "deploy-dev", f"COMPONENT={COMPONENT}"] in commands
    assert any("pytest" in command for command in commands)


def test_the_new_component_answers_through_the_gateway(followed: tuple[Checkout, list[Step]]) -> None:
    checkout, _ = followed
    answer = urllib3.request(
        "POST",
        f"{checkout.gateway}/predictions/{COMPONENT}",
        body=json.dumps({"instances": [[0.0, 1.0], [1.0, -0.5]]}).encode(),
        headers={"content-type": "application/json"},
        retries=False,
    )
    assert answer.status == 200
    assert [one["label"] for one in answer.json()["predictions"]] == ["upper", "lower"]
    assert answer.headers["x-component"] == COMPONENT


def test_no_other_file_changed(followed: tuple[Checkout, list[Step]]) -> None:
    """But for the list of components that Torchrelay keeps for DVC, and DVC's own lock."""
    checkout, _ = followed
    found = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"],
        cwd=checkout.folder,
        env=checkout.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    changed = {line[3:] for line in found.stdout.splitlines()}
    outside = {path for path in changed if not path.startswith(f"components/{COMPONENT}/")}
    assert outside <= {"params.yaml", "dvc.lock"}
    told = subprocess.run(
        ["git", "diff", "--unified=0", "params.yaml"],
        cwd=checkout.folder,
        env={**os.environ, "GIT_PAGER": "cat"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in told.stdout.splitlines() if re.match(r"[+-][^+-]", line)] == [f"+  - {COMPONENT}"]
