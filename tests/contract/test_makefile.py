"""The Makefile is the interface: it lists all of itself, delegates, and starts nothing that is not needed."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from tests.conftest import ROOT
from torchrelay.cli import verbs

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE)


def _make(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A folder in which setup was done: nothing but what the Makefile looks at."""
    for name in (
        "Makefile",
        "pyproject.toml",
        "requirements/install",
        "requirements/run.lock",
        "requirements/dev.lock",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(shutil.which("true") or "/bin/true")
    for name in ("run.stamp", "dev.stamp"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def test_help_is_the_default_and_lists_every_target() -> None:
    shown = _make(ROOT).stdout
    assert TARGETS
    for target in TARGETS:
        assert re.search(rf"^  make {target} +\S", shown, re.MULTILINE), f"make help does not describe {target}"


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_one_line_that_delegates(target: str) -> None:
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    assert recipe[1].count("\n") <= 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_phony(target: str, ready: Path) -> None:
    (ready / target).touch()
    assert "is up to date" not in _make(ready, "-n", target).stdout


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("help", "setup", "test", "check", "lock")])
def test_a_verb_takes_what_its_target_passes(target: str, ready: Path) -> None:
    shown = _make(ready, "-n", target, "COMPONENT=some_name", "CONFIRM=yes", "NAME=some_name").stdout
    program, verb, *arguments = shlex.split(shown)
    assert program == ".venv/bin/torchrelay"
    command = verbs.get_command(click.Context(verbs), verb)
    assert command is not None, f"torchrelay has no verb {verb}"
    command.make_context(verb, arguments, resilient_parsing=True)
    unknown = [word for word in arguments if word.startswith("-") and word not in _options(command)]
    assert not unknown


def _options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def test_setup_starts_nothing_when_nothing_changed(ready: Path) -> None:
    assert _make(ready, "-q", "setup").returncode == 0


@pytest.mark.parametrize("changed", ["requirements/run.lock", "pyproject.toml", "requirements/install"])
def test_setup_runs_again_after_a_change_of(changed: str, ready: Path) -> None:
    stamp = (ready / ".venv" / "run.stamp").stat().st_mtime
    os.utime(ready / changed, (stamp + 5, stamp + 5))
    assert _make(ready, "-q", "setup").returncode == 1


def test_setup_runs_again_after_one_that_was_cut_off(ready: Path) -> None:
    stamp = (ready / ".venv" / "run.stamp").stat().st_mtime
    (ready / ".venv" / "unfinished").touch()
    os.utime(ready / ".venv" / "unfinished", (stamp + 5, stamp + 5))
    assert _make(ready, "-q", "setup").returncode == 1


def test_setup_runs_again_when_its_python_has_gone(ready: Path) -> None:
    (ready / ".venv" / "bin" / "python").unlink()
    (ready / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")
    assert _make(ready, "-q", "setup").returncode == 1


def test_a_recipe_prints_what_it_runs() -> None:
    silent = re.findall(r"^\t@(?!awk )(.*)", MAKEFILE, re.MULTILINE)
    assert not silent


def test_the_workflow_calls_what_developers_call() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run\n" in workflow
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^make check$", script, re.MULTILINE)
    assert "make test" in script


def test_every_verb_can_be_imported() -> None:
    context = click.Context(verbs)
    for verb in verbs.list_commands(context):
        assert isinstance(verbs.get_command(context, verb), click.Command), verb
