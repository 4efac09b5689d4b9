"""`plan`: what a deploy-dev would run, and what it would change in serving."""

import json
import subprocess
from typing import Any

import click

from torchrelay.cli.deploy import snakemake_command, snakemake_environment
from torchrelay.config import component as component_settings
from torchrelay.config import read_json, root, settings, site
from torchrelay.console import result
from torchrelay.errors import TorchrelayError
from torchrelay.handover import ArchiveRecord
from torchrelay.legs.places import results

_WHOLE_CHAIN = "every leg that depends on the data"


@click.command()
@click.option("--component", help="Name of a folder under components/; default: the setting `component`.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def plan(component: str | None, as_json: bool) -> None:
    """Show what a deploy-dev would run and change; touches nothing."""
    name = component or settings().component
    component_settings(name)
    found = _planned(name)
    if as_json:
        result(json.dumps({"component": name, **found}, indent=2))
        return
    for part, text in found.items():
        result(f"{part:<12} {', '.join(text) or 'nothing to do' if isinstance(text, list) else text}")


def _planned(name: str) -> dict[str, Any]:
    """By part, in the order in which deploy-dev sees to them; `chain` is a list of rules."""
    from torchrelay import components, data

    built = components.environment_file(components.environment_name(name)).is_file()
    current = built and data.up_to_date(name)
    state = _survey()
    rules = _rules(name, lost=bool(state and _lost(name))) if current else [_WHOLE_CHAIN]
    return {
        "environment": "in place" if built else "would be built",
        "data": "in place" if current else "extract, validate, prepare would run where they changed",
        "chain": rules,
        "serving": _serving(name, rules, state),
        **_others(name, state),
    }


def _others(name: str, state: dict[str, Any] | None) -> dict[str, str]:
    """Wanted against running in the perimeters that an orchestrator converges; deploy-dev changes nothing there."""
    if state is None:
        return {}
    orchestrated = [one for one, place in site().perimeters.items() if place.orchestrator]
    return {one: _standing(state["perimeters"][one]["components"].get(name)) for one in orchestrated}


def _standing(found: dict[str, Any] | None) -> str:
    if found is None:
        return "nothing is asked for, and nothing runs: make promote"
    running = "; ".join(f"{node['name']} runs version {node['version'] or '-'}" for node in found["nodes"])
    parts = [f"version {found['wanted'] or '-'} wanted", running]
    if canary := found.get("canary"):
        parts.append(f"version {canary['version']} is coming in, at {canary['weight']} %")
    if refused := found.get("refused"):
        parts.append(f"version {refused['version']} was asked for and refused: {refused['reason']}")
    if not found["converged"] and not canary:
        parts.append("the orchestrator would bring it there")
    return "; ".join(parts)


def _survey() -> dict[str, Any] | None:
    """What runs now; None where the registry cannot be asked."""
    from torchrelay.cli.status import survey

    if not (settings().state / "site.json").is_file():
        return None
    state = survey(site())
    return state if state["tracking"]["healthy"] else None


def _lost(name: str) -> bool:
    from torchrelay.legs.register import lost

    return bool(lost(name))


def _rules(name: str, lost: bool) -> list[str]:
    """The rules that a dry run of Snakemake names."""
    done = subprocess.run(
        snakemake_command(name, "deploy_dev", "--dry-run", "--quiet", "host"),
        input="go\n",
        cwd=root(),
        env=snakemake_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise TorchrelayError(done.stderr.strip()[-2000:], "a DAG that Snakemake can read", "edit what is named above")
    found = [
        line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith(("rule ", "localrule "))
    ]
    rules = [rule for rule in dict.fromkeys(found) if rule != "deploy_dev"]
    return rules or (["register_model, and what follows: its version was deleted"] if lost else [])


def _serving(name: str, rules: list[str], state: dict[str, Any] | None) -> str:
    """What would become of the perimeter, in words."""
    if state is None:
        return "the site would be configured if need be, and started; then what the chain builds would be deployed"
    found = state["perimeters"]["dev"]["components"].get(name)
    if found is None:
        return "a first version would be deployed"
    running = "; ".join(f"{node['name']} runs version {node['version'] or '-'}" for node in found["nodes"])
    return f"{running}; {_change(name, rules, found)}"


def _change(name: str, rules: list[str], found: dict[str, Any]) -> str:
    record = results(name) / "archive.json"
    anew = any(rule.startswith((_WHOLE_CHAIN, "train_model", "register_model")) for rule in rules)
    if anew or not record.is_file():  # a package_archive that was cut short leaves none
        return "what the chain builds would replace it if the gate passes it"
    built = read_json(ArchiveRecord, record, "make deploy-dev").version
    asked = found.get("refused", {}).get("version") or found["wanted"]
    if asked != built:
        return f"@dev, now at version {asked}, would move to version {built}, which was built here"
    if rules:
        return f"version {built} would be deployed anew"
    return "nothing to do" if found["converged"] else "would be mended"
