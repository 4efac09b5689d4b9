"""The verbs that Snakemake's rules and DVC's stages call; each also runs by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from torchrelay.config import read_json, write_json
from torchrelay.console import leg, log_to, paint, say
from torchrelay.legs.places import prepared

_Function = Callable[..., Any]


def _path(name: str, description: str) -> Callable[[_Function], _Function]:
    return click.option(f"--{name}", type=click.Path(path_type=Path), required=True, help=description)


_component = click.option("--component", required=True, help="Name of a folder under components/.")


def _begin_log(_context: click.Context, _option: click.Parameter, path: Path) -> Path:
    log_to(path)
    return path


def _log_option(*, exposed: bool) -> Callable[[_Function], _Function]:
    return click.option(
        "--log",
        type=click.Path(path_type=Path),
        required=True,
        callback=_begin_log,
        expose_value=exposed,
        help="File that all that is printed goes to as well.",
    )


_log = _log_option(exposed=False)
_log_of_child = _log_option(exposed=True)


@click.command()
@_component
@click.option("--stage", type=click.Choice(["extract", "validate", "prepare"]), required=True)
def run_stage(component: str, stage: Literal["extract", "validate", "prepare"]) -> None:
    """Run one data stage of a component in its own environment (what dvc.yaml calls)."""
    from torchrelay import components, data

    data.run_stage(component, stage, components.environment(component).python)


@click.command()
@_component
@_path("output", "The hand-over file data.json.")
@_log
def describe_data(component: str, output: Path) -> None:
    """Write down which version of the dataset DVC has in place."""
    from torchrelay import data

    write_json(output, data.version(component))


@click.command()
@click.option("--component", help="Name of a folder under components/; default: the setting `component`.")
@_log_of_child
def build_environment(component: str | None, log: Path) -> None:
    """Build the environment that a component trains and serves in, named by the hash of its lock."""
    from torchrelay import components
    from torchrelay.config import settings

    name = component or settings().component
    with leg("build_environment", components.environment_name(name)):
        components.build_environment(name, log)


@click.command()
@_component
@_path("data", "data.json of the dataset in place.")
@_path("output", "Folder for weights, golden set, evaluation and run.json.")
@_log_of_child
def train_model(component: str, data: Path, output: Path, log: Path) -> None:
    """Train by `mlflow run` in the component's own environment."""
    from torchrelay.handover import DataVersion
    from torchrelay.legs.train import train_model as train

    version = read_json(DataVersion, data, f"make deploy-dev COMPONENT={component}")
    with leg("train_model", f"{component} (log: {log})"):
        run = train(component, version, prepared(component), output, log)
        say(f"  run {run.run_id} on {run.device}: " + ", ".join(f"{k} {v:.4g}" for k, v in sorted(run.metrics.items())))


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


@click.command()
@_component
@_path("train", "What train-model left.")
@_path("output", "Folder for verdict.json and report.html.")
@_log
def gate_model(component: str, train: Path, output: Path) -> None:
    """Judge a trained run against the floor and against what is live in dev."""
    from torchrelay.legs.judge import gate_model as judge

    with leg("gate_model", component):
        verdict = judge(component, train, prepared(component) / "test.npz", output)
        colour = "green" if verdict.verdict == "pass" else "red"
        say(f"  {paint(verdict.verdict, colour)}: {verdict.metric} {_figure(verdict.candidate)}, floor {verdict.floor}")
        for reason in verdict.reasons:
            say(f"  {reason}")


@click.command()
@_component
@_path("data", "data.json")
@_path("train", "What train-model left.")
@_path("verdict", "verdict.json")
@_path("output", "registration.json")
@_log
def register_model(component: str, data: Path, train: Path, verdict: Path, output: Path) -> None:
    """Register the run as a model version, once, with its verdict and lineage."""
    from torchrelay.handover import DataVersion, Verdict
    from torchrelay.legs.register import register_model as register

    again = f"make deploy-dev COMPONENT={component}"
    with leg("register_model", component):
        found = register(
            component,
            train,
            read_json(Verdict, verdict, again),
            read_json(DataVersion, data, again),
            output,
        )
        say(f"  version {found.version}")


@click.command()
@_component
@_path("registration", "registration.json")
@_path("train", "What train-model left.")
@_path("output", "Folder for model.mar, manifest.json and model.sig.")
@_path("record", "archive.json")
@_log
def package_archive(component: str, registration: Path, train: Path, output: Path, record: Path) -> None:
    """Pack, sign and upload the archive of a version."""
    from torchrelay.handover import Registration
    from torchrelay.legs.register import package_archive as package

    found = read_json(Registration, registration, f"make deploy-dev COMPONENT={component}")
    with leg("package_archive", f"{component} version {found.version}"):
        say(f"  sha256 {package(component, found, train, output, record).digest}")


@click.command()
@_component
@_path("archive", "Folder of model.mar, manifest.json and model.sig.")
@_path("record", "archive.json")
@_path("output", "proof.json")
@_log
def prove_archive(component: str, archive: Path, record: Path, output: Path) -> None:
    """Check that the exact archive reproduces its golden outputs in its environment."""
    from torchrelay.handover import ArchiveRecord
    from torchrelay.legs.register import prove_archive as prove

    found = read_json(ArchiveRecord, record, f"make deploy-dev COMPONENT={component}")
    with leg("prove_archive", f"{component} version {found.version}"):
        proof = prove(component, found, archive, output)
        say(f"  {proof.samples} golden outputs, largest difference {proof.largest_difference:.2g}")


@click.command()
@_component
@_path("record", "archive.json")
@click.option("--perimeter", required=True, help="Name of a perimeter of this site.")
@_path("output", "The hand-over file deploy/<perimeter>.json.")
@_log
def deploy_model(component: str, record: Path, perimeter: str, output: Path) -> None:
    """Ask for a version in a perimeter and converge; a refused version moves no alias."""
    from torchrelay.handover import ArchiveRecord
    from torchrelay.legs.deploy import deploy_model as deploy

    found = read_json(ArchiveRecord, record, f"make deploy-dev COMPONENT={component}")
    with leg("deploy_model", f"{component} version {found.version} → {perimeter}"):
        deploy(component, found, perimeter, output)
