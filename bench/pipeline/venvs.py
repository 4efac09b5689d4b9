"""Virtual environments of the peers, one each, made from their pinned requirements and kept in the cache folder."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from report import say
from timing import BenchError
from torchrelay.components import install_torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = ROOT / "components" / "fashion_mnist" / "requirements.torch"


def environment_for(name: str, requirements: Path, cache: Path, torch: bool = False) -> Path:
    """The folder of programs of the environment that `requirements` describes, built unless it is complete.

    Raises BenchError where it cannot be installed.
    """
    content = requirements.read_bytes() + (TORCH.read_bytes() if torch else b"")
    target = cache / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
    if not (target / "complete").is_file():
        say(f"installing {name} into {target}")
        _install(target, requirements, torch)
        (target / "complete").touch()
    return target / "bin"


def _install(target: Path, requirements: Path, torch: bool) -> None:
    """Bytecode is compiled at once, as pip does it: every run would pay for it otherwise."""
    shutil.rmtree(target, ignore_errors=True)
    uv = _uv()
    _call([*uv, "venv", "--quiet", "--python", sys.executable, str(target)])
    pip = [*uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(target / "bin" / "python")]
    _call([*pip, "--requirements", str(requirements)])
    if torch:
        install_torch(target / "bin" / "python", TORCH, target / "torch.log")


def _uv() -> list[str]:
    """The uv on the machine, or of the project's or a component's environment."""
    found = [*ROOT.glob(".venv/bin/uv"), *ROOT.glob(".torchrelay/environments/*/bin/uv")]
    uv = shutil.which("uv") or next(map(str, found), None)
    if uv is None:
        raise BenchError("no uv: install it, or build a component's environment with `make environment`")
    return ["nice", uv]


def _call(command: list[str]) -> None:
    links = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    done = subprocess.run(command, env=os.environ | links, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()[-600:]}")
