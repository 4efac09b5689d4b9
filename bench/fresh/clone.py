"""A clone of this checkout's HEAD in which nothing was ever run, and a home that was never used."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from checkout import free_base
from timing import BenchError, Sample, environment, timed
from torchrelay.config import root

# Of the caller's environment: caches, other checkouts, and what would make this another run than a user's.
DROPPED = ("TORCHRELAY_", "XDG_", "PIP_CACHE_DIR", "UV_CACHE_DIR", "MAKE", "MFLAGS", "FORCE_COLOR")
DROPPED_WHOLE = ("CI",)
KEPT = ("TORCHRELAY_DATA",)


class Clone:
    """The clone, its home beside it, and the log of all that runs there."""

    def __init__(self, folder: Path, log: Path) -> None:
        """Lay an empty home into the empty `folder`, and begin the log anew."""
        self.folder, self.log = folder, log
        self._checkout, home = folder / "torchrelay", folder / "home"
        home.mkdir()
        self._own = {"HOME": str(home), "TORCHRELAY_PORT_BASE": str(free_base())}
        self._environment = {**_inherited(), **self._own}
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)

    @property
    def logs(self) -> Path:
        """The clone's own logs."""
        return self._checkout / "logs"

    def copy(self) -> Sample:
        """`git clone`."""
        return timed(["git", "clone", str(root()), str(self._checkout)], self.folder, self._environment, self.log)

    def deploy(self) -> tuple[Sample, str]:
        """`make deploy-dev` as a user types it, and what it said."""
        before = self.log.stat().st_size
        sample = timed(["make", "deploy-dev"], self._checkout, self._environment, self.log)
        return sample, self.log.read_bytes()[before:].decode(errors="replace")

    def command(self, target: str) -> str:
        """What to type to run a target of the clone."""
        own = " ".join(f"{name}={shlex.quote(value)}" for name, value in self._own.items())
        return f"env {own} make -C {shlex.quote(str(self._checkout))} {target}"

    def remove(self) -> None:
        """Stop what it serves and delete it. Where it cannot be stopped it stays, and BenchError says so."""
        if (self._checkout / ".venv" / "run.stamp").is_file():
            try:
                timed(["make", "down"], self._checkout, self._environment, self.log)
            except BenchError as error:
                raise BenchError(
                    f"{error}\n{self.folder} is kept, since it may still run: {self.command('down')}"
                ) from error
        shutil.rmtree(self.folder)


def _inherited() -> dict[str, str]:
    """The caller's environment as another user's who configured pip the same, without this checkout's .venv."""
    found = {
        key: value for key, value in environment().items() if key not in DROPPED_WHOLE and not key.startswith(DROPPED)
    }
    programs = found["PATH"].split(os.pathsep)
    found["PATH"] = os.pathsep.join(path for path in programs if Path(path) != Path(sys.executable).parent)
    found |= {key: os.environ[key] for key in KEPT if key in os.environ}
    return {**_pip_file(), **found}


def _pip_file() -> dict[str, str]:
    """The user's own pip configuration, which an empty home would hide."""
    configuration = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    files = (configuration / "pip" / "pip.conf", Path.home() / ".pip" / "pip.conf")
    return next(({"PIP_CONFIG_FILE": str(file)} for file in files if file.is_file()), {})
