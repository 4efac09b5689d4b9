"""The verbs that plan, make, verify and take away what a perimeter has at Google."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from torchrelay.config import Json, root
from torchrelay.console import leg, paint, result, say

if TYPE_CHECKING:
    from torchrelay.provision.plan import Step

_COLOURS = {"create": "green", "change": "yellow", "restart": "yellow", "replace": "red", "destroy": "red"}
_perimeter = click.option("--perimeter", required=True, help="Name of its inventory: dev or prod.")
_confirm = click.option("--confirm", default="", help="The perimeter's name once more.")
_production = click.option("--production", default="", help="yes: production, too.")


@click.command()
@_perimeter
def plan_provision(perimeter: str) -> None:
    """Say what provision would create, change or destroy, and what it costs an hour. Touches nothing."""
    from torchrelay.provision.perimeter import Perimeter
    from torchrelay.provision.plan import compare

    place = Perimeter(perimeter)
    with leg("plan_provision", perimeter):
        steps = compare(place.wanted, place.look())
    _show(place.wanted, steps)
    say(f"  next: make provision PERIMETER={perimeter}" if steps else "  next: make verify-gcp")


@click.command()
@_perimeter
@_confirm
@_production
def provision(perimeter: str, confirm: str, production: str) -> None:
    """Make a perimeter's network, bucket, accounts and machines at Google; run again, it changes what differs.

    What stops or destroys something that stands asks for --confirm with the perimeter's name, in production for
    --production yes as well.
    """
    from torchrelay.provision.perimeter import Perimeter, insist
    from torchrelay.provision.plan import compare

    place = Perimeter(perimeter)
    live = place.look()
    steps = compare(place.wanted, live)
    _show(place.wanted, steps)
    if hurts := [f"{step.action} {step.kind} {step.name} ({step.why})" for step in steps if step.interrupts]:
        insist(place, hurts, confirm, production, "provision")
    with leg("provision", f"{perimeter} (log: {place.log})"):
        place.provision(live)
    result(f"{paint(perimeter, 'bold')} stands as it is wanted")
    say(f"  next: make verify-gcp PERIMETER={perimeter}")


@click.command()
@_perimeter
@_confirm
@_production
def tear_down(perimeter: str, confirm: str, production: str) -> None:
    """Take away all that provision made. A bucket with something in it stays."""
    from torchrelay.provision.perimeter import Perimeter, insist, remind, standing

    place = Perimeter(perimeter)
    live = place.look()
    if there := standing(place.wanted, live):
        insist(place, there, confirm, production, "tear-down")
    with leg("tear_down", f"{perimeter} (log: {place.log})"):
        kept = place.tear_down(live)
    if kept:
        remind(kept)
    result(f"nothing of {paint(perimeter, 'bold')} stands{', but its bucket' if kept else ''}")


@click.command()
@_perimeter
def verify_gcp(perimeter: str) -> None:
    """Ask Google whether a perimeter's machines run, its firewall is shut and its bucket is kept. Changes nothing."""
    from torchrelay.provision.perimeter import Perimeter

    place = Perimeter(perimeter)
    with leg("verify_gcp", f"{perimeter} (log: {place.log})"):
        place.verify()
    result(f"{paint(perimeter, 'bold')} is what it should be, Google says")


def _show(wanted: Json, steps: "list[Step]") -> None:
    result(f"{paint(wanted['name'], 'bold')} in project {wanted['project']}, zone {wanted['zone']}")
    for step in steps:
        why = f"  {step.why}" if step.why else ""
        result(f"  {paint(f'{step.action:<8}', _COLOURS[step.action])} {step.kind:<14} {step.name}{why}")
    if not steps:
        result("  stands as it is wanted")
    _show_costs(wanted)


def _money(hour: float, incomplete: bool) -> str:
    return f"{hour:8.4f}{' + ?' if incomplete else ''}"


def _show_costs(wanted: Json) -> None:
    from torchrelay.provision.prices import costs, read_prices

    prices = read_prices(root() / "config" / "gcp-prices.yaml")
    found = costs(wanted, prices)
    result(
        f"an hour costs, in {prices.currency} (prices of {prices.date}, {prices.source}; no traffic, no stored data)"
    )
    for cost in found:
        unknown = f"  (price unknown: {', '.join(cost.unknown)})" if cost.unknown else ""
        result(f"  {cost.name:<32} {_money(cost.hour, bool(cost.unknown))}  {cost.what}{unknown}")
    incomplete = sum(1 for cost in found if cost.unknown)
    more = f"  (more than that: {incomplete} of them have unknown prices)" if incomplete else ""
    result(f"  {'all machines':<32} {_money(sum(cost.hour for cost in found), bool(incomplete))}{more}")
    if note := prices.age_note(datetime.now(UTC).date()):
        say(f"  {note}")
