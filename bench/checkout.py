"""A copy of this checkout with a site of its own, for measurements that deploy, retrain or move aliases.

It borrows .venv and the environments that were built already; data, registry, keys and ports are its own.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from torchrelay.config import Json, read_yaml, root, settings
from torchrelay.errors import ServingError

_PORTS = 100


@dataclass(frozen=True)
class Checkout:
    """Where the copy is, and the environment in which its commands run."""

    folder: Path
    environment: dict[str, str]

    def relay(self, *words: str, quiet: bool = False) -> str:
        """Run a verb of the copy's command line and return its standard output; ServingError if it fails."""
        command = [str(self.folder / ".venv" / "bin" / "python"), "-m", "torchrelay", *words]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or "").strip()[-2000:]
            found = f"torchrelay {' '.join(words)} ended with {done.returncode}\n{said}"
            raise ServingError(found.strip(), "status 0", f"read {self.folder}/logs (with --keep)")
        return done.stdout

    def override(self, component: str, settings_: Json) -> None:
        """Write `config/local.yaml` with these settings of one component."""
        text = yaml.safe_dump({"components": {component: settings_}})
        (self.folder / "config" / "local.yaml").write_text(text, encoding="utf-8")

    def limit_data(self, component: str, samples: int) -> None:
        """Take only so many samples, where the component's data parameters know a limit."""
        path = self.folder / "components" / component / "params.yaml"
        content = read_yaml(path)
        if "limit" in content:
            path.write_text(yaml.safe_dump(content | {"limit": samples}), encoding="utf-8")

    def enter(self) -> None:
        """From now on this process's settings are the copy's: call it before anything reads them."""
        os.environ.update(self.environment)
        os.chdir(self.folder)
        settings.cache_clear()


def copy_checkout(target: Path) -> Checkout:
    """Copy what git would carry into an empty folder and lay links to what is too large to copy."""
    here, state = root(), settings().state
    for name in _files(here):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(here / name, target / name)
    subprocess.run(["git", "init", "--quiet"], cwd=target, check=True)
    (target / ".venv").symlink_to(here / ".venv")
    environments = target / ".torchrelay" / "environments"
    environments.mkdir(parents=True)
    for built in state.glob("environments/*/environment.json"):
        (environments / built.parent.name).symlink_to(built.parent)
    return Checkout(target, _environment(target))


def _files(here: Path) -> Sequence[Path]:
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (here / name).is_file()]


def _environment(target: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TORCHRELAY_")}
    data = {key: value for key, value in os.environ.items() if key == "TORCHRELAY_DATA"}
    return {
        **kept,
        **data,
        "TORCHRELAY_ROOT": str(target),
        "TORCHRELAY_PORT_BASE": str(free_base()),
        "TORCHRELAY_KEYS": str(target / ".keys"),
        "PYTHONPATH": str(target / "src"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def free_base() -> int:
    """The first of a range of ports that nobody listens on."""
    for base in range(24000 + os.getpid() % 50 * 100, 60000, 100):
        if all(_free(port) for port in range(base, base + _PORTS)):
            return base
    raise RuntimeError("no free range of ports")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
