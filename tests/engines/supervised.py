"""A supervisord of a test's own, and what is asked about its processes."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from torchrelay.config import write_file
from torchrelay.serving.engine import Program

_CONF = """\
[unix_http_server]
file=%(here)s/supervisord.sock
chmod=0700
[supervisord]
logfile=%(here)s/supervisord.log
pidfile=%(here)s/supervisord.pid
nodaemon=false
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[include]
files=programs/*.conf
"""


def write_conf(folder: Path) -> Path:
    """As the role `control` writes it. Keep `folder` short: a socket's path has at most 107 characters."""
    (folder / "programs").mkdir(parents=True)
    write_file(folder / "supervisord.conf", _CONF.encode())
    return folder / "supervisord.conf"


def processes_of(program: Program) -> list[psutil.Process]:
    """Every living process of a program, children and orphans as well, the leader first."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SUPERVISOR_PROCESS_NAME") == program.name and process.cwd():
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def started(program: Program) -> list[psutil.Process]:
    """`processes_of` a program that was just asked for: supervisord says STARTING before its child is the program."""
    until(lambda: bool(processes_of(program)), 10)
    return processes_of(program)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for `condition`; an AssertionError when it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} did not come true in {seconds} s"
        time.sleep(0.05)
