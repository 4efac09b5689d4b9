"""Ask a perimeter for a version, or for none, and follow it there: the one road of everybody who asks.

An alias is all that is moved here. Where an orchestrator converges the perimeter it is only woken and watched;
elsewhere the perimeter is converged in this process.
"""

import time
from collections.abc import Callable

from torchrelay.config import Perimeter, Site, settings
from torchrelay.console import paint, say
from torchrelay.delivery.admission import Gatekeeper, Trusting, refusal, refusal_error
from torchrelay.delivery.canary import measured
from torchrelay.delivery.converge import Outcome, converge, record_refusal
from torchrelay.delivery.sight import serves
from torchrelay.delivery.store import Admission, State, store
from torchrelay.errors import RefusedError, ServingError, TrackingError
from torchrelay.lineage import TAG_DIGEST
from torchrelay.tracking import ModelVersion, Tracking

PATIENCE_S = 1800.0
_POLL_S = 0.2
_SAY_EVERY_S = 2.0


def deploy(here: Site, perimeter: str, wanted: ModelVersion, *, why: str, timeout_s: float = PATIENCE_S) -> None:
    """Ask for `wanted` in the perimeter and return once it is live there; with a timeout of 0, once it is asked for.

    Raises RefusedError for a version that may not be served there: before anything moved, if that can be known, or
    once the perimeter has turned it down. ServingError if it is not live in time; the roll-out goes on by itself.
    """
    place, name = here.perimeters[perimeter], wanted.name
    insist_it_may_go(here, perimeter, wanted)
    before = store(perimeter).state(name)
    Tracking(here.tracking.url).set_alias(name, place.alias, wanted.version)
    if place.orchestrator is None:
        _converge(here, perimeter, name, wanted.version, why)
        return
    wake(place)
    say(f"  @{place.alias} → version {wanted.version}; the orchestrator takes it from here")
    follow(here, perimeter, wanted, timeout_s, before.refused)


def withdraw(here: Site, perimeter: str, name: str, *, why: str, timeout_s: float = PATIENCE_S) -> None:
    """Ask for nothing of this component, and return once nothing of it is live; no error where nothing is.

    Raises RefusedError where a deleted alias takes nothing out of service.
    """
    place, tracking = here.perimeters[perimeter], Tracking(here.tracking.url)
    live = store(perimeter).state(name).live
    if live and place.keeps_last:
        raise RefusedError(
            f"{perimeter} serves {name} version {live.version}, and goes on with it when @{place.alias} is deleted: "
            "a lost alias must never take it out of service",
            "another version to serve in its place",
            f"make rollback COMPONENT={name}, make promote COMPONENT={name} VERSION=…, or make down",
        )
    if place.alias in tracking.aliases(name):
        tracking.delete_alias(name, place.alias)
    if place.orchestrator is None:
        _converge(here, perimeter, name, None, why)
    elif live:
        wake(place)
        _await(here, perimeter, timeout_s, lambda state: state.live is None, name)


def insist_it_may_go(here: Site, perimeter: str, wanted: ModelVersion) -> None:
    """Say what can be said before anything moves. Whoever converges the perimeter decides again, by all that it sees.

    Raises RefusedError, which is in the ledger then.
    """
    if _served(store(perimeter).state(wanted.name), wanted):
        return  # whatever its tags say by now
    reason = refusal(wanted) or _refused_before(here, perimeter, wanted)
    if reason:
        record_refusal(here, perimeter, wanted, reason)
        raise refusal_error(wanted.name, wanted.version, reason)


def _served(state: State, wanted: ModelVersion) -> bool:
    """Whether it serves here, or did, in good health: then no other decision is asked for."""
    known = [one.wanted for one in state.served] + ([state.live] if state.live else [])
    return any((one.version, one.digest) == _release(wanted) for one in known)


def _refused_before(here: Site, perimeter: str, wanted: ModelVersion) -> str | None:
    """Why an orchestrator's perimeter turned it down. Elsewhere whoever asks is there to ask again, and may."""
    keeper = _gatekeeper(here, perimeter)
    version, digest = _release(wanted)
    if here.perimeters[perimeter].orchestrator is None:
        store(perimeter).forget_refusal(wanted.name, version, digest)
        return None
    for policy in (keeper.policy(wanted), keeper.passing(wanted)):
        earlier = store(perimeter).admission(wanted.name, version, digest, policy)
        if earlier and not earlier.admitted:
            return f"{perimeter} refused it before: {earlier.reason}"
    return None


def _gatekeeper(here: Site, perimeter: str) -> Gatekeeper:
    if here.perimeters[perimeter].orchestrator is None:
        return Trusting()
    from torchrelay.delivery.gatekeeper import Strict

    return Strict(here, perimeter)


def _release(wanted: ModelVersion) -> tuple[str, str]:
    return wanted.version, wanted.tags.get(TAG_DIGEST, "")


def _converge(here: Site, perimeter: str, name: str, version: str | None, why: str) -> None:
    outcome = converge(here, perimeter, why=why, component=name)
    tell_of_others(outcome)
    if error := outcome.refusal(name):
        raise error
    if not serves(here.perimeters[perimeter], {one.node: one for one in outcome.reports}, name, version):
        raise ServingError(
            f"{perimeter} does not serve {f'{name} version {version}' if version else f'nothing of {name}'}",
            "what the registry asks for, on every node and in good health",
            "make status",
        )


def tell_of_others(outcome: Outcome) -> None:
    """Name the components that are in trouble, beside the one that was asked for, which is not."""
    for other, errors in outcome.blamed.items():
        say(f"  {paint('beside this', 'yellow')}, {other} is in trouble: {errors[0].found}")


def wake(place: Perimeter) -> None:
    """Spare the orchestrator its next poll. Nothing is lost when it does not hear: it polls."""
    import urllib3

    try:
        urllib3.request("POST", f"{place.orchestrator}/wake", timeout=2, retries=False)
    except urllib3.exceptions.HTTPError:
        say(f"  the orchestrator does not listen; it looks every {place.poll_s} s (make up starts it)")


def follow(here: Site, perimeter: str, wanted: ModelVersion, timeout_s: float, stale: Admission | None = None) -> None:
    """Say how the roll-out goes until the version is live; RefusedError when it was turned down.

    `stale` is the refusal that stood there before the request: it counts only when the orchestrator, having had the
    time to look again, has not taken it back.
    """
    shown, looked = Progress(), time.monotonic() + here.perimeters[perimeter].poll_s
    asked = _Asked(here, perimeter, wanted)

    def there(state: State) -> bool:
        shown.show(state, wanted.version)
        refused = state.refused
        meant = refused and (refused.version, refused.digest) == _release(wanted)
        if refused and meant and (refused != stale or time.monotonic() > looked):
            raise _turned_down(perimeter, state, refused)
        live = state.live
        if live and state.rollout is None and live.version == wanted.version:
            shown.passed(state.rested)
        if live and (live.version, live.digest) == _release(wanted) and state.rollout is None:
            return True
        asked.insist()
        return False

    _await(here, perimeter, timeout_s, there, wanted.name)


class _Asked:
    """Whether the alias still asks for the version, looked up now and then; who does not answer says nothing."""

    def __init__(self, here: Site, perimeter: str, wanted: ModelVersion) -> None:
        self._tracking = Tracking(here.tracking.url)
        self._perimeter, self._alias, self._wanted = perimeter, here.perimeters[perimeter].alias, wanted
        self._next = time.monotonic() + _SAY_EVERY_S

    def insist(self) -> None:
        """RefusedError once something else is asked for: this version does not come in any more."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SAY_EVERY_S
        try:
            now = self._tracking.aliases(self._wanted.name).get(self._alias)
        except TrackingError:
            return
        if now != self._wanted.version:
            raise RefusedError(
                f"somebody asked {self._perimeter} for {f'version {now}' if now else 'nothing'} of {self._wanted.name} "
                f"instead of version {self._wanted.version}",
                f"@{self._alias} to stay on version {self._wanted.version} until it is live",
                "make status, then make promote again",
            )


def _turned_down(perimeter: str, state: State, refused: Admission) -> RefusedError:
    serves = f"version {state.live.version}, as before" if state.live else "nothing yet"
    return RefusedError(
        f"{perimeter} turned version {refused.version} down and serves {serves}: {refused.reason}",
        f"a version that {perimeter} admits",
        f"open {refused.report}" if refused.report else "make history",
    )


def _await(here: Site, perimeter: str, timeout_s: float, there: Callable[[State], bool], name: str) -> None:
    memory, end = store(perimeter), time.monotonic() + timeout_s
    while time.monotonic() < end:
        if there(memory.state(name)):
            return
        time.sleep(_POLL_S)
    if timeout_s:
        asked = Tracking(here.tracking.url).aliases(name).get(here.perimeters[perimeter].alias)
        raise ServingError(
            f"{perimeter} does not serve {name} version {asked or 'nothing'} after {timeout_s:.0f} s; "
            "the roll-out goes on by itself",
            "an orchestrator that admits and converges",
            f"make status, and read {settings().state / 'logs' / f'{perimeter}-orchestrator.log'}",
        )


class Progress:
    """What was said of a roll-out last, so that only news is said."""

    def __init__(self) -> None:
        self._stage: int | None = None
        self._said = 0.0
        self._passed = ""
        self._trouble = ""

    def show(self, state: State, version: str) -> None:
        """What each stage rested on as it is passed, a line at each new stage, and every two seconds within it."""
        if state.trouble != self._trouble:
            self._trouble = state.trouble
            if state.trouble:
                say(f"  {paint('waiting', 'yellow')}  {state.trouble}")
        rollout = state.rollout
        if rollout is None or rollout.wanted.version != version:
            return
        self.passed(rollout.passed)
        if not rollout.note:  # the stage has just begun
            return
        if rollout.stage == self._stage and time.monotonic() < self._said + _SAY_EVERY_S:
            return
        self._stage, self._said = rollout.stage, time.monotonic()
        say(f"  {_weight(rollout.stage, rollout.weights):<8} {measured(rollout.figures)}{rollout.note}")

    def passed(self, text: str) -> None:
        """Say which stages were passed, and on what, as far as that is news."""
        for line in text.removeprefix(self._passed).splitlines():
            if line:
                say(f"  {paint('✓', 'green')} {line}")
        self._passed = text


def _weight(stage: int, weights: tuple[int, ...]) -> str:
    if stage < 0:
        return "loading"
    if stage >= len(weights):
        return "100 %"
    return f"{weights[stage]} %" if weights[stage] else "shadow"
