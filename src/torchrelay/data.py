"""The data leg: what DVC has in place for a component, and bringing it up to date.

Starting DVC costs a second and more with every component, so a fingerprint of what its stages read and wrote
(`<state>/dvc/<component>.json`) answers "is there anything to do?" from file stats alone. A component's data.py
runs in the component's own environment; this module only starts it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torchrelay import components
from torchrelay.config import Frozen, component_names, read_yaml, root, settings, write_file, write_json
from torchrelay.console import run_logged
from torchrelay.errors import DataError
from torchrelay.handover import DataVersion
from torchrelay.storage import EMULATOR, google_environment

Stage = Literal["extract", "validate", "prepare"]

# Each stage's inputs and output, as folders under data/<component>/; dvc.yaml says the same to DVC.
STAGES: dict[Stage, tuple[tuple[str, ...], str]] = {
    "extract": ((), "raw"),
    "validate": (("raw",), "validated"),
    "prepare": (("raw", "validated"), "prepared"),
}
_SIGNED = "# Written by torchrelay"
WRITTEN = f"{_SIGNED}: the state folder is not the checkout's own, or there is a bucket."


class Seen(Frozen):
    """`<state>/dvc/<component>.json`: fingerprints from when DVC last had nothing left to do."""

    whole: str
    source: str
    code: str


def run_stage(component: str, stage: Stage, python: str) -> None:
    """Run one stage of the component's data.py with the interpreter `python`; its output passes through.

    Raises DataError if it fails; what it found stands in its own words above.
    """
    inputs, output = STAGES[stage]
    code, data = Path("components") / component, Path("data") / component
    command = [python, str(code / "data.py"), stage, "--params", str(code / "params.yaml")]
    if inputs:
        command += ["--input", *(str(data / folder) for folder in inputs)]
    ended = subprocess.run([*command, "--output", str(data / output)], cwd=root(), check=False)
    if ended.returncode:
        raise DataError(
            f"stage {stage} of {component} ended with exit code {ended.returncode}; its reason stands above",
            "exit code 0",
            f"mend the data or {code / 'params.yaml'}, then: make deploy-dev COMPONENT={component}",
        )


def reproduce(component: str, log: Path) -> None:
    """Bring `data/<component>/prepared` up to date with DVC: its progress is shown, all it prints is in `log`.

    Raises DataError in the words of the data.py that failed, or with the log's name.
    """
    register_components()
    place_remote()
    inputs, source, code = _read_by(component)
    log.unlink(missing_ok=True)
    seen = _seen(component)
    if seen and seen.code != code:
        _dvc(["repro", "--force", f"prepare@{component}"], component, log)
    elif seen and seen.source != source:
        _dvc(["repro", "--force", "--single-item", f"extract@{component}"], component, log)
    _dvc(["repro", f"prepare@{component}"], component, log)
    # What changed while DVC ran was perhaps not read: leave no fingerprint, so that the next call asks DVC again.
    if (inputs, source, code) == _read_by(component):
        write_json(_seen_path(component), Seen(whole=_whole(component), source=source, code=code))


def _read_by(component: str) -> tuple[str, str, str]:
    """Fingerprints of what the stages read: what DVC watches, and what it does not: the user's source, more code."""
    watched, code = _inputs(component), _code(component)
    return _print_of(watched), _print_of(_source(component)), _print_of(code)


def up_to_date(component: str) -> bool:
    """Whether nothing that the stages read or wrote changed since DVC last had nothing to do. Milliseconds."""
    seen = _seen(component)
    return seen is not None and seen.source == _print_of(_source(component)) and seen.whole == _whole(component)


def version(component: str) -> DataVersion:
    """The dataset that dvc.lock names for this component, whatever the other components' say.

    Raises DataError where there is none yet.
    """
    prepared = re.search(
        rf"^    - path: data/{component}/prepared\n(?:      .*\n)*?      md5: (\S+)", _lock(component), re.M
    )
    if prepared is None:
        raise DataError(
            f"dvc.lock names no data/{component}/prepared", "data that DVC prepared", f"dvc repro prepare@{component}"
        )
    return DataVersion(component=component, hash=prepared[1])


def register_components() -> bool:
    """Bring the `components` list of params.yaml in step with the folders; whether it had to change."""
    path, wanted = root() / "params.yaml", component_names()
    if path.is_file() and read_yaml(path).get("components") == wanted:
        return False
    import io

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.indent(sequence=4, offset=2)
    content = yaml.load(path) if path.is_file() else {}
    listed = content.setdefault("components", [])
    for name in [name for name in listed if name not in wanted]:
        listed.remove(name)
    for place, name in enumerate(wanted):
        if name not in listed:
            listed.insert(place, name)
    text = io.StringIO()
    yaml.dump(content, text)
    write_file(path, text.getvalue().encode())
    return True


# --- DVC -------------------------------------------------------------------------------------------------------------


def _dvc(arguments: list[str], component: str, log: Path) -> None:
    """Run DVC: the stages' own lines are shown, all that it prints goes to the log."""
    command = [sys.executable, "-m", "dvc", *arguments]
    if run_logged(command, log, show=_of_a_stage, environment=_environment(), folder=root(), indent="  "):
        raise _failure(component, log)


def _of_a_stage(line: str) -> bool:
    return line.startswith(tuple(f"{stage}: " for stage in STAGES))


def _environment() -> dict[str, str]:
    """The stages find this interpreter as `python`; DVC reports to nobody and keeps its index in the state folder."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(settings().state / "dvc" / "site"),
        "PYTHONUNBUFFERED": "1",
        **google_environment(),
    }


def _failure(component: str, log: Path) -> DataError:
    """The first three-line error in the log, which is the one nearest to the cause."""
    told = re.search(r"^error: (.+)\n  expected: (.+)\n  next:     (.+)$", log.read_text(encoding="utf-8"), re.M)
    if told is None:
        return DataError(
            f"DVC could not prepare the data of {component}; its output is in {log}",
            "all data stages to succeed",
            f"make deploy-dev COMPONENT={component}",
        )
    return DataError(f"{told[1]} (log: {log})", told[2], told[3])


def place_remote() -> None:
    """Keep DVC's cache and remote in the state folder, wherever that is, or the remote in the bucket of the settings.

    `.dvc/config.local` is written, unless there is one of the user's own.
    """
    local = root() / ".dvc" / "config.local"
    before = local.read_text(encoding="utf-8") if local.is_file() else None
    if before is not None and not before.startswith(_SIGNED):
        return
    wanted = _own_config()
    if wanted is None:
        local.unlink(missing_ok=True)
    elif wanted != before:
        write_file(local, wanted.encode())


def _own_config() -> str | None:
    """What `.dvc/config.local` must say; None where `.dvc/config` says all."""
    here, parts = settings(), []
    if here.state.resolve() != (root() / ".torchrelay").resolve():
        folder = here.state.resolve() / "dvc"
        parts += [f"[cache]\n    dir = {folder / 'cache'}", f"['remote \"local\"']\n    url = {folder / 'remote'}"]
    if here.bucket:
        parts += ["[core]\n    remote = bucket", f"['remote \"bucket\"']\n    url = {here.bucket}/dvc{_emulated()}"]
    return "\n".join((WRITTEN, *parts, "")) if parts else None


def _emulated() -> str:
    emulator = os.environ.get(EMULATOR)
    return f"\n    endpointurl = {emulator}\n    allow_anonymous_login = true" if emulator else ""


# --- fingerprints ----------------------------------------------------------------------------------------------------


def _lock(component: str) -> str:
    """The component's part of dvc.lock, cut out as text: parsing the YAML of a hundred components takes seconds."""
    path = root() / "dvc.lock"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    wanted = tuple(f"  {stage}@{component}:" for stage in STAGES)
    parts = re.split(r"(?m)^(?=  \S)", text)
    return "".join(part for part in parts if part.startswith(wanted))


def _inputs(component: str) -> tuple[Path, ...]:
    """The files that decide what the stages do, as dvc.yaml names them."""
    folder = root() / "components" / component
    return folder / "data.py", folder / "params.yaml", root() / "dvc.yaml"


def _code(component: str) -> list[Path]:
    """What else of the component's folder the stages may read: DVC cannot watch what each component has of its own."""
    watched = _inputs(component)
    return [path for path in components.data_sources(component) if path not in watched]


def _source(component: str) -> list[Path]:
    """The files of the folder that the user named as the data's source, which DVC does not watch.

    A component names it as `source` in its params.yaml; the variable TORCHRELAY_DATA wins.
    """
    params = root() / "components" / component / "params.yaml"
    named = os.environ.get("TORCHRELAY_DATA") or (read_yaml(params).get("source") if params.is_file() else None)
    folder = root() / Path(str(named)).expanduser()
    if named is None or not folder.is_dir():
        return []
    return _files(folder / component if (folder / component).is_dir() else folder)


def _whole(component: str) -> str:
    """Fingerprint of everything that the stages read and wrote, and of what dvc.lock says of them."""
    data = root() / "data" / component
    outputs = [path for _, folder in STAGES.values() for path in [data / folder, *_files(data / folder)]]
    lock = hashlib.sha256(_lock(component).encode()).hexdigest()
    return _print_of([*_inputs(component), *_code(component), *outputs], lock)


def _files(folder: Path) -> list[Path]:
    """All files below the folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _print_of(paths: Iterable[Path], extra: str = "") -> str:
    """Hash of paths, sizes and times; a missing path counts as such."""
    facts: list[Any] = [extra]
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:
            facts.append([str(path), None])
        else:
            facts.append([str(path), stat.st_size if path.is_file() else None, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _seen_path(component: str) -> Path:
    return settings().state / "dvc" / f"{component}.json"


def _seen(component: str) -> Seen | None:
    """The last fingerprints; None where there are none or they cannot be read, so that DVC is asked."""
    try:
        return Seen.model_validate_json(_seen_path(component).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
