"""The floors of the package hold, and the contract that says so would notice if they did not."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SERVING = ROOT / "src" / "torchrelay" / "serving"
# What a component's own Python has for certain: torch and what it cannot do without.
INSIDE = {"torch", "numpy"}


def _lint(folder: Path) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).parent / "lint-imports"
    environment = {"PYTHONPATH": str(folder / "src"), "PATH": "/usr/bin:/bin"}
    command = [program, "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_no_floor_knows_one_above_it() -> None:
    done = _lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors.py", "import torchrelay.config"),
        ("serving/gateway.py", "import torchrelay.tracking"),
        ("serving/gateway.py", "import torchrelay.archive"),
        ("tracking.py", "import torchrelay.ledger"),
        ("ledger.py", "import mlflow"),
        ("data.py", "import snakemake"),
        ("components.py", "import torch"),
        ("attic.py", ""),
    ],
)
def test_a_breach_is_noticed(module: str, line: str, copy: Path) -> None:
    with (copy / "src" / "torchrelay" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert _lint(copy).returncode != 0


@pytest.mark.parametrize("module", ["handler.py", "prove.py"])
def test_what_runs_inside_the_engine_needs_torch_and_no_more(module: str) -> None:
    beside = {path.stem for path in SERVING.glob("*.py")} | {"handler"}
    for node in ast.walk(ast.parse((SERVING / module).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] in INSIDE | beside | set(sys.stdlib_module_names), f"{module} imports {name}"
