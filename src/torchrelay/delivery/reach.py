"""How the control node reaches its serving nodes: as folders of this machine, or by SSH.

Over SSH one connection to a node's agent (`torchrelay.serving.agent`) is kept open and carries all calls.
"""

import contextlib
import inspect
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from typing import IO, Any, NoReturn, cast

from torchrelay import __version__
from torchrelay import errors as all_errors
from torchrelay.config import Json, Node
from torchrelay.errors import ConfigError, ServingError, TorchrelayError, UntrustedError
from torchrelay.handover import Desired, NodeReport
from torchrelay.serving import agent
from torchrelay.serving.apply import FencedError
from torchrelay.serving.calls import Calls

# An apply may load for long. Anything else that takes so long is no answer.
_PATIENCE_S = {"apply": 900.0, "ask": 120.0}
_USUAL_PATIENCE_S = 30.0
_CONNECT_S = 5
_GREETING_S = 20.0
# Who did not answer is not asked again at once: each look of a roll-out would wait for it anew.
_GIVEN_UP_S = 3.0
_DISTRUST = ("host key verification failed", "remote host identification has changed", "no matching host key")


def calls(node: Node) -> Calls:
    """What the node can be asked; each call raises ServingError when it is out of reach.

    UntrustedError when its host key is not the one that is known: nothing may go on then.
    """
    return Calls(node.folder) if node.ssh is None else cast("Calls", _Remote(node))


def apply_on(node: Node, desired: Desired) -> tuple[NodeReport, TorchrelayError | None]:
    """Bring the node to the desired state: what it says of itself then, and what went wrong on the way."""
    found = calls(node).apply(desired)
    return found.report, ServingError(**found.error.model_dump()) if found.error else None


def observe_on(node: Node) -> NodeReport:
    """What the node says of itself."""
    return calls(node).observe()


class _Remote:
    """The calls of a node on another machine."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        signature = inspect.signature(getattr(Calls, name))

        def call(*words: Any, **named: Any) -> Any:
            given = signature.bind(None, *words, **named).arguments
            given.pop("self")
            arguments = agent.arguments_of(name)(**given).model_dump_json().encode()
            return agent.answer_of(name).validate_json(_line_to(self._node).ask(name, arguments))

        return call


class _Line:
    """A connection to a node's agent."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the connection
        self._process = subprocess.Popen(
            _command(node), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        self._words = self._noise = ""
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._number = 0
        self._waiting: dict[int, Future[tuple[Json, bytes]]] = {0: Future()}
        threading.Thread(target=self._read, daemon=True).start()
        greeting, _ = self._wait(0, _GREETING_S, "greet")
        if greeting.get("torchrelay") != __version__:
            self.close()
            raise ConfigError(
                f"{self._name} runs torchrelay {greeting.get('torchrelay')}",
                f"{__version__}, as here",
                "make configure, which brings the nodes to this release",
            )

    @property
    def open(self) -> bool:
        """Whether ssh runs still."""
        return self._process.poll() is None

    @property
    def _name(self) -> str:
        return f"node {self.node.name} at {self.node.ssh.host if self.node.ssh else 'this machine'}"

    def ask(self, name: str, arguments: bytes) -> bytes:
        """The content of the answer to one call; raises what the node says."""
        with self._lock:
            self._number += 1
            number, self._waiting[self._number] = self._number, Future()
            header = json.dumps({"id": number, "call": name}).encode()
            try:
                self._stdin.write(header + b"\n" + arguments + b"\n")
                self._stdin.flush()
            except OSError:
                self._lost()
        answer, content = self._wait(number, _PATIENCE_S.get(name, _USUAL_PATIENCE_S), name)
        if "error" in answer:
            kind = {**vars(all_errors), "FencedError": FencedError}.get(str(answer["error"]), ServingError)
            raise kind(**json.loads(content))
        return content

    def close(self) -> None:
        """End it; calls underway end on the node all the same."""
        with self._closing:
            if self._errors.closed:
                return
            with contextlib.suppress(OSError):
                self._stdin.close()
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            self._words = self._errors.read().decode(errors="replace")
            self._errors.close()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        return self._process.stdin

    def _wait(self, number: int, patience_s: float, name: str) -> tuple[Json, bytes]:
        try:
            return self._waiting[number].result(patience_s)
        except LateError:
            self.close()
            raise ServingError(
                f"{self._name} did not answer {name!r} in {patience_s:.0f} s", "an answer", "make doctor"
            ) from None
        except EOFError:
            self._lost()
        finally:
            self._waiting.pop(number, None)

    def _read(self) -> None:
        """Hand each answer to whoever waits for it, until the connection ends."""
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        with self._process.stdout as stdout:
            while header := stdout.readline():
                given = _header(header)
                if given is None:
                    self._noise = header.decode(errors="replace").strip()
                    break
                found = self._waiting.get(given.get("id", 0))
                content = stdout.readline()
                if found and content.endswith(b"\n"):
                    found.set_result((given, content))
        for waiting in list(self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(EOFError())

    def _lost(self) -> NoReturn:
        """Say why ssh has ended, in its own words."""
        self.close()
        words = [line.strip() for line in self._words.splitlines() if line.strip()]
        text = words[-1] if words else f"ssh ended with status {self._process.returncode}"
        if self._noise:
            raise ServingError(
                f"{self._name} says {self._noise[:200]!r} before its agent does",
                "a shell that prints nothing where nobody reads it",
                f"make {self.node.ssh.user if self.node.ssh else 'its user'}'s start-up files there say nothing",
            )
        if any(one in line.lower() for one in _DISTRUST for line in words):
            where = self.node.ssh.known_hosts if self.node.ssh else ""
            raise UntrustedError(
                f"{self._name} shows a host key that is not the known one ({text})",
                f"the one in {where}",
                "find out why: a machine made anew gets its key known by make configure, anything else is an attack",
            )
        raise ServingError(f"{self._name} is out of reach: {text}", "an answer over SSH", "make doctor")


def hang_up() -> None:
    """End all connections."""
    with _connecting:
        for line in _lines.values():
            line.close()
        _lines.clear()
        _given_up.clear()


def _header(line: bytes) -> Json | None:
    """The header of an answer; None if it is none."""
    try:
        given = json.loads(line)
    except ValueError:
        return None
    return given if isinstance(given, dict) else None


_lines: dict[Node, _Line] = {}
_given_up: dict[Node, tuple[float, TorchrelayError]] = {}
_connecting = threading.Lock()


def _line_to(node: Node) -> _Line:
    """The connection to the node, made anew where there is none or it has ended."""
    with _connecting:
        line = _lines.get(node)
        if line and line.open:
            return line
        if line:
            line.close()
        when, error = _given_up.get(node, (0.0, None))
        if error and time.monotonic() < when + _GIVEN_UP_S:
            raise error
        try:
            _lines[node] = _Line(node)
        except TorchrelayError as failure:
            _given_up[node] = (time.monotonic(), failure)
            raise
        return _lines[node]


def _command(node: Node) -> list[str]:
    """What is run to reach the agent."""
    ssh = node.ssh
    if ssh is None:
        raise ConfigError(f"node {node.name} is on this machine", "an address", "make configure")
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": _CONNECT_S,
        # A machine that lost its power says nothing more.
        "ServerAliveInterval": 2,
        "ServerAliveCountMax": 3,
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": ssh.known_hosts,
        "GlobalKnownHostsFile": "none",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "IdentityFile": ssh.key,
        "Port": ssh.port,
    }
    given = [*(f"{name}={value}" for name, value in options.items()), *ssh.options]
    return [
        "ssh",
        "-T",
        *(word for one in given for word in ("-o", one)),
        f"{ssh.user}@{ssh.host}",
        "--",
        *ssh.command,
        "agent",
        "--node",
        str(node.folder),
    ]
