"""`requirements/install`: from nothing, again, cut off, too old a Python, and pip's configuration in uv's words."""

import importlib.util
import subprocess
import sys
import venv
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "requirements" / "install"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_loader("install", SourceFileLoader("install", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def target(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An environment from an empty lock; the packages' installation is counted, not done."""
    lock = tmp_path / "run.lock"
    lock.write_text("")
    installed: list[Path] = []
    monkeypatch.setattr(install, "install_lock", lambda target: installed.append(target.lock))
    monkeypatch.setattr(install, "create", _without_pip)
    monkeypatch.setattr(install, "compile_all", lambda target: None)
    made = install.Target(tmp_path / "venv", lock, False)
    made.installed = installed
    return made


def _without_pip(target: Any) -> None:
    """As the script does it, without the seconds that pip takes to arrive."""
    venv.create(target.venv, clear=True, symlinks=True, with_pip=False)


def test_a_second_call_installs_nothing(install: ModuleType, target: Any) -> None:
    install.update(target)
    install.update(target)
    assert len(target.installed) == 1
    assert target.python.exists()


def test_a_changed_lock_is_installed_into_the_same_environment(install: ModuleType, target: Any) -> None:
    install.update(target)
    (target.venv / "kept").touch()
    target.lock.write_text("# another\n")
    install.update(target)
    assert len(target.installed) == 2
    assert (target.venv / "kept").exists()


def test_a_cut_off_installation_is_made_anew(install: ModuleType, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install.update(target)
    (target.venv / "half-written").touch()
    target.lock.write_text("# another\n")
    with monkeypatch.context() as killed:
        killed.setattr(install, "install_lock", _die)
        with pytest.raises(SystemExit, match="interrupted"):
            install.update(target)
    install.update(target)
    assert not (target.venv / "half-written").exists()
    assert target.current()


def _die(_target: object) -> None:
    raise KeyboardInterrupt


def test_a_python_that_has_gone_is_replaced(install: ModuleType, target: Any) -> None:
    install.update(target)
    target.python.unlink()
    target.python.symlink_to("/nowhere/python3.11")
    install.update(target)
    assert target.usable()


def test_too_old_a_python_is_told_what_to_do(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "OLDEST", (3, 99))
    with pytest.raises(SystemExit, match=r"(?s)is Python 3.*expected: Python 3\.99 or newer.*next: .*PYTHON="):
        install.require_python()


def test_a_python_without_venv_is_told_what_to_do(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(SystemExit, match=r"(?s)no module ensurepip.*apt-get install python3-venv"):
        install.require_python()


def test_pips_configuration_in_uvs_words(install: ModuleType) -> None:
    settings = {"index-url": "https://a.test/simple", "find-links": "/one\n/two", "cert": "/ca.pem", "no-index": "true"}
    assert install.uv_flags(settings) == [
        *("--index-strategy", "unsafe-best-match"),
        *("--default-index", "https://a.test/simple"),
        *("--find-links", "/one", "--find-links", "/two"),
        "--no-index",
    ]


def test_pips_environment_wins_over_its_files(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = https://a.test/simple\nfind-links = /from-the-file\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "/from-the-environment")
    found = install.pip_settings(sys.executable)
    assert found["index-url"] == "https://a.test/simple"
    assert found["find-links"] == "/from-the-environment"


def test_where_uv_fails_pip_takes_over(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text("")
    ran: list[list[Any]] = []
    monkeypatch.setattr(install, "find_uv", lambda _target: Path("uv"))
    monkeypatch.setattr(install, "by_uv", lambda _uv, _target: False)
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: ran.append(command))
    install.install_lock(install.Target(tmp_path / "venv", lock, False))
    assert "pip" in ran[0]
    assert "--require-hashes" in ran[0]
    assert "pip does what uv could not" in capsys.readouterr().out


def test_the_lock_pins_uv_itself(install: ModuleType) -> None:
    pinned = install.pinned_uv()
    assert pinned.startswith("uv==")
    assert pinned.count("--hash=sha256:") > 1


def test_a_missing_argument_is_said() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--venv" in done.stderr
