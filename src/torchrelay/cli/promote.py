"""The operator's verbs: move the alias that asks for a version, then watch the perimeter's orchestrator follow."""

import sys
import time
from typing import TYPE_CHECKING

import click

from torchrelay.config import Perimeter, Site, settings, site
from torchrelay.config import component as component_settings
from torchrelay.console import leg, paint, result, say
from torchrelay.errors import ConfigError, RefusedError, ServingError

if TYPE_CHECKING:
    from torchrelay.delivery.store import State
    from torchrelay.tracking import ModelVersion, Tracking

_POLL_S = 0.2
_SAY_EVERY_S = 2.0

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
    from torchrelay.tracking import Tracking

    name = component or settings().component
    component_settings(name)
    here, place = site(), _place(site(), perimeter)
    tracking = Tracking(here.tracking.url)
    with leg("promote", f"{name} → {perimeter}"):
        wanted = _candidate(here, tracking, name, version)
        _insist_it_may_go(here, perimeter, wanted)
        tracking.set_alias(name, place.alias, wanted.version)
        _wake(place)
        say(f"  @{place.alias} → version {wanted.version}; the orchestrator takes it from here")
        _follow(here, perimeter, name, wanted.version, timeout)


@click.command()
@_component
@click.option("--to", "version", help="Version that served here before; default: the last one before what serves now.")
@_perimeter
@_wait
def rollback(component: str | None, version: str | None, perimeter: str, timeout: float) -> None:
    """Go back to a version that served healthy here; it is kept warm, so this takes seconds."""
    from torchrelay.delivery.store import store
    from torchrelay.tracking import Tracking

    name = component or settings().component
    here, place = site(), _place(site(), perimeter)
    target = _rollback_target(store(perimeter).state(name), perimeter, version)
    with leg("rollback", f"{name} in {perimeter} → version {target}"):
        Tracking(here.tracking.url).set_alias(name, place.alias, target)
        _wake(place)
        _follow(here, perimeter, name, target, timeout)


def _place(here: Site, name: str) -> Perimeter:
    """The perimeter; a ConfigError for one that is not there, or that no orchestrator converges."""
    found = here.perimeters.get(name)
    if found is None or found.orchestrator is None:
        others = [one for one, perimeter in here.perimeters.items() if perimeter.orchestrator]
        raise ConfigError(
            f"no orchestrator converges a perimeter {name!r}", f"one of: {', '.join(others)}", "make status"
        )
    return found


def _candidate(here: Site, tracking: "Tracking", name: str, version: str | None) -> "ModelVersion":
    """The version that is meant: by default what dev serves."""
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


def _insist_it_may_go(here: Site, perimeter: str, wanted: "ModelVersion") -> None:
    """What can be said before anything moves. The orchestrator decides again, by all that it sees."""
    from torchrelay.delivery.admission import refusal, refusal_error
    from torchrelay.delivery.converge import record_refusal
    from torchrelay.delivery.gatekeeper import Strict
    from torchrelay.delivery.store import store
    from torchrelay.lineage import TAG_DIGEST

    memory = store(perimeter)
    live = memory.state(wanted.name).live
    digest = wanted.tags.get(TAG_DIGEST, "")
    if live and (live.version, live.digest) == (wanted.version, digest):
        raise RefusedError(
            f"version {wanted.version} of {wanted.name} is live in {perimeter} already",
            "another version",
            f"make deploy-dev COMPONENT={wanted.name}, then make promote COMPONENT={wanted.name}",
        )
    reason = refusal(wanted)
    keeper = Strict(here, perimeter)
    decisions = [
        memory.admission(wanted.name, wanted.version, digest, key)
        for key in (keeper.policy(wanted), keeper.passing(wanted))
    ]
    earlier = next(filter(None, decisions), None)
    if reason is None and earlier is not None and not earlier.admitted:
        reason = f"{perimeter} refused it before: {earlier.reason}"
    if reason:
        record_refusal(here, perimeter, wanted, reason)
        raise refusal_error(wanted.name, wanted.version, reason)


def _rollback_target(state: "State", perimeter: str, version: str | None) -> str:
    """The version to go back to, from what this perimeter remembers to have served."""
    served = [one.wanted.version for one in state.served]
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


def _wake(place: Perimeter) -> None:
    """Spare the orchestrator its next poll. Nothing is lost when it does not hear: it polls."""
    import urllib3

    try:
        urllib3.request("POST", f"{place.orchestrator}/wake", timeout=2, retries=False)
    except urllib3.exceptions.HTTPError:
        say(f"  the orchestrator does not listen; it looks every {place.poll_s} s (make up starts it)")


def _follow(here: Site, perimeter: str, name: str, version: str, timeout: float) -> None:
    """Say how it goes until the version is live, or was turned down."""
    from torchrelay.delivery.store import store

    memory, end, shown = store(perimeter), time.monotonic() + timeout, _Shown()
    began = time.time()
    while time.monotonic() < end:
        state = memory.state(name)
        shown.show(state, version)
        if state.refused and state.refused.version == version:
            serves = f"version {state.live.version}, as before" if state.live else "nothing yet"
            report = f"open {state.refused.report}" if state.refused.report else "make history"
            raise RefusedError(
                f"{perimeter} turned version {version} down and serves {serves}: {state.refused.reason}",
                f"a version that {perimeter} admits",
                report,
            )
        if state.live and state.live.version == version and state.rollout is None:
            _done(here, perimeter, name, began)
            return
        time.sleep(_POLL_S)
    if timeout:
        raise ServingError(
            f"version {version} is not live in {perimeter} after {timeout:.0f} s; the roll-out goes on by itself",
            "an orchestrator that admits and converges",
            f"make status, and read {settings().state / 'logs' / f'{perimeter}-orchestrator.log'}",
        )


class _Shown:
    """What was said of a roll-out last, so that only news is said."""

    def __init__(self) -> None:
        self.stage: tuple[str, int] | None = None
        self.said = 0.0

    def show(self, state: "State", version: str) -> None:
        """One line at each stage, and every two seconds within it."""
        rollout = state.rollout
        if rollout is None or rollout.wanted.version != version:
            return
        stage = (rollout.wanted.version, rollout.stage)
        if not rollout.note:  # it has just begun
            return
        if stage == self.stage and time.monotonic() < self.said + _SAY_EVERY_S:
            return
        self.stage, self.said = stage, time.monotonic()
        say(f"  {_weight(rollout.stage, rollout.weights):<8} {_measured(rollout.figures)}{rollout.note}")


def _weight(stage: int, weights: tuple[int, ...]) -> str:
    if stage < 0:
        return "loading"
    if stage >= len(weights):
        return "100 %"
    return f"{weights[stage]} %" if weights[stage] else "shadow"


def _measured(figures: dict[str, float]) -> str:
    """Requests, error rate and p99 against the version in service, as far as they are known."""
    if not figures.get("requests"):
        return ""
    errors, theirs = figures.get("errors_rate", 0.0), figures.get("live_errors_rate", 0.0)
    parts = [f"{figures['requests']:.0f} requests", f"errors {errors:.1%} against {theirs:.1%}"]
    if "p99_ms" in figures:
        parts.append(f"p99 {figures['p99_ms']:.0f} ms against {figures.get('live_p99_ms', float('nan')):.0f}")
    return f"{', '.join(parts)}. "


def _done(here: Site, perimeter: str, name: str, began: float) -> None:
    """A real prediction through the gateway, where there is an input for one, and what serves now."""
    from torchrelay.delivery.store import store

    live = store(perimeter).state(name).live
    result(f"{paint(perimeter, 'bold')} serves {name} version {live.version if live else '-'}")
    result(f"  gateway      {here.perimeters[perimeter].gateway}/predictions/{name}")
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
    here, place = site(), _place(site(), perimeter)
    service = Orchestrator(here, perimeter, Aside(Strict(here, perimeter)), CanaryEvidence())
    on_signal(service)
    folder = settings().state / "perimeters" / perimeter
    port = int((place.orchestrator or "").rpartition(":")[2])
    with Receiver("127.0.0.1", port, settings().keys / perimeter, folder / "seen.db", service.wake):
        service.run()
