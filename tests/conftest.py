"""Fixtures shared by all tests: interpreters, free ports, and temporary checkouts with a site of their own."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _settings_of_its_own() -> Iterator[None]:
    """What a test read of the settings, and the log that it named, are no other test's."""
    from torchrelay import console
    from torchrelay.config import settings

    yield
    settings.cache_clear()
    console._Log.path = None


@pytest.fixture(scope="session")
def component_python() -> str:
    """The interpreter of a built component environment: torch, torchserve and the component's own packages."""
    if chosen := os.environ.get("TORCHRELAY_TEST_PYTHON"):
        return chosen
    done = subprocess.run(
        [sys.executable, "-m", "torchrelay", "build-environment", "--component", "fashion_mnist", "--log", os.devnull],
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, "the component environment could not be built: make setup, then read the error above"
    from torchrelay import components

    return components.environment("fashion_mnist").python


def free_port_base(count: int = 100) -> int:
    """The first of `count` ports that nobody listens on, found by binding them all."""
    for base in range(20000 + os.getpid() % 100 * 100, 60000, count):
        if all(_free(port) for port in range(base, base + count)):
            return base
    raise RuntimeError("no free range of ports")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class Checkout:
    """A copy of this repository with its own state folder, keys and ports; `run` calls its command line."""

    folder: Path
    port_base: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.port_base + 10}"

    @property
    def tracking(self) -> str:
        return f"http://127.0.0.1:{self.port_base}"

    @property
    def state(self) -> Path:
        return self.folder / ".torchrelay"

    def popen(self, *words: str, **more: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [str(self.folder / ".venv" / "bin" / "python"), "-m", "torchrelay", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    def run(self, *words: str, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        child = self.popen(*words)
        try:
            out, error = child.communicate(timeout=timeout)
        finally:
            child.kill()
        return subprocess.CompletedProcess(words, child.returncode, out, error)

    def ok(self, *words: str, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        done = self.run(*words, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


def copy_checkout(target: Path, component_python: str) -> Checkout:
    """Copy what git would carry, borrow .venv and the built environments, and take free ports."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)
    (target / ".venv").symlink_to(ROOT / ".venv")
    environments = Path(component_python).parents[2]
    (target / ".torchrelay").mkdir(exist_ok=True)
    (target / ".torchrelay" / "environments").symlink_to(environments)
    base = free_port_base()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHRELAY_")} | {
        "TORCHRELAY_PORT_BASE": str(base),
        "TORCHRELAY_KEYS": str(target.parent / f"{target.name}-keys"),
        "PYTHONPATH": str(target / "src"),
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
    }
    environment.pop("CI", None)
    return Checkout(target, base, environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, component_python: str) -> Iterator[Checkout]:
    """A temporary checkout; whatever it started is stopped afterwards."""
    made = copy_checkout(tmp_path_factory.mktemp("checkout"), component_python)
    yield made
    done = made.run("down", timeout=120)
    assert done.returncode == 0, done.stderr
