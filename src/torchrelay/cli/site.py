"""The verbs that set up, check, stop and empty this machine's site."""

import json
import shutil
import sys

import click

from torchrelay.config import Component, Settings, root, settings, site, write_file
from torchrelay.console import leg, paint, result, say
from torchrelay.errors import ConfigError


@click.command()
def up() -> None:
    """Start everything of this site and bring its nodes to what they were last asked to serve."""
    from torchrelay import nodes
    from torchrelay.serving import apply

    with leg("up", str(settings().state)):
        nodes.configure(settings().state / "logs" / "configure.log")
        nodes.start()
        for perimeter in site().perimeters.values():
            for node in perimeter.nodes:
                apply.apply(apply.node_config(node.folder))
    say("  next: make status")


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
