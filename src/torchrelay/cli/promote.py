"""The operator's verbs: move the alias that asks for a version, then watch the perimeter's orchestrator follow."""

import sys
import time
from typing import TYPE_CHECKING

import click

from torchrelay.config import Site, settings, site
from torchrelay.config import component as component_settings
from torchrelay.console import leg, paint, result
from torchrelay.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from torchrelay.delivery.store import State
    from torchrelay.tracking import ModelVersion

_component = click.option("--component", help="Name of a folder under components/; default: the setting `component`.")
_perimeter = click.option("--perimeter", default="production", show_default=True, help="Where the version goes.")
_wait = click.option("--timeout", default=1800.0, show_default=True, help="Seconds to follow the roll-out; 0: do not.")


@click.command()
@_component
@click.option("--version", help="Of the registered model; default: what dev serves.")
@_perimeter
@_wait
def promote(component: str | None, version: str | None, perimeter: str, timeout: float) -> None:
    """Ask for a version in production and follow its roll-out; what may not go live changes nothing."""
    from torchrelay.delivery.request import deploy

    name = component or settings().component
    component_settings(name)
    here = site()
    _insist_on_an_orchestrator(here, perimeter)
    with leg("promote", f"{name} → {perimeter}"):
        wanted = _candidate(here, name, version)
        _insist_it_is_news(perimeter, wanted)
        began = time.time()
        deploy(here, perimeter, wanted, why="make promote", timeout_s=timeout)
        if timeout:
            _done(here, perimeter, wanted, began)


@click.command()
@_component
@click.option(
    "--to",
    "version",
    help="Version that served here before; default: the last one before what serves now or, while another one rolls "
    "out, what serves now.",
)
@_perimeter
@_wait
def rollback(component: str | None, version: str | None, perimeter: str, timeout: float) -> None:
    """Go back to a version that served healthy here; it is kept warm, so this takes seconds."""
    from torchrelay.delivery.request import deploy
    from torchrelay.delivery.store import store

    name = component or settings().component
    here = site()
    _insist_on_an_orchestrator(here, perimeter)
    state = store(perimeter).state(name)
    target = _rollback_target(state, perimeter, version, underway=_underway(here, perimeter, state))
    with leg("rollback", f"{name} in {perimeter} → version {target}"):
        wanted = _candidate(here, name, target)
        began = time.time()
        deploy(here, perimeter, wanted, why="make rollback", timeout_s=timeout)
        if timeout:
            _done(here, perimeter, wanted, began)


def _insist_on_an_orchestrator(here: Site, name: str) -> None:
    """ConfigError for a perimeter that is not there, or that no orchestrator converges."""
    found = here.perimeters.get(name)
    if found is None or found.orchestrator is None:
        others = [one for one, perimeter in here.perimeters.items() if perimeter.orchestrator]
        raise ConfigError(
            f"no orchestrator converges a perimeter {name!r}", f"one of: {', '.join(others)}", "make status"
        )


def _candidate(here: Site, name: str, version: str | None) -> "ModelVersion":
    """The version that is meant: by default what dev serves."""
    from torchrelay.tracking import Tracking

    tracking = Tracking(here.tracking.url)
    if version is None:
        from torchrelay.delivery.telling import live_alias

        found = tracking.alias(name, live_alias(here.perimeters["dev"]))
        expected = "a version that dev serves"
    else:
        found = tracking.version(name, version)
        expected = "a registered version"
    if found is None:
        what = f"{name} has no version {version}" if version else f"dev serves no {name}"
        raise RefusedError(what, expected, f"make deploy-dev COMPONENT={name}")
    return found


def _insist_it_is_news(perimeter: str, wanted: "ModelVersion") -> None:
    from torchrelay.delivery.store import store
    from torchrelay.lineage import TAG_DIGEST

    live = store(perimeter).state(wanted.name).live
    if live and (live.version, live.digest) == (wanted.version, wanted.tags.get(TAG_DIGEST)):
        raise RefusedError(
            f"version {wanted.version} of {wanted.name} is live in {perimeter} already",
            "another version",
            f"make deploy-dev COMPONENT={wanted.name}, then make promote COMPONENT={wanted.name}",
        )


def _underway(here: Site, perimeter: str, state: "State") -> bool:
    """Whether another version than the one in service is asked for, or on its way."""
    from torchrelay.tracking import Tracking

    if state.live is None:
        return False
    asked = Tracking(here.tracking.url).aliases(state.component).get(here.perimeters[perimeter].alias)
    return state.rollout is not None or asked not in (None, state.live.version)


def _rollback_target(state: "State", perimeter: str, version: str | None, *, underway: bool) -> str:
    """The version to go back to, from what this perimeter remembers to have served.

    While a roll-out is under way that is the version in service: the roll-out ends, and no caller notices.
    """
    served = [one.wanted.version for one in state.served]
    if state.live and underway:
        served.append(state.live.version)
    if not served:
        raise RefusedError(
            f"nothing served {state.component} in {perimeter} before what serves now",
            "a version that served healthy here earlier",
            "make history",
        )
    target = version or served[-1]
    if target not in served:
        raise RefusedError(
            f"version {target} is none that served in {perimeter} before what serves now",
            f"one of: {', '.join(served)}",
            f"make rollback TO={served[-1]}",
        )
    return target


def _done(here: Site, perimeter: str, wanted: "ModelVersion", began: float) -> None:
    result(f"{paint(perimeter, 'bold')} serves {wanted.name} version {wanted.version}")
    result(f"  gateway      {here.perimeters[perimeter].gateway}/predictions/{wanted.name}")
    if public := here.perimeters[perimeter].public:
        result(f"  public       {public}/predictions/{wanted.name}")
    result(f"  took         {time.time() - began:.1f} s")
    result("next: make status · make history · make rollback")


@click.command()
@click.option("--perimeter", default="production", show_default=True)
def orchestrate(perimeter: str) -> None:
    """Converge a perimeter for ever: at every poll, and whenever a webhook wakes it (what the service runs)."""
    import logging

    from torchrelay.delivery.evidence import CanaryEvidence
    from torchrelay.delivery.gatekeeper import Aside, Strict
    from torchrelay.delivery.orchestrator import Orchestrator, on_signal
    from torchrelay.delivery.webhook import Receiver

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    here = site()
    _insist_on_an_orchestrator(here, perimeter)
    service = Orchestrator(here, perimeter, Aside(Strict(here, perimeter)), CanaryEvidence())
    on_signal(service)
    folder = settings().state / "perimeters" / perimeter
    port = int((here.perimeters[perimeter].orchestrator or "").rpartition(":")[2])
    with Receiver("127.0.0.1", port, settings().keys / perimeter, folder / "seen.db", service.wake):
        service.run()
