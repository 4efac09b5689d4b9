"""What deploy-dev shows of the chain that it runs, and who else it lets run one."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchrelay import config
from torchrelay.cli import deploy
from torchrelay.errors import BusyError

LEG = """import sys
from torchrelay.console import paint, show_error
from torchrelay.errors import DataError
sys.stdin.readline()
print("rule gate_model:", "noise of Snakemake", sep="\\n")
show_error(DataError("found this", "that", "mend it")) if sys.argv[1:] else print("MissingInputException")
sys.exit(1)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("components/tiny", "config"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "Snakefile").touch()
    (tmp_path / "config/defaults.yaml").write_text("state: state\nkeys: keys\nport_base: 19000\n")
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    for name in ("STATE", "CONFIG", "KEYS", "PORT_BASE"):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    config.settings.cache_clear()
    yield tmp_path
    config.settings.cache_clear()


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What is said while a chain of one leg fails."""
    said: list[str] = []
    lock = os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(deploy, "snakemake_command", lambda *_: [sys.executable, "-c", LEG, *words])
    for module in (deploy, sys.modules["torchrelay.console"]):
        monkeypatch.setattr(module, "say", said.append)
    with pytest.raises(SystemExit):
        deploy._run_chain("tiny", lock, lambda: None)
    os.close(lock)
    return said


def test_on_a_colour_terminal_a_failed_leg_speaks_for_itself(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = _run(monkeypatch, "fail")
    assert "\033[31m✗\033[0m found this" in said
    assert "noise of Snakemake" not in "\n".join(said)
    assert "\033" not in (checkout / "logs" / "deploy_dev" / "tiny.log").read_text()


def test_where_no_leg_failed_snakemakes_own_words_tell_why(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MissingInputException" in "\n".join(_run(monkeypatch))


def test_two_chains_of_a_checkout_exclude_each_other_whatever_their_state_folders(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.time, "sleep", lambda _seconds: None)
    with deploy._chain_lock():
        for state in ("state", "another"):
            monkeypatch.setenv("TORCHRELAY_STATE", str(checkout / state))
            config.settings.cache_clear()
            with pytest.raises(BusyError, match="another deploy-dev runs in this checkout"), deploy._chain_lock():
                pass
    with deploy._chain_lock():
        assert not (checkout / "another").exists()
