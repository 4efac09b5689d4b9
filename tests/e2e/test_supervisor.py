"""supervisord under our hands: what runs, what restarts, and that nothing outlives a stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engines.supervised import processes_of, started, until, write_conf
from torchrelay.errors import ServingError
from torchrelay.serving.engine import Program
from torchrelay.serving.supervisor import Supervisor, shutdown, start_daemon

pytestmark = pytest.mark.real


@pytest.fixture
def conf(tmp_path: Path) -> Iterator[Path]:
    conf = write_conf(tmp_path)
    yield conf
    shutdown(conf)
    assert not Supervisor(tmp_path / "supervisord.sock", tmp_path / "programs").answers()


@pytest.fixture
def supervisor(conf: Path) -> Supervisor:
    assert start_daemon(conf)
    return Supervisor(conf.parent / "supervisord.sock", conf.parent / "programs")


def program(folder: Path, script: str = "exec sleep 1000", **changes: object) -> Program:
    settings = {
        "name": f"sleeper-{folder.name}",
        "command": ("/bin/sh", "-c", script),
        "directory": folder,
        "log": folder / "logs" / "sleeper.log",
        "stop_wait_s": 2,
    }
    return Program.model_validate(settings | changes)


def test_a_program_is_started_once(supervisor: Supervisor, tmp_path: Path) -> None:
    wanted = program(tmp_path)
    assert not supervisor.running(wanted.name)
    assert supervisor.ensure(wanted)
    assert supervisor.running(wanted.name)
    pids = [process.pid for process in started(wanted)]
    assert not supervisor.ensure(wanted)
    assert [process.pid for process in processes_of(wanted)] == pids


def test_a_changed_program_is_started_anew_and_the_others_are_left_alone(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    other = program(tmp_path, name=f"other-{tmp_path.name}")
    supervisor.ensure(other)
    before = started(other)
    supervisor.ensure(program(tmp_path))
    changed = program(tmp_path, "exec sleep 2000")
    assert supervisor.ensure(changed)
    until(lambda: [process.cmdline() for process in processes_of(changed)] == [["sleep", "2000"]], 10)
    assert processes_of(other) == before


def test_what_a_program_is_given_arrives_as_it_was(supervisor: Supervisor, tmp_path: Path) -> None:
    odd = tmp_path / "50% off, a=b"
    odd.mkdir()
    script = 'printf "%s|" "$ODD" "$(pwd)" "$1"; exec sleep 1000'
    wanted = program(odd, name="odd", environment={"ODD": "100 %, a=b; $HOME"}, log=odd / "odd.log").model_copy(
        update={"command": ("/bin/sh", "-c", script, "zero", 'it\'s "one" %d')}
    )
    supervisor.ensure(wanted)
    until(lambda: wanted.log.is_file() and wanted.log.read_text().count("|") == 3, 10)
    assert wanted.log.read_text().split("|")[:3] == ["100 %, a=b; $HOME", str(odd), 'it\'s "one" %d']


def test_the_environment_of_whoever_starts_it_does_not_leak(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    start_daemon(conf)
    supervisor = Supervisor(tmp_path / "supervisord.sock", tmp_path / "programs")
    wanted = program(tmp_path)
    supervisor.ensure(wanted)
    assert "PYTHONPATH" not in started(wanted)[0].environ()


@pytest.mark.parametrize("value", ["a ; comment", "a # comment", "two\nlines", 'a "quote"'])
def test_what_the_file_format_cannot_hold_is_refused(supervisor: Supervisor, tmp_path: Path, value: str) -> None:
    with pytest.raises(ServingError):
        supervisor.ensure(program(tmp_path, environment={"ODD": value}))
    assert list((tmp_path / "programs").iterdir()) == []


def test_a_killed_program_comes_back(supervisor: Supervisor, tmp_path: Path) -> None:
    wanted = program(tmp_path)
    supervisor.ensure(wanted)
    (killed,) = started(wanted)
    killed.send_signal(signal.SIGKILL)
    until(lambda: any(process.pid != killed.pid for process in processes_of(wanted)), 20)
    assert supervisor.running(wanted.name)


def test_a_program_that_keeps_failing_starts_at_once_when_it_is_asked_for(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    wanted = program(tmp_path, "test -e mended && exec sleep 1000")
    supervisor.ensure(wanted)
    until(lambda: not supervisor.running(wanted.name), 10)
    (tmp_path / "mended").touch()
    assert supervisor.ensure(wanted)
    until(lambda: supervisor.running(wanted.name), 10)


def test_a_command_that_is_not_there_is_named(supervisor: Supervisor, tmp_path: Path) -> None:
    wanted = program(tmp_path, name="absent").model_copy(update={"command": ("/nowhere/program",)})
    with pytest.raises(ServingError, match=r"nowhere|absent"):
        supervisor.ensure(wanted)


def test_removing_ends_the_whole_group_even_what_ignores_signals(supervisor: Supervisor, tmp_path: Path) -> None:
    wanted = program(tmp_path, "trap '' TERM; (trap '' TERM; setsid sleep 1000) & sleep 1000; sleep 1000")
    supervisor.ensure(wanted)
    until(lambda: len(processes_of(wanted)) >= 3, 10)
    supervisor.remove(wanted.name)
    assert processes_of(wanted) == []
    assert not (tmp_path / "programs" / f"{wanted.name}.conf").exists()
    assert not supervisor.running(wanted.name)
    supervisor.remove(wanted.name)


def test_starting_twice_gives_one(supervisor: Supervisor, conf: Path) -> None:
    pid = (conf.parent / "supervisord.pid").read_text()
    assert not start_daemon(conf)
    assert (conf.parent / "supervisord.pid").read_text() == pid


def test_after_a_kill_of_supervisord_nothing_runs_twice(supervisor: Supervisor, conf: Path) -> None:
    wanted = program(conf.parent)
    supervisor.ensure(wanted)
    orphans = started(wanted)
    os.kill(int((conf.parent / "supervisord.pid").read_text()), signal.SIGKILL)
    until(lambda: not supervisor.answers(), 10)
    assert (conf.parent / "supervisord.sock").exists()
    assert not supervisor.running(wanted.name)
    assert start_daemon(conf)
    until(lambda: supervisor.running(wanted.name), 10)
    assert len(started(wanted)) == 1
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in orphans)


def test_shutdown_after_a_kill_of_supervisord_ends_the_orphans(supervisor: Supervisor, conf: Path) -> None:
    wanted = program(conf.parent)
    supervisor.ensure(wanted)
    orphans = started(wanted)
    os.kill(int((conf.parent / "supervisord.pid").read_text()), signal.SIGKILL)
    shutdown(conf)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in orphans)
    assert processes_of(wanted) == []
    shutdown(conf)


def test_shutdown_ends_although_somebody_keeps_starting_a_program(supervisor: Supervisor, conf: Path) -> None:
    """As a keeper does that was about to mend when everything was told to stop."""
    wanted = program(conf.parent)
    supervisor.ensure(wanted)
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            with suppress(ServingError):
                supervisor.ensure(wanted)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    stopping = threading.Thread(target=shutdown, args=(conf,), daemon=True)
    stopping.start()
    stopping.join(20)
    over.set()
    assert not stopping.is_alive()
    keeper.join(20)
    assert processes_of(wanted) == []


def test_nobody_there_is_said(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisord.sock", tmp_path / "programs")
    assert not supervisor.answers()
    assert not supervisor.running("anything")
    with pytest.raises(ServingError, match="no supervisord answers"):
        supervisor.ensure(program(tmp_path))


def test_a_broken_configuration_is_said(tmp_path: Path) -> None:
    (tmp_path / "supervisord.conf").write_text("[unix_http_server]\nfile=%(here)s/s.sock\n")
    with pytest.raises(ServingError, match="supervisord section"):
        start_daemon(tmp_path / "supervisord.conf")
    with pytest.raises(ServingError, match="names no socket"):
        start_daemon(tmp_path / "absent.conf")


def test_a_socket_path_that_is_too_long_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="too long"):
        start_daemon(write_conf(tmp_path / ("x" * 120)))


def test_a_program_that_supervisord_cannot_read_does_not_block_the_others(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    with pytest.raises(ServingError, match="CANT_REREAD"):
        supervisor.ensure(program(tmp_path, name="a name with spaces"))
    assert supervisor.ensure(program(tmp_path))
