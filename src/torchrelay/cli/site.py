"""The verbs that set up, check, stop and empty this machine's site."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from torchrelay.config import Component, Node, Perimeter, Settings, root, settings, site, write_file
from torchrelay.console import leg, paint, result, say
from torchrelay.errors import ConfigError, TorchrelayError


@click.command()
def up() -> None:
    """Start everything of this site and bring its nodes to what they were last asked to serve."""
    from torchrelay import data, nodes

    with leg("up", str(settings().state)):
        nodes.configure(settings().state / "logs" / "configure.log")
        data.place_remote()
        nodes.start(wait=False)
        folders = [node.folder for perimeter in site().perimeters.values() for node in _used(perimeter)]
        # What lies on a node serves without the tracking server, which takes seconds to come up.
        missed = [folder for folder in folders if not _serves(folder)]
        nodes.start()
        for folder in missed:
            _apply_to(folder)
    say("  next: make status")


def _used(perimeter: Perimeter) -> Iterator[Node]:
    """Its nodes, the gateway's last; an orchestrator's perimeter starts when something is first asked of it."""
    for node in sorted(perimeter.nodes, key=lambda one: one.name == perimeter.gateway_node):
        if perimeter.orchestrator is None or (node.folder / "desired.json").is_file():
            yield node


def _apply_to(folder: Path) -> None:
    """Bring the node in this folder to what it was last asked to serve."""
    from torchrelay.serving import apply

    apply.apply(apply.node_config(folder))


def _serves(folder: Path) -> bool:
    try:
        _apply_to(folder)
    except TorchrelayError as error:
        say(f"  not yet: {error.found}")
        return False
    return True


@click.command()
def down() -> None:
    """Stop every process of this site; nothing that was stored is lost."""
    from torchrelay import nodes

    with leg("down", str(settings().state)):
        nodes.stop()


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Look for what would keep this machine from working, with a remedy for each finding."""
    from dataclasses import asdict

    from torchrelay.doctor import diagnose

    findings = diagnose()
    if as_json:
        result(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            result(f"{paint('✓', 'green') if finding.ok else paint('✗', 'red')} {finding.name}: {finding.found}")
            if not finding.ok:
                result(f"    remedy: {finding.remedy}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


@click.command()
@click.option("--confirm", default="", help="Must be yes.")
def clean(confirm: str) -> None:
    """Stop everything and delete the state folder, results, data and logs. Signing keys are kept."""
    from torchrelay import nodes

    doomed = [settings().state, *(root() / name for name in ("results", "data", "logs", "benchmarks", ".snakemake"))]
    doomed = [path for path in doomed if path.exists()]
    _insist_on_a_state_folder(settings().state)
    if confirm != "yes":
        raise ConfigError(
            f"this would delete {', '.join(str(path) for path in doomed) or 'nothing'}: registry, runs and all",
            "CONFIRM=yes",
            "make clean CONFIRM=yes",
        )
    nodes.stop()
    for path in doomed:
        say(f"  deleting {path}")
        shutil.rmtree(path)


def _insist_on_a_state_folder(folder: Path) -> None:
    """A folder that a setting names by mistake is not for us to delete."""
    ours = ("site.json", "site.lock", "configured.json")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in ours):
        raise ConfigError(
            f"{folder}, which the setting `state` names, holds nothing of a site",
            f"a folder with {', '.join(ours[:-1])} or {ours[-1]}",
            "set `state` in config/local.yaml (TORCHRELAY_STATE) to the site's own folder",
        )


@click.command()
@click.option("--name", required=True, help="A new name: lower case letters, digits and _.")
def new_component(name: str) -> None:
    """Write a new component from the template; its tests pass at once."""
    from torchrelay.scaffold import create

    folder = create(name)
    say(f"  wrote {folder.relative_to(root())}: read its README.md, then make deploy-dev COMPONENT={name}")


@click.command()
@click.option("--component", required=True, help="Name of a folder under components/.")
def export_conda(component: str) -> None:
    """Write the component's locked packages to its conda.yaml, for machines that Conda manages."""
    from torchrelay import components

    target = components.folder(component) / "conda.yaml"
    write_file(target, components.conda_environment(target.parent).encode())
    say(f"  wrote {target.relative_to(root())}")


@click.command()
@click.option("--schema", is_flag=True, help="Print the JSON schemas instead.")
def describe_config(schema: bool) -> None:
    """Print the merged settings, or the schemas of settings and component.yaml."""
    found = (
        {"settings": Settings.model_json_schema(), "component": Component.model_json_schema()}
        if schema
        else json.loads(settings().model_dump_json())
    )
    result(json.dumps(found, indent=2))
