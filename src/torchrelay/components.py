"""ML components as the rest sees them: which files make one up, and the environment that it runs in.

An environment is named by what decides its content (lock, torch, Python, platform, variant), so a new model
never rebuilds one, and two components with the same lock share one.
"""

import ast
import hashlib
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from filelock import FileLock

from torchrelay.config import component, read_json, root, settings, write_json
from torchrelay.console import pulse, run_logged, say
from torchrelay.errors import ConfigError
from torchrelay.handover import Environment

Variant = Literal["cpu", "cuda"]

_CONDA_PYTHON = "3.11"  # the one that the locks are resolved for
_CONDA_HEAD = """\
# The packages of requirements.cpu.lock and requirements.torch, for those who run Conda: conda env create -f conda.yaml
# Written by `make lock`, from the locks. torch is the build that pip takes by default.
"""

# What lies in a component's folder and is not part of it: caches, and what runs by hand leave there.
_LEFT_BEHIND = (".*", "__pycache__", "*.egg-info", "mlruns", "node_modules", "train-output", "search-output")
# Files and folders of a component that neither training nor a data stage reads: texts, tests, what other legs see to.
_NOT_READ = ("tests", "conftest.py", "pytest.ini", "README*", "component.yaml", "conda.yaml", "requirements.*")
# What training does not read but for its outcome, the data: changing them must not retrain.
_NOT_TRAINING = ("data.py", "params.yaml", "search.py")


def folder(name: str) -> Path:
    """The component's folder."""
    return root() / "components" / name


def training_sources(name: str) -> list[Path]:
    """The files whose change asks for a new training, sorted, relative to the checkout: whatever train.py may read."""
    read = (path for path in _read(name) if not _matches(path.relative_to(folder(name)).parts[0], _NOT_TRAINING))
    return sorted(path.relative_to(root()) for path in {*read, folder(name) / "MLproject"})


def data_sources(name: str) -> list[Path]:
    """The files whose change asks for the data stages, sorted: data.py, what it imports of the folder, other than code.

    A model's code is not among them, so that an edit of it costs no pass over the data.
    """
    other = (path for path in _read(name) if path.suffix != ".py" and path.name != "MLproject")
    return sorted({*other, *_imported(folder(name), folder(name) / "data.py")})


def _read(name: str) -> Iterator[Path]:
    """All files of the component but those that are only for people, tests and other legs."""
    for path in folder(name).iterdir():
        if not _matches(path.name, _NOT_READ):
            yield from _files(path)


def _files(path: Path) -> Iterator[Path]:
    """The file, or all files below the folder, without what was left behind there."""
    if _matches(path.name, _LEFT_BEHIND):
        return
    if path.is_dir():
        for inner in path.iterdir():
            yield from _files(inner)
    else:
        yield path


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _imported(home: Path, first: Path) -> set[Path]:
    """The module and all that it imports from `home`, however far down; of a package, every module."""
    found: set[Path] = set()
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(module for name in _imports(path) for module in _modules(home, name))
    return found


def _modules(home: Path, name: str) -> Iterator[Path]:
    """The Python files of the module or package of that name, where it is one of `home`."""
    if (home / f"{name}.py").is_file():
        yield home / f"{name}.py"
    if (home / name).is_dir():
        yield from (path for path in _files(home / name) if path.suffix == ".py")


def _imports(path: Path) -> set[str]:
    """Top-level names that the module imports, also inside functions; what cannot be read imports nothing."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError):  # whoever runs it says so in its own words
        return set()
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in named}


def training_digest(name: str) -> str:
    """A hash of the settings that training reads, so that a latency objective can change without a new training."""
    found = component(name)
    content = {"training": found.training.model_dump(), "golden": found.golden.model_dump()}
    return _sha256(json.dumps(content, sort_keys=True).encode())[:16]


def gate_digest(name: str) -> str:
    """A hash of the settings that the gate reads."""
    return _sha256(component(name).metric.model_dump_json().encode())[:16]


def serving_digest(name: str) -> str:
    """A hash of the settings that an engine and its prediction log read."""
    policy = component(name)
    content = f"{policy.serving.model_dump_json()} {policy.monitoring.model_dump_json()}"
    return _sha256(content.encode())[:16]


def variant() -> Variant:
    """Cpu or cuda, as set, or by whether the NVIDIA driver is loaded."""
    chosen = settings().variant
    if chosen != "auto":
        return chosen
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def lock_files(name: str) -> tuple[Path, Path]:
    """The hashed lock of everything but torch, and the file that pins torch."""
    locks = (folder(name) / f"requirements.{variant()}.lock", folder(name) / "requirements.torch")
    for lock in locks:
        if not lock.is_file():
            raise ConfigError(f"{lock} does not exist", "a pinned lock of the component's environment", "make lock")
    return locks


def environment_name(name: str) -> str:
    """For example `py311-cpu-1a2b3c4d5e6f`: Python, variant, and the hash of locks and platform."""
    content = b"\0".join(lock.read_bytes() for lock in lock_files(name))
    digest = _sha256(content + f"{platform.system()} {platform.machine()}".encode())[:12]
    return f"py{sys.version_info.major}{sys.version_info.minor}-{variant()}-{digest}"


def conda_environment(folder: Path) -> str:
    """The CPU lock of the component in `folder` as the text of an `environment.yaml` for Conda (see ADR 0007).

    Conda reads the packages as pip's; hashes are left out, since pip takes them for all packages or for none, and
    torch, whose builds share a version, has none.
    """
    from ruamel.yaml import YAML

    lock, torch = (folder / name for name in ("requirements.cpu.lock", "requirements.torch"))
    lines = [line for file in (lock, torch) for line in file.read_text(encoding="utf-8").splitlines()]
    pins = [line.removesuffix("\\").strip() for line in lines if line[:1].isalnum()]
    dependencies = [f"python={_CONDA_PYTHON}", "pip", {"pip": pins}]
    content = {"name": folder.name, "channels": ["conda-forge", "nodefaults"], "dependencies": dependencies}
    yaml, text = YAML(), io.StringIO()
    yaml.indent(sequence=4, offset=2)
    yaml.width = 200
    yaml.dump(content, text)
    return _CONDA_HEAD + text.getvalue()


def environment_file(environment: str) -> Path:
    """The file whose presence says that the environment is complete."""
    return settings().state / "environments" / environment / "environment.json"


def environment(name: str) -> Environment:
    """The component's environment; a ConfigError where it was not built yet."""
    return read_json(Environment, environment_file(environment_name(name)), f"make environment COMPONENT={name}")


def build_environment(name: str, log: Path) -> Environment:
    """Build the component's environment unless it is complete; killed half-way, the next call begins it anew."""
    called = environment_name(name)
    done = environment_file(called)
    done.parent.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(done.parent.parent / f".{called}.lock"):
        if not done.is_file():
            _install(name, done.parent, log)
            write_json(done, _describe(name, called, done.parent))
    return environment(name)


def _describe(name: str, called: str, target: Path) -> Environment:
    lock, _ = lock_files(name)
    return Environment(
        name=called,
        variant=variant(),
        python=str(target / "bin" / "python"),
        lock_sha256=_sha256(lock.read_bytes()),
    )


def _install(name: str, target: Path, log: Path) -> None:
    """A fresh virtual environment from the locks. Torch apart: its builds per variant share one version."""
    lock, torch = lock_files(name)
    if target.exists():
        shutil.rmtree(target)
    say(f"  {lock.name} → {target.name} (a minute or two; details in {log})")
    installer = root() / "requirements" / "install"
    with pulse(lambda: f"{lock.name}: {_written(target)}"):
        _step([sys.executable, installer, "--venv", target, "--lock", lock], log)
    install_torch(target / "bin" / "python", torch, log)


def install_torch(python: Path, pinned: Path, log: Path) -> None:
    """Install the torch that `pinned` names: from where pip is configured to look first, then from PyTorch's index.

    Raises ConfigError where neither has it.
    """
    requirement = next(line for line in pinned.read_text().splitlines() if line.startswith("torch=="))
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--progress-bar",
        "off",
    ]
    target = python.parents[1]
    # pip downloads into the temporary folder: there the size so far can be seen, and /tmp is often too small for CUDA.
    with TemporaryDirectory(dir=target, prefix=".pip-") as scratch, pulse(lambda: f"{requirement}: {_written(target)}"):
        environment = {**os.environ, "TMPDIR": scratch}
        if variant() == "cuda" or platform.system() != "Linux":
            _step([*pip, requirement], log, environment)
        elif run_logged([*pip, f"{requirement}+cpu"], log, environment=environment):
            _step([*pip, f"{requirement}+cpu", "--index-url", f"{settings().torch_index}/cpu"], log, environment)


def _written(folder: Path) -> str:
    """How much lies below the folder, which somebody is writing to."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += Path(place, name).lstat().st_size
    return f"{size / 1e6:.0f} MB written"


def _step(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> None:
    if run_logged(command, log, show=_worth_showing, environment=environment, indent="  "):
        raise ConfigError(
            f"{' '.join(map(str, command[:4]))} … failed", "an installation without errors", f"read {log}, then rerun"
        )


def _worth_showing(line: str) -> bool:
    """What the installer says of its progress, and errors; not pip's notices."""
    return line.startswith("setup:") or "error" in line.lower()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
