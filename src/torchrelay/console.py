"""What people see while something runs: named legs, progress, colour only on a terminal, and logs in files."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from torchrelay.errors import TorchrelayError

# In the environment of every child, and so of its children: the state folder that it works with. `make down` ends by it
# what outlived a kill of its parent.
MARK = "TORCHRELAY_CHILD_OF"

_PULSE_S = 5.0
_ESCAPES = re.compile(r"\033\[[\d;]*m")
_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def coloured() -> bool:
    """Whether a terminal shows what is said: NO_COLOR says no, and a parent that shows our lines says FORCE_COLOR."""
    return not os.environ.get("NO_COLOR") and (sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR")))


def paint(text: str, colour: str) -> str:
    """`text` in `colour` where colours are shown, else as it is."""
    if not coloured():
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def plain(text: str) -> str:
    """`text` without colours, for files."""
    return _ESCAPES.sub("", text)


class _Log:
    """The file that everything said is also written to, once a verb has named one."""

    path: Path | None = None


def log_to(path: Path | None) -> None:
    """From now on, what is said is also written to `path`, which starts empty; with None to the terminal alone."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    _Log.path = path


def say(text: str) -> None:
    """One line for the person in front of the terminal; standard output stays for results."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
    if _Log.path:
        with _Log.path.open("a", encoding="utf-8") as file:
            file.write(f"{plain(text)}\n")


def result(text: str) -> None:
    """What a command was asked for, on standard output."""
    print(text, flush=True)  # noqa: T201


def show_error(error: TorchrelayError) -> None:
    """The three parts of an error, and the log that says more."""
    say(f"{paint('✗', 'red')} {error.found}")
    say(f"  expected: {error.expected}")
    say(f"  next:     {error.next_command}")
    if _Log.path:
        say(f"  log:      {_Log.path}")


class _Legs:
    """The legs that ended well in this process, in their order, with their seconds."""

    done: ClassVar[list[tuple[str, float]]] = []


def legs_done() -> list[tuple[str, float]]:
    """Name and seconds of every leg that ended well in this process."""
    return list(_Legs.done)


@contextmanager
def leg(name: str, subject: str = "") -> Iterator[None]:
    """Name a leg when it starts, and say how long it took when it has ended well."""
    began = time.monotonic()
    say(f"{paint('▶', 'cyan')} {paint(name, 'bold')} {subject}".rstrip())
    yield
    seconds = time.monotonic() - began
    _Legs.done.append((name, seconds))
    say(f"{paint('✓', 'green')} {name} {paint(f'{seconds:.1f} s', 'dim')}")


@contextmanager
def pulse(so_far: Callable[[], str]) -> Iterator[None]:
    """For what is silent while it works: every few seconds, until the block ends, say how far it is."""
    began, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(_PULSE_S):
            say(f"  {so_far()}, {time.monotonic() - began:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _nothing(_line: str) -> bool:
    return False


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    *,
    show: Callable[[str], bool] = _nothing,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    indent: str = "",
    keep_open: tuple[int, ...] = (),
    meanwhile: Callable[[], None] | None = None,
) -> int:
    """Run `command`; all that it prints goes to `log`, and the lines that `show` picks to the terminal too.

    With `meanwhile`, the child is one that waits for a line on its standard input, which it gets once that is done.
    Returns its exit status. The child ends with us: it is killed if we are interrupted.
    """
    from torchrelay.config import settings

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE if meanwhile else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**(os.environ if environment is None else environment), MARK: str(settings().state)},
            cwd=folder,
            pass_fds=keep_open,
        )
        try:
            if meanwhile:
                meanwhile()
                _tell(child)
            for line in child.stdout or ():
                file.write(plain(line))
                file.flush()
                if show(line):
                    say(f"{indent}{line.rstrip()}")
            return child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            if child.stdout:
                child.stdout.close()


def _tell(child: "subprocess.Popen[str]") -> None:
    """Say go. A child that has ended already says so by its status."""
    if child.stdin:
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write("go\n")
