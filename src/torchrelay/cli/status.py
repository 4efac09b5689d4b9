"""`torchrelay status`: what runs where, asked of the machines themselves."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from torchrelay.config import Perimeter, Site, site
from torchrelay.console import paint, result

if TYPE_CHECKING:
    from torchrelay.delivery.store import State
    from torchrelay.handover import NodeReport
    from torchrelay.tracking import ModelVersion, Tracking


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON; the form is a stable interface.")
def status(as_json: bool) -> None:
    """Show what is asked for and what really runs, in every perimeter."""
    found = survey(site())
    result(json.dumps(found, indent=2) if as_json else _text(found))


def survey(here: Site) -> dict[str, Any]:
    """The state of the site: `{"tracking": …, "perimeters": {name: {"gateway", "public", "components"}}}`."""
    from torchrelay.tracking import Tracking

    tracking = Tracking(here.tracking.url)
    healthy = tracking.healthy()
    return {
        "tracking": {"url": here.tracking.url, "public": here.tracking.public, "healthy": healthy},
        "perimeters": {
            name: _perimeter(name, perimeter, tracking if healthy else None)
            for name, perimeter in here.perimeters.items()
        },
    }


def _perimeter(name: str, perimeter: Perimeter, tracking: "Tracking | None") -> dict[str, Any]:
    from torchrelay.delivery.store import store

    reports = _reports(perimeter)
    states = store(name).states()
    asked = _asked(tracking, perimeter) if tracking else {}
    held = {one.component for report in reports.values() for one in report.held}
    names = {*asked, *held, *(state.component for state in states.values() if state.live or state.rollout)}
    return {
        "gateway": perimeter.gateway,
        "public": perimeter.public,
        "components": {
            one: _component(perimeter, one, states.get(one), asked.get(one), reports, known=tracking is not None)
            for one in sorted(names)
        },
    }


def _reports(perimeter: Perimeter) -> dict[str, "NodeReport"]:
    """What each node says now; one that does not answer is not among them."""
    from torchrelay.delivery import reach
    from torchrelay.errors import TorchrelayError

    found = {}
    for node in perimeter.nodes:
        with suppress(TorchrelayError):
            found[node.name] = reach.observe_on(node)
    return found


def _asked(tracking: "Tracking", perimeter: Perimeter) -> dict[str, "ModelVersion | None"]:
    """The version that is asked for, by component."""
    return {
        name: tracking.version(name, aliases[perimeter.alias])
        for name, aliases in tracking.models().items()
        if perimeter.alias in aliases
    }


def _component(
    perimeter: Perimeter,
    name: str,
    state: "State | None",
    asked: "ModelVersion | None",
    reports: Mapping[str, "NodeReport"],
    *,
    known: bool,
) -> dict[str, Any]:
    from torchrelay.delivery.sight import serves

    live = state.live.version if state and state.live else None
    refused = state.refused if state and asked and state.refused and state.refused.version == asked.version else None
    kept = live if perimeter.keeps_last or refused else None
    wanted = asked.version if asked and not refused else kept
    found: dict[str, Any] = {
        "wanted": wanted,
        "converged": (wanted == live and serves(perimeter, reports, name, wanted)) if known else None,
        "nodes": [_node(node.name, reports, perimeter, name) for node in perimeter.nodes if node.holds],
    }
    if refused:
        found["refused"] = {"version": refused.version, "reason": refused.reason}
    if state and state.rollout:
        found["canary"] = _canary(state)
    if state and state.trouble:
        found["trouble"] = state.trouble
    return found


def _canary(state: "State") -> dict[str, Any]:
    rollout = state.rollout
    if rollout is None:
        return {}
    stages = rollout.weights
    weight = 100 if rollout.stage >= len(stages) else 0 if rollout.stage < 0 else stages[rollout.stage]
    return {
        "version": rollout.wanted.version,
        "weight": weight,
        "since": rollout.since,
        "note": rollout.note,
        "figures": rollout.figures,
    }


def _node(name: str, reports: Mapping[str, "NodeReport"], perimeter: Perimeter, component: str) -> dict[str, Any]:
    """What the node answers with: of what it holds, the version that the gateway sends most requests to."""
    report, gateway = reports.get(name), reports.get(perimeter.gateway_node)
    held = {one.version: one for one in (report.held if report else ()) if one.component == component}
    shares = [one for one in (gateway.routed or () if gateway else ()) if one.component == component]
    routed = [one for one in sorted(shares, key=lambda one: -one.weight) if one.weight and one.version in held]
    found = held[routed[0].version] if routed else None
    answers = bool(found and found.healthy and gateway and gateway.gateway_healthy)
    return {
        "name": name,
        "version": found.version if found else None,
        "digest": found.digest if found else None,
        "healthy": answers,
        "holds": sorted(held, key=lambda version: (len(version), version)),
    }


def _text(found: dict[str, Any]) -> str:
    tracking = found["tracking"]
    lines = [f"tracking   {tracking['url']}  {_health(tracking['healthy'])}"]
    lines.extend(_public(tracking["public"], ", with a client certificate"))
    for name, perimeter in found["perimeters"].items():
        lines.append(f"{name:<10} {perimeter['gateway']}")
        lines.extend(_public(perimeter["public"]))
        for component, state in perimeter["components"].items():
            lines.extend(_component_lines(component, state))
        if not perimeter["components"]:
            command = "make deploy-dev" if name == "dev" else "make promote"
            lines.append(f"  nothing is deployed yet: {command}")
    return "\n".join(lines)


def _public(url: str | None, how: str = "") -> list[str]:
    return [f"{'':<10} {url}  from other machines{how}"] if url else []


def _component_lines(component: str, state: dict[str, Any]) -> list[str]:
    converged = {True: paint("converged", "green"), False: paint("not converged", "red"), None: "registry unreachable"}
    lines = [f"  {component}: version {state['wanted'] or '-'} wanted, {converged[state['converged']]}"]
    for node in state["nodes"]:
        digest = (node["digest"] or "")[:12]
        others = [version for version in node["holds"] if version != node["version"]]
        also = f", also holds {', '.join(others)}" if others else ""
        lines.append(f"    {node['name']}: version {node['version'] or '-'} {digest} {_health(node['healthy'])}{also}")
    if canary := state.get("canary"):
        stays = f"for {time.time() - canary['since']:.0f} s: {canary['note'] or 'under way'}"
        lines.append(f"    {paint('canary', 'yellow')}: version {canary['version']} at {canary['weight']} %, {stays}")
    if trouble := state.get("trouble"):
        lines.append(f"    {paint('waiting', 'yellow')}: {trouble}")
    if refused := state.get("refused"):
        lines.append(f"    {paint('refused', 'red')}: version {refused['version']}: {refused['reason']}")
    return lines


def _health(healthy: bool) -> str:
    return paint("healthy", "green") if healthy else paint("not healthy", "red")
