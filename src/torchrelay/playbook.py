"""Run one of `playbooks/`: progress by role on the terminal, the rest in a log, errors in the task's own words."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from torchrelay.config import root, settings
from torchrelay.console import run_logged, say
from torchrelay.errors import ConfigError

# A task that calls torchrelay fails with an error of ours, whose three parts are handed on.
_TOLD = re.compile(
    r"(?:Task failed: )?(?:Action failed: )?(?P<found>\S.*?) +expected: +(?P<expected>\S.*?) +next: +(?P<next>\S.*)",
    re.DOTALL,
)
_TASK = re.compile(r"TASK \[(?:(?P<role>\w+) : )?(?P<task>.*?)\] \*+")


def run_playbook(
    name: str, variables: Path, log: Path, inventory: Path | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Run `playbooks/<name>.yml` over the site's inventory, or another, with the extra variables of a JSON file.

    Raises ConfigError with what the first failed task said.
    """
    watch = _Watch()
    command: list[str | Path] = [
        Path(sys.executable).with_name("ansible-playbook"),
        *("--inventory", inventory or settings().inventory),
        *("--extra-vars", f"@{variables}"),
        root() / "playbooks" / f"{name}.yml",
    ]
    status = run_logged(command, log, show=watch, environment={**_environment(), **(environment or {})}, folder=root())
    if status:
        said = " ".join(watch.said) or f"exit status {status}"
        told = _TOLD.match(said) or {"found": said, "expected": "every task ok", "next": f"read {log}"}
        raise ConfigError(
            f"{name} failed at {watch.task or 'its start'}: {told['found']}", told["expected"], told["next"]
        )


def _environment() -> dict[str, str]:
    """Ansible writes to the home folder, and refuses a locale that is not UTF-8, unless told otherwise."""
    home = settings().state / "ansible"
    return {
        **os.environ,
        "ANSIBLE_CONFIG": str(root() / "ansible.cfg"),
        "ANSIBLE_HOME": str(home),
        "ANSIBLE_LOCAL_TEMP": str(home / "local"),
        "ANSIBLE_REMOTE_TEMP": str(home / "remote"),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }


class _Watch:
    """Names the roles as they run, and keeps what a failed task said."""

    def __init__(self) -> None:
        self.role = ""
        self.task = ""
        self.said: list[str] = []
        self._saying = False

    def __call__(self, line: str) -> bool:
        """Look at one line of Ansible's output; False, since the line itself is for the log."""
        if found := _TASK.match(line):
            self.task = found["task"]
            if found["role"] and found["role"] != self.role:
                self.role = found["role"]
                say(f"  role {self.role}")
        # What Ansible says of an error may take several lines; where the task stands comes next, or nothing.
        self._saying = line.startswith("[ERROR]: ") or (self._saying and not re.match(r"Origin: |\s*$", line))
        if self._saying:
            self.said.append(line.removeprefix("[ERROR]: ").strip())
        return False
