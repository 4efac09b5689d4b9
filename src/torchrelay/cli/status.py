"""`torchrelay status`: what runs where, asked of the machines themselves."""

import json
from typing import Any

import click

from torchrelay.config import Perimeter, Site, site
from torchrelay.console import paint, result


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON; the form is a stable interface.")
def status(as_json: bool) -> None:
    """Show what is asked for and what really runs, in every perimeter."""
    found = survey(site())
    result(json.dumps(found, indent=2) if as_json else _text(found))


def survey(here: Site) -> dict[str, Any]:
    """The state of the site: `{"tracking": …, "perimeters": {name: {"gateway", "components"}}}`."""
    from torchrelay.tracking import Tracking

    tracking = Tracking(here.tracking.url)
    healthy = tracking.healthy()
    return {
        "tracking": {"url": here.tracking.url, "healthy": healthy},
        "perimeters": {
            name: _perimeter(perimeter, tracking if healthy else None) for name, perimeter in here.perimeters.items()
        },
    }


def _perimeter(perimeter: Perimeter, tracking: Any) -> dict[str, Any]:
    from torchrelay.delivery.converge import claims
    from torchrelay.delivery.plan import decide, serves
    from torchrelay.serving.apply import node_config, observe

    reports = [observe(node_config(node.folder)) for node in perimeter.nodes]
    decisions = {claim.component: decide(claim) for claim in claims(tracking, perimeter)} if tracking else {}
    names = sorted({*decisions, *(served.component for report in reports for served in report.served)})
    components: dict[str, dict[str, Any]] = {}
    for name in names:
        decision = decisions.get(name)
        served = {report.node: next((s for s in report.served if s.component == name), None) for report in reports}
        wanted = decision.wanted if decision else None
        components[name] = {
            "wanted": wanted.version if wanted else None,
            "converged": all(serves(wanted, one) for one in served.values()) if tracking else None,
            "nodes": [
                {
                    "name": node,
                    "version": one.version if one else None,
                    "digest": one.digest if one else None,
                    "healthy": bool(one and one.healthy),
                }
                for node, one in served.items()
            ],
        }
        if decision and decision.refused:
            components[name]["refused"] = {"version": decision.refused.version, "reason": decision.refusal}
    return {"gateway": perimeter.gateway, "components": components}


def _text(found: dict[str, Any]) -> str:
    tracking = found["tracking"]
    lines = [f"tracking   {tracking['url']}  {_health(tracking['healthy'])}"]
    for name, perimeter in found["perimeters"].items():
        lines.append(f"{name:<10} {perimeter['gateway']}")
        for component, state in perimeter["components"].items():
            lines.extend(_component_lines(component, state))
        if not perimeter["components"]:
            lines.append("  nothing is deployed yet: make deploy-dev")
    return "\n".join(lines)


def _component_lines(component: str, state: dict[str, Any]) -> list[str]:
    converged = {True: paint("converged", "green"), False: paint("not converged", "red"), None: "registry unreachable"}
    lines = [f"  {component}: version {state['wanted'] or '-'} wanted, {converged[state['converged']]}"]
    for node in state["nodes"]:
        digest = (node["digest"] or "")[:12]
        lines.append(f"    {node['name']}: version {node['version'] or '-'} {digest} {_health(node['healthy'])}")
    if refused := state.get("refused"):
        lines.append(f"    {paint('refused', 'red')}: version {refused['version']}: {refused['reason']}")
    return lines


def _health(healthy: bool) -> str:
    return paint("healthy", "green") if healthy else paint("not healthy", "red")
