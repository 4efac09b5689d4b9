"""The verbs of serving: apply on a node, converge of a perimeter, and one prediction by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from torchrelay.config import site
from torchrelay.console import leg, result, say
from torchrelay.errors import TorchrelayError


@click.command()
@click.option("--node", "folder", type=click.Path(path_type=Path), required=True, help="The node's own folder.")
def agent(folder: Path) -> None:
    """Answer a control node's calls on this serving node, until standard input ends; SSH starts it."""
    from torchrelay.serving.agent import main

    main(folder)


@click.command()
@click.option("--node", "folder", type=click.Path(path_type=Path), required=True, help="The node's own folder.")
@click.option("--desired", help="File of the desired state, or - for standard input; default: the last one asked for.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--every", type=float, metavar="SECONDS", help="Keep the node at what it was last asked for; never ends.")
def apply(folder: Path, desired: str | None, as_json: bool, every: float | None) -> None:
    """Bring this serving node to its desired state and report what it serves."""
    from torchrelay.serving import apply as node_apply

    if every is not None:
        node_apply.keep(folder, every)
    node = node_apply.node_config(folder)
    error: TorchrelayError | None = None
    try:
        report = node_apply.apply(node, _desired(desired))
    except node_apply.ApplyError as fault:
        report, error = fault.report, fault
    if as_json:
        parts = {"found": error.found, "expected": error.expected, "next": error.next_command} if error else None
        result(json.dumps({"report": report.model_dump(), "error": parts}))
    else:
        for held in report.held:
            say(f"  {held.component} version {held.version} {'healthy' if held.healthy else 'NOT HEALTHY'}")
    if error:
        raise error


def _desired(source: str | None) -> Any:
    from torchrelay.handover import Desired

    if source is None:
        return None
    text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    return Desired.model_validate_json(text)


@click.command()
@click.option("--perimeter", default="dev", show_default=True, help="Name of a perimeter of this site.")
@click.option("--json", "as_json", is_flag=True, help="Print what each node serves, and what was refused, as JSON.")
def converge(perimeter: str, as_json: bool) -> None:
    """Bring a perimeter to what the registry asks for; harmless when it is there already."""
    from torchrelay.delivery.converge import converge as close

    with leg("converge", perimeter):
        outcome = close(site(), perimeter, why="torchrelay converge")
        for name in outcome.changed:
            say(f"  {name} was brought to what the registry asks for")
    if as_json:
        refusals = {name: refused.reason for name, refused in outcome.refused.items()}
        nodes = [report.model_dump() for report in outcome.reports]
        result(json.dumps({"perimeter": perimeter, "nodes": nodes, "refused": refusals}, indent=2))
    for name in outcome.refused:
        if error := outcome.refusal(name):
            raise error


@click.command()
@click.option("--component", required=True, help="Name of a deployed component.")
@click.option("--perimeter", default="dev", show_default=True)
@click.option(
    "--file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON, PNG or JPEG; default: a golden input.",
)
def predict(component: str, perimeter: str, file: Path | None) -> None:
    """Send one request through a perimeter's gateway and print the answer with its headers."""
    from torchrelay.serving.client import first_golden, send

    body = file.read_bytes() if file else first_golden(component)
    answer = send(site().perimeters[perimeter].gateway, component, body)
    result(json.dumps({"status": answer.status, "headers": answer.headers, "body": answer.body}, indent=2))
    if answer.status != 200:
        sys.exit(1)
