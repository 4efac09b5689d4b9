"""What keeps our processes up on a machine without root: supervisord, steered over its own XML-RPC socket.

A program is one file under `programs/`; writing or removing it and telling supervisord is all there is to it. Every
process that supervisord starts carries the socket's name in its environment, and so do its children: that is how
whatever outlived its parent (a kill -9 of supervisord or of an engine) is found and ended.
"""

import configparser
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrelay.config import write_file
from torchrelay.errors import ServingError
from torchrelay.serving.engine import Program

if TYPE_CHECKING:
    from psutil import Process

_START_S = 30
_STOP_S = 60
_LONGEST_SOCKET = 107
_UP = ("STARTING", "RUNNING")

# A program's environment must not depend on the shell that happened to start supervisord first.
_KEEP = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH"),
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    }
)

_PROGRAM = """\
[program:{name}]
command={command}
environment={environment}
directory={directory}
autostart=true
autorestart=true
startsecs=5
startretries=1000000
stopsignal=TERM
stopwaitsecs={stop_wait_s}
stopasgroup=true
killasgroup=true
redirect_stderr=true
stdout_logfile={log}
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=3
"""


class Supervisor:
    """The supervisord that listens on `socket` and includes `programs`/*.conf."""

    def __init__(self, socket: Path, programs: Path) -> None:
        self.socket = socket.absolute()
        self.programs = programs

    def ensure(self, program: Program) -> bool:
        """Bring `program` up as described and return whether anything had to be done.

        Returns before the program is ready. A program whose description changed is stopped and started anew.
        """
        program.log.parent.mkdir(parents=True, exist_ok=True)
        added, changed = self._describe(program)
        if program.name in changed:
            self._drop(program.name)
        if program.name in (*added, *changed):
            self._call("addProcessGroup", program.name, unless="ALREADY_ADDED")
            self._start(program.name)
            return True
        return self._start(program.name)

    def remove(self, name: str) -> None:
        """Stop a program, its whole process group included, and forget it. Nothing to do if there is none."""
        (self.programs / f"{name}.conf").unlink(missing_ok=True)
        self._call("reloadConfig")
        self._drop(name)

    def restart(self, name: str) -> None:
        """End the program's whole process group, by force if it does not listen, and start it anew."""
        self._call("stopProcess", name, unless="NOT_RUNNING")
        end_strays(self.socket, name)
        self._start(name)

    def uptime_s(self, name: str) -> float:
        """Seconds since the program was last started; 0 where it does not run."""
        found = self._call("getProcessInfo", name, unless="BAD_NAME")
        return float(found["now"] - found["start"]) if found and found["statename"] == "RUNNING" else 0.0

    def running(self, name: str) -> bool:
        """Whether the program has a process now; False as well when supervisord itself is not there."""
        return self.answers() and self._state(name) in _UP

    def answers(self) -> bool:
        """Whether supervisord listens on the socket."""
        try:
            self._call("getState")
        except ServingError:
            return False
        return True

    def await_answer(self) -> None:
        """Return once supervisord answers; ServingError if it does not in time."""
        _wait(self.answers, _START_S, f"supervisord does not answer on {self.socket}")

    def shutdown(self) -> None:
        """Stop every program, then supervisord, and see to it that no process of theirs is left."""
        if self.answers():
            pid = self._call("getPID")
            # Not waited for: a keeper that is still there could start a program again, and the wait would never end.
            # From `shutdown` on supervisord starts nothing.
            self._call("stopAllProcesses", False)
            self._call("shutdown")
            _wait(lambda: not _is_supervisord(pid), _STOP_S, f"supervisord (pid {pid}) did not stop")
        end_strays(self.socket)

    def _describe(self, program: Program) -> tuple[list[str], list[str]]:
        """Write the program's file, and give the names that supervisord finds added and changed."""
        file = self.programs / f"{program.name}.conf"
        before, content = file.read_bytes() if file.is_file() else None, render(program).encode()
        if content != before:
            write_file(file, content)
        try:
            added, changed, _ = self._call("reloadConfig")[0]
        except ServingError:
            # One file that cannot be read would block every other program.
            file.unlink() if before is None else write_file(file, before)
            raise
        return added, changed

    def _start(self, name: str) -> bool:
        state = self._state(name)
        if state in _UP:
            return False
        if state == "BACKOFF":  # its next try may be minutes away
            self._call("stopProcess", name, unless="NOT_RUNNING")
        self._call("startProcess", name, False, unless="ALREADY_STARTED")
        return True

    def _drop(self, name: str) -> None:
        self._call("stopProcess", name, unless="NOT_RUNNING BAD_NAME")
        self._call("removeProcessGroup", name, unless="BAD_NAME")
        end_strays(self.socket, name)

    def _state(self, name: str) -> str | None:
        found = self._call("getProcessInfo", name, unless="BAD_NAME")
        return None if found is None else str(found["statename"])

    def _call(self, method: str, *arguments: Any, unless: str = "") -> Any:
        """One XML-RPC call; a fault named in `unless` gives None, every other one a ServingError."""
        from xmlrpc.client import Fault, ProtocolError, ServerProxy

        from supervisor.xmlrpc import Faults, SupervisorTransport

        transport = SupervisorTransport(serverurl=f"unix://{self.socket}")
        try:
            return getattr(ServerProxy("http://supervisord", transport=transport).supervisor, method)(*arguments)
        except Fault as fault:
            if fault.faultCode in [getattr(Faults, name) for name in unless.split()]:
                return None
            raise ServingError(
                f"supervisord refused {method} {arguments}: {fault.faultString}",
                "a program that starts",
                f"read {self.socket.parent / 'supervisord.log'} and the files in {self.programs}",
            ) from fault
        except (OSError, ProtocolError) as error:
            raise ServingError(f"no supervisord answers on {self.socket}: {error}", "one", "make up") from error
        finally:
            transport.close()


def render(program: Program) -> str:
    """The program's section for supervisord; ServingError for a value that its file format cannot hold."""
    environment = ",".join(f'{key}="{_plain(value)}"' for key, value in sorted(program.environment.items()))
    return _PROGRAM.format(
        name=program.name,
        command=_escaped(shlex.join(program.command)),
        environment=_escaped(environment),
        directory=_escaped(str(program.directory.absolute())),
        stop_wait_s=program.stop_wait_s,
        log=_escaped(_escaped(str(program.log.absolute()))),  # supervisord expands this one twice
    )


def _plain(value: str) -> str:
    if '"' in value or "'" in value:
        raise ServingError(f"environment value {value!r} has a quote", "a value without quotes", "rename the folder")
    return value


def _escaped(value: str) -> str:
    """Supervisord expands %(…)s, and cuts a line where a comment sign follows a space, quoted or not."""
    if any(sign in value for sign in ("\n", " ;", " #")):
        raise ServingError(
            f"{value!r} cannot stand in a supervisord file", "no line break, ` ;` or ` #`", "rename the folder"
        )
    return value.replace("%", "%%")


def start_daemon(conf: Path) -> bool:
    """Start supervisord from `conf` unless it runs; returns once it answers, and whether it was started.

    Whatever an earlier supervisord on that socket left running is ended first: it would hold the ports.
    """
    supervisor = Supervisor(_socket_of(conf), conf.parent / "programs")
    if supervisor.answers():
        return False
    end_strays(supervisor.socket)
    started = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(conf.absolute())],
        env={key: value for key, value in os.environ.items() if key in _KEEP},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_START_S,
        check=False,
    )
    # Two may start it at the same time; the one who loses finds the other's.
    if started.returncode != 0 and not supervisor.answers():
        said = (started.stdout + started.stderr).strip()
        raise ServingError(f"supervisord did not start: {said}", "a supervisord that starts", f"read {conf}")
    supervisor.await_answer()
    return True


def shutdown(conf: Path) -> None:
    """Stop every program of the supervisord of `conf`, and itself. Nothing to do if it does not run."""
    Supervisor(_socket_of(conf), conf.parent / "programs").shutdown()


def _socket_of(conf: Path) -> Path:
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"), strict=False)
    if not parser.read(conf) or not parser.has_option("unix_http_server", "file"):
        raise ServingError(f"{conf} names no socket", "[unix_http_server] file=…", "make up")
    socket = Path(parser.get("unix_http_server", "file").replace("%(here)s", str(conf.absolute().parent)))
    if len(os.fsencode(socket)) > _LONGEST_SOCKET:
        raise ServingError(
            f"the path of the socket {socket} is too long",
            f"at most {_LONGEST_SOCKET} bytes, as the system has it",
            "move the checkout, or set TORCHRELAY_STATE to a shorter folder",
        )
    return socket


def _wait(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ServingError(f"{problem} within {seconds:.0f} s", "sooner", "make down")
        time.sleep(0.05)


def end_strays(socket: Path, name: str | None = None) -> None:
    """End what was started by the supervisord of `socket` (as program `name`) and is still there."""
    named = {"SUPERVISOR_PROCESS_NAME": name} if name else {}
    end_marked({"SUPERVISOR_SERVER_URL": f"unix://{socket.absolute()}", **named})


def end_marked(marks: Mapping[str, str]) -> bool:
    """End every process whose environment has `marks`, but for us and who started us; whether there was one."""
    import psutil

    strays = _marked(marks)
    for stray in strays:
        _signal(stray.terminate)
    _, stubborn = psutil.wait_procs(strays, timeout=5 if strays else 0)
    for stray in stubborn:
        _signal(stray.kill)
    _, immortal = psutil.wait_procs(stubborn, timeout=5)
    if immortal:
        pids = ", ".join(str(stray.pid) for stray in immortal)
        raise ServingError(f"processes {pids} survived SIGKILL", "none left", f"ps -o pid,stat,cmd -p {pids}")
    return bool(strays)


def _marked(marks: Mapping[str, str]) -> "list[Process]":
    import psutil

    spared = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ() if process.pid not in spared else {}
        except psutil.Error:  # it just ended, or is somebody else's
            continue
        if marks.items() <= environment.items():
            found.append(process)
    return found


def _signal(send: Callable[[], None]) -> None:
    import psutil

    try:
        send()
    except psutil.NoSuchProcess:
        return


def _is_supervisord(pid: int) -> bool:
    import psutil

    try:
        return "supervisor.supervisord" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
