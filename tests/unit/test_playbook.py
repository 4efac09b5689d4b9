"""What a failed playbook says: the task's own words, and the three parts of an error of ours in them."""

from pathlib import Path

import pytest

from torchrelay import playbook
from torchrelay.errors import ConfigError

PLAIN = "[ERROR]: Task failed: The tracking server needs an unprivileged port\n"
OURS = "[ERROR]: Task failed: Action failed: the database is gone expected: a database next: make restore\n"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A playbook that fails with these lines."""
    lines: list[str] = []

    def run(*_: object, show: playbook._Watch, **__: object) -> int:
        for line in ("TASK [tracking : Check] ****\n", *lines):
            show(line)
        return 2

    monkeypatch.setattr(playbook, "run_logged", run)
    return lines


@pytest.mark.parametrize(
    ("said", "found", "expected", "next_command"),
    [
        (PLAIN, "needs an unprivileged port", "every task ok", "read /log"),
        (OURS, "the database is gone", "a database", "make restore"),
    ],
)
def test_a_failed_task_is_an_error_in_three_parts(
    failing: list[str], said: str, found: str, expected: str, next_command: str
) -> None:
    failing.extend(said.splitlines(keepends=True))
    with pytest.raises(ConfigError) as caught:
        playbook.run_playbook("configure-nodes", Path("/vars"), Path("/log"))
    assert caught.value.found.startswith("configure-nodes failed at Check: ")
    assert found in caught.value.found
    assert (caught.value.expected, caught.value.next_command) == (expected, next_command)
