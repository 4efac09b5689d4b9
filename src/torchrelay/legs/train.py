"""Train: run the component's own MLproject by the MLflow CLI, in the component's own environment."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torchrelay import components
from torchrelay.config import component, read_json, root, settings, site, write_file, write_json
from torchrelay.console import run_logged
from torchrelay.errors import ConfigError
from torchrelay.handover import DataVersion, TrainedRun
from torchrelay.lineage import git_state
from torchrelay.tracking import Tracking

# What later legs ask of a run without this checkout: kept with the run, on the tracking server.
_KEPT = ("evaluation.json", "golden.json", "git.json")


def train_model(name: str, data: DataVersion, prepared: Path, output: Path, log: Path) -> TrainedRun:
    """Run `mlflow run` and return what it left in `output`, with git.json: the checkout when training began.

    The folder is written aside and renamed when training is complete: what lies there is whole.
    """
    found = component(name)
    aside = _aside(output.absolute())
    write_json(aside / "git.json", git_state(root()))
    handed = {
        "data": prepared,
        "output": aside,
        "data_hash": data.hash,
        "golden_samples": found.golden.samples,
        "golden_tolerance": found.golden.tolerance,
    }
    _run(name, _command(name, {**found.training.parameters, **handed}), log)
    run = read_json(TrainedRun, aside / "run.json", f"read {log}")
    _keep(run, aside, found.model_dump_json(indent=2))
    shutil.rmtree(output, ignore_errors=True)
    aside.rename(output)
    return run


def _aside(output: Path) -> Path:
    """A folder that no other training knows: one that outlived its parent's kill must not write into the next one's."""
    for left in output.parent.glob(f".{output.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    return aside


def _command(name: str, parameters: Mapping[str, object]) -> list[str | Path]:
    mlflow = Path(components.environment(name).python).with_name("mlflow")
    words = [word for key, value in parameters.items() for word in ("-P", f"{key}={value}")]
    project = str(components.folder(name))
    return [mlflow, "run", project, "--env-manager", "local", "--experiment-name", name, *words]


def _run(name: str, command: list[str | Path], log: Path) -> None:
    status = run_logged(command, log, show=_progress, indent="  ", environment=_environment(name))
    if status:
        raise ConfigError(
            f"training {name} ended with status {status}",
            "a run that ends with status 0",
            f"read {log}; then make deploy-dev COMPONENT={name}",
        )


def _progress(line: str) -> bool:
    return line.startswith(("epoch", "train:", "✗", "  expected:", "  next:")) or "Error" in line


def _environment(name: str) -> dict[str, str]:
    """The child's environment: its interpreter first on PATH, and the tracking server of this site."""
    binaries = Path(components.environment(name).python).parent
    return {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        "VIRTUAL_ENV": str(binaries.parent),
        "MLFLOW_TRACKING_URI": site().tracking.url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MPLCONFIGDIR": str(settings().state / "matplotlib"),
        "PYTHONUNBUFFERED": "1",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def _keep(run: TrainedRun, folder: Path, merged: str) -> None:
    """What the gate and later legs need of this run, and the merged settings, beside the run itself."""
    write_file(folder / "component.json", merged.encode())
    tracking = Tracking(site().tracking.url)
    for file in (*_KEPT, "component.json"):
        tracking.upload_artifact(run.run_id, f"torchrelay/{file}", folder / file)
