"""`history` and `why`: what happened in a perimeter, and where an answer came from."""

import json
import time
from typing import Any

import click

from torchrelay.config import Site, site
from torchrelay.console import paint, result

_COLOURS = {"rollout": "green", "rollback": "yellow", "refusal": "red", "mend": "yellow", "withdrawal": "yellow"}


@click.command()
@click.option("--perimeter", default="production", show_default=True)
@click.option("--component", help="Only this one.")
@click.option("--limit", default=20, show_default=True, help="How many of the newest entries.")
@click.option("--json", "as_json", is_flag=True, help="Print the entries as JSON, newest first.")
def history(perimeter: str, component: str | None, limit: int, as_json: bool) -> None:
    """Show the ledger, newest first: when, what, from → to, verdict, duration, failed requests, who and why."""
    from torchrelay import ledger
    from torchrelay.tracking import Tracking

    here = site()
    _known(here, perimeter)
    found = [
        one
        for one in ledger.history(Tracking(here.tracking.url), perimeter, limit)
        if component in (None, one.entry.component)
    ]
    if as_json:
        result(json.dumps([{"url": one.url, **one.entry.model_dump()} for one in found], indent=2))
        return
    for one in found:
        result(_line(one.entry))
    if not found:
        result(f"nothing has happened in {perimeter} yet: make promote")


def _line(entry: Any) -> str:
    when = time.strftime("%F %T", time.localtime(entry.started))
    move = f"{entry.from_version or '-'} → {entry.to_version or '-'}"
    failed = "not counted" if entry.failed_requests is None else f"{entry.failed_requests} failed"
    kind = paint(f"{entry.kind:<10}", _COLOURS[entry.kind])
    return (
        f"{when}  {kind} {entry.component} {move:<9} {entry.verdict:<6} {entry.duration_s:6.1f} s  {failed:<11}  "
        f"{entry.who}: {entry.why}"
    )


@click.command()
@click.option("--id", "request_id", required=True, help="The x-request-id of an answer.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def why(request_id: str, as_json: bool) -> None:
    """Walk from an answer back to its archive, run, parameters, data and commit."""
    from torchrelay.delivery.tracing import trace

    found = trace(site(), request_id)
    if as_json:
        result(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        result(f"{name:<12} {value if isinstance(value, str) else json.dumps(value)}")


def _known(here: Site, perimeter: str) -> None:
    from torchrelay.errors import ConfigError

    if perimeter not in here.perimeters:
        raise ConfigError(
            f"there is no perimeter {perimeter!r}", f"one of: {', '.join(here.perimeters)}", "make status"
        )
