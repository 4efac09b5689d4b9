"""Close the difference between what the registry asks for and what a perimeter's nodes really run.

Level-triggered: before every step it looks again, at the alias, the nodes and the gateway, and asks the pure core
(`plan.next_step`) what to do now. Every intention is on the disk before it is carried out and every step may be
repeated, so a kill at any point costs nothing but the time until somebody runs it again.
"""

import getpass
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torchrelay import ledger
from torchrelay.config import Perimeter, Site
from torchrelay.config import component as component_settings
from torchrelay.delivery import reach
from torchrelay.delivery.admission import Gatekeeper, Trusting, refusal_error
from torchrelay.delivery.plan import (
    LOADING,
    Abandon,
    Admit,
    Advance,
    Begin,
    Commit,
    Hold,
    Refuse,
    Release,
    Rest,
    Route,
    Step,
    Underway,
    View,
    Withdraw,
    next_step,
)
from torchrelay.delivery.sight import Sight, known, of_wanted, serves, text
from torchrelay.delivery.store import Admission, Rollout, State, Store, store, with_served
from torchrelay.delivery.telling import Teller, entry, outbox
from torchrelay.errors import BusyError, RefusedError, ServingError, TorchrelayError, TrackingError, UntrustedError
from torchrelay.handover import Desired, NodeReport, RoutedVersion, WantedVersion
from torchrelay.lineage import TAG_DIGEST
from torchrelay.tracking import ModelVersion, Tracking

_PATIENCE_S = 900.0
_POLL_S = 0.1
# A component that needs more steps than this at one go is going round in circles.
_MOST_STEPS = 200
_LOOKING = Rest(soon=True, why="being looked at")
# After these the world is looked at anew; the other steps are notes of our own, made within a moment.
_TAKES_TIME = (Admit, Hold, Route)

log = logging.getLogger(__name__)
Registry = dict[str, ModelVersion | None]


class Evidence(Protocol):
    """Judges a roll-out's stage by what was counted."""

    def gather(self, state: State, perimeter: Perimeter) -> State:
        """The state with what was counted since, and the judgement on its stage."""
        ...

    def pages(self, state: State, perimeter: str, reason: str, *, passed: bool) -> dict[str, str]:
        """What a roll-out rested on, for people: file name to content."""
        ...


@dataclass
class Outcome:
    """What one run of converge found and did; `blamed` are the errors that are of one component alone."""

    rests: dict[str, Rest] = field(default_factory=dict)
    refused: dict[str, Admission] = field(default_factory=dict)
    reports: list[NodeReport] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    general: list[TorchrelayError] = field(default_factory=list)
    blamed: dict[str, list[TorchrelayError]] = field(default_factory=dict)

    @property
    def errors(self) -> list[TorchrelayError]:
        """All of them."""
        return [*self.general, *(error for errors in self.blamed.values() for error in errors)]

    def errors_of(self, component: str | None) -> list[TorchrelayError]:
        """Those that concern this component, and everything; by default all."""
        return self.errors if component is None else [*self.general, *self.blamed.get(component, ())]

    def blame(self, component: str, error: TorchrelayError) -> None:
        """Note what went wrong with this component."""
        self.blamed.setdefault(component, []).append(error)

    @property
    def soon(self) -> bool:
        """Whether there is more to do within seconds."""
        return any(rest.soon for rest in self.rests.values())

    def refusal(self, component: str) -> RefusedError | None:
        """The refusal of what is asked for this component, as an error, if it was refused."""
        found = self.refused.get(component)
        return refusal_error(component, found.version, found.reason) if found else None

    def serves(self, perimeter: Perimeter, component: str, version: str) -> bool:
        """Whether every node holds this version in good health and the gateway sends it all requests, as they say."""
        return serves(perimeter, {report.node: report for report in self.reports}, component, version)


def converge(site: Site, name: str, why: str, component: str | None = None) -> Outcome:
    """Bring perimeter `name` to what the registry asks for, and return once it is there.

    A refused request leaves what is live in service and is written to the ledger once. Raises the first error that
    kept a node from what it should hold; everything else was done all the same. With `component`, errors of other
    components are in the outcome, and raised by whoever asks for those. A perimeter that an orchestrator converges is
    that one's alone: RefusedError.
    """
    if site.perimeters[name].orchestrator:
        raise RefusedError(
            f"{name} is converged by its orchestrator, which admits by {name}'s own policy",
            "a perimeter without one; there, an alias to move",
            "make promote, or make status",
        )
    memory = store(name)
    with memory.lease(_PATIENCE_S) as token:
        converger = Converger(site, name, memory, token, why=why)
        outcome = converger.tick()
        while outcome.soon and not outcome.errors_of(component):
            time.sleep(_POLL_S)
            outcome = converger.tick()
    if errors := outcome.errors_of(component):
        raise errors[0]
    return outcome


class Converger:
    """One perimeter, under one lease."""

    def __init__(
        self,
        site: Site,
        name: str,
        memory: Store,
        token: int,
        *,
        why: str,
        gatekeeper: Gatekeeper | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        self.name = name
        self.perimeter = site.perimeters[name]
        self.memory = memory
        self.token = token
        self.why = why
        self.gatekeeper = gatekeeper or Trusting()
        self.evidence = evidence
        # Who watches a roll-out has more to do than to wait for the registry, and looks again anyway.
        self.tracking = Tracking(site.tracking.url, hasty=self.perimeter.progressive)
        self.teller = Teller(self.tracking, name, self.perimeter)
        self.sight = Sight(self.perimeter)
        self.outcome = Outcome()
        self._changed: set[str] = set()
        self._faults: dict[str, str] = {}
        self._seen: Mapping[str, NodeReport] | None = None

    def tick(self) -> Outcome:
        """Do all that can be done now."""
        self.outcome = Outcome()
        self._faults.clear()
        self._seen = None
        self.sight.forget()
        self._recover()
        registry = self._registry()
        if registry is not None:
            self.teller.flush()
        for component in sorted({*self.memory.states(), *(registry or {})}):
            self.outcome.rests[component] = self._closed(component, registry)
        self.outcome.reports = list(self._look().values())
        self.outcome.general += self.sight.away.values()
        self.outcome.changed = sorted(self._changed)
        return self.outcome

    def _closed(self, component: str, registry: Registry | None) -> Rest:
        """One component, whose errors do not keep the others waiting."""
        try:
            rest = self._close(component, registry)
        except BusyError:  # somebody else has the lease
            raise
        except TorchrelayError as error:
            rest = self._in_trouble(component, error)
        except Exception as error:  # whatever one component's record holds, the others' roll-outs go on
            log.exception("%s could not be looked at", component)
            what = f"{component} could not be looked at: {error!r:.300}"
            rest = self._in_trouble(component, ServingError(what, "a state to go on from", "make doctor"))
        else:
            if rest != _LOOKING:  # which may end as it did before
                self._note_trouble(component, "")
        return rest

    def _in_trouble(self, component: str, error: TorchrelayError) -> Rest:
        self.outcome.blame(component, error)
        self._note_trouble(component, f"{error.found}; {error.next_command}")
        return Rest(soon=False, why=error.found)

    def _note_trouble(self, component: str, text: str) -> None:
        """What a person who waits for the next step should know."""
        state = self.memory.state(component)
        if state.trouble != text:
            self._save(state.model_copy(update={"trouble": text}))

    def _close(self, component: str, registry: Registry | None) -> Rest:
        """Step by step until there is nothing to do now. `registry` is what was read a moment ago."""
        reports = self._look()
        step: Step | None = None
        for _ in range(_MOST_STEPS):
            if isinstance(step, _TAKES_TIME):
                registry = None if registry is None else self._registry()
                reports = self._look()
            requested = (registry or {}).get(component)
            state = self._judged(component, requested, known_registry=registry is not None)
            state = self._resettled(state, requested, reports)
            step = next_step(self._view(state, registry is not None, requested, reports))
            if isinstance(step, Rest):
                if registry is not None:
                    self.teller.registry(state, requested)
                    self.teller.flush()
                return step
            if not isinstance(step, Admit):  # the gatekeeper says so itself, once
                log.info("%s: %s", component, step)
            if not self._execute(step, state, requested, reports):
                return _LOOKING
            self._seen = None
        raise ServingError(f"{component} took {_MOST_STEPS} steps without an end", "an end", "make status")

    # What is known

    def _look(self) -> Mapping[str, NodeReport]:
        """What each node says, asked anew once anything was done."""
        if self._seen is None:
            self._seen = self.sight.reports()
        return self._seen

    def _registry(self) -> Registry | None:
        """What is asked for, by component; None while the registry does not answer."""
        alias = self.perimeter.alias
        try:
            asked = {name: aliases[alias] for name, aliases in self.tracking.models().items() if alias in aliases}
            return {name: self.tracking.version(name, version) for name, version in asked.items()}
        except TrackingError as error:
            log.warning("the registry does not answer: %s", error.found)
            return None

    def _judged(self, component: str, requested: ModelVersion | None, *, known_registry: bool) -> State:
        """The component's state with what was counted of its roll-out, and the refusal of what is asked for."""
        state = self.memory.state(component)
        if self.evidence and state.rollout and 0 <= state.rollout.stage < len(state.rollout.weights):
            state = self._save(self.evidence.gather(state, self.perimeter))
        verdict = self._verdict(state, requested)
        refused = verdict if verdict and not verdict.admitted else None
        if refused:
            self.outcome.refused[component] = refused
        if known_registry and state.refused != refused:
            state = self._save(state.model_copy(update={"refused": refused}))
        return state

    def _resettled(self, state: State, requested: ModelVersion | None, reports: Mapping[str, NodeReport]) -> State:
        """The state with what is live served by the settings that the registry has now, which need no other version.

        Only where a node routes to its own engines: `apply` then starts a new one beside the old and swaps, losing no
        request. Production's settings are those of the promotion, which its gate has looked at.
        """
        live, name = state.live, self.perimeter.gateway_node
        if self.perimeter.progressive or [node.name for node in self.sight.holders] != [name] or state.rollout:
            return state
        if requested is None or live is None or _release(requested) != of_wanted(live):
            return state
        found = self.gatekeeper.decide(requested, live)
        if found is None or found.wanted is None:
            return state
        new = found.wanted
        if new != live:
            state = self._save(_with_settings(state, new))
            self._changed.add(state.component)
        told = reports[name].told if name in reports else None
        if told and any(of_wanted(one) == of_wanted(new) and one != new for one in told.components):
            self._apply(name)
            self._seen = None
        return state

    def _verdict(self, state: State, requested: ModelVersion | None) -> Admission | None:
        """The decision on the request, if it was made. What served here before needs no other."""
        if requested is None:
            return None
        release = _release(requested)
        for served in state.served:
            if of_wanted(served.wanted) == release:
                return _readmitted(served.wanted.component, release).model_copy(update={"wanted": served.wanted})
        keys = (self.gatekeeper.policy(requested), self.gatekeeper.passing(requested))
        found = (self.memory.admission(requested.name, requested.version, release.digest, key) for key in keys)
        return next(filter(None, found), None)

    def _view(
        self, state: State, known_registry: bool, requested: ModelVersion | None, reports: Mapping[str, NodeReport]
    ) -> View:
        rollout = state.rollout
        verdict = self._verdict(state, requested)
        kept = state.served[len(state.served) - self.perimeter.warm :]
        return View(
            known=known_registry,
            requested=_release(requested) if requested else None,
            verdict=None if verdict is None else "admitted" if verdict.admitted else "refused",
            live=of_wanted(state.live) if state.live else None,
            warm=frozenset(of_wanted(one.wanted) for one in kept),
            underway=Underway(of_wanted(rollout.wanted), rollout.stage, rollout.weights) if rollout else None,
            judgement=rollout.judgement if rollout else "bake",
            reason=rollout.note if rollout else "",
            fault=self._faults.get(state.component),
            nodes=self.sight.nodes(state.component, reports),
            routing=self.sight.routing(state, reports),
            keeps_last=self.perimeter.keeps_last,
        )

    # What is done

    def _execute(
        self, step: Step, state: State, requested: ModelVersion | None, reports: Mapping[str, NodeReport]
    ) -> bool:
        """Do the step; False if it is being done elsewhere and will be found done later."""
        match step:
            case Admit():
                return self._admit(state, requested)
            case Begin():
                self._begin(state, requested)
            case Hold(node, releases):
                self._hold(state, node, releases)
            case Route():
                self._route(state, step, reports)
            case Advance(stage):
                self._advance(state, stage)
            case Refuse(_, reason):
                self._refuse(state, reason)
            case Abandon():
                self._save(state.model_copy(update={"rollout": None}))
            case Commit():
                self._commit(state)
            case Withdraw():
                self._withdraw(state)
        return True

    def _admit(self, state: State, requested: ModelVersion | None) -> bool:
        found = self.gatekeeper.decide(requested, state.live) if requested else None
        if found:
            self.memory.decide(found, self.token)
        return found is not None

    def _begin(self, state: State, requested: ModelVersion | None) -> None:
        verdict = self._verdict(state, requested)
        if requested is None or verdict is None or verdict.wanted is None:
            return
        back = any(of_wanted(one.wanted) == of_wanted(verdict.wanted) for one in state.served)
        straight = back or not self.perimeter.progressive or state.live is None
        stages = () if straight else component_settings(state.component).rollout.stages
        now = time.time()
        rollout = Rollout(
            wanted=verdict.wanted,
            kind="rollback" if back else "rollout",
            policy=self.gatekeeper.policy(requested),
            who=getpass.getuser(),
            why=self.why,
            began=now,
            stage=LOADING,
            since=now,
            weights=tuple(stage.weight for stage in stages),
            note="loading it on every node",
            report=verdict.report,
        )
        self._save(state.model_copy(update={"rollout": rollout}))

    def _hold(self, state: State, name: str, releases: frozenset[Release]) -> None:
        there = known(state)
        wanted = tuple(there[release] for release in sorted(releases) if release in there)
        self._save(state.model_copy(update={"hold": {**state.hold, name: wanted}}))
        report = self._apply(name)
        if report is None:
            return
        candidate = state.rollout.wanted.version if state.rollout else None
        for fault in (one for one in report.faults if one.component == state.component):
            if fault.final and fault.version == candidate:
                self._faults[state.component] = f"on node {name}: {fault.found}"
            else:
                gave_up = self.sight.gave_up.setdefault((name, state.component), set())
                gave_up.update(release for release in releases if release.version == fault.version)
        self._note_mended(state, name, report)

    def _note_mended(self, state: State, name: str, report: NodeReport) -> None:
        """A node that had lost what it was told to hold before, and has it again: that belongs into the ledger."""
        live, loaded = state.live, {Release(one.version, one.digest) for one in report.held if one.changed}
        if live is None or state.rollout or of_wanted(live) not in loaded or live not in state.hold.get(name, ()):
            return
        self._changed.add(state.component)
        self.teller.event("mend", live, live, why=f"{self.why}; on node {name}", began=time.time())

    def _route(self, state: State, step: Route, reports: Mapping[str, NodeReport]) -> None:
        there = known(state)
        shares = ({step.mirror: 0} if step.mirror else {}) | dict(step.weights)
        placed = {text(one): self.sight.places(state, one, step.nodes[one], reports) for one in shares}
        routes = []
        for release, weight in sorted(shares.items()):
            routed = RoutedVersion(
                version=there[release], weight=weight, mirror=release == step.mirror, copies=_copies(state)
            )
            places = placed[text(release)]
            if [*places] != [self.perimeter.gateway_node]:  # its own engine is found wherever it listens next time
                endpoints = tuple(places[node] for node in sorted(places))
                path = self.sight.path(state, release, reports)
                routed = routed.model_copy(update={"endpoints": endpoints, "path": path})
            routes.append(routed)
        self._save(state.model_copy(update={"routes": tuple(routes), "placed": placed}))
        self._apply(self.perimeter.gateway_node)

    def _apply(self, name: str) -> NodeReport | None:
        """Tell the node all that it is to hold and route; None if it is out of reach."""
        node = next(one for one in self.perimeter.nodes if one.name == name)
        states = self.memory.states().values()
        desired = Desired(
            perimeter=self.name,
            components=tuple(wanted for state in states for wanted in state.hold.get(name, ())) if node.holds else (),
            routes=tuple(r for state in states for r in state.routes) if name == self.perimeter.gateway_node else (),
            token=self.token,
        )
        try:
            report, error = reach.apply_on(node, desired)
        except (BusyError, UntrustedError):
            raise
        except TorchrelayError as failure:
            self.sight.away[name] = failure
            return None
        if error and not report.faults:  # the gateway's own
            raise error
        for fault in report.faults if error else ():
            self.outcome.blame(fault.component, ServingError(fault.found, fault.expected, fault.next_command))
        return report

    def _advance(self, state: State, stage: int) -> None:
        if state.rollout is None:
            return
        update = {"stage": stage, "since": time.time(), "blocks": (), "marks": {}, "judgement": "bake", "note": ""}
        rollout = state.rollout.model_copy(update={**update, "figures": {}})
        self._save(state.model_copy(update={"rollout": rollout}))

    def _refuse(self, state: State, reason: str) -> None:
        """The decision is turned round first: from then on every look says that what is live gets all requests."""
        rollout = state.rollout
        if rollout is None:
            return
        self.memory.decide(_refused(rollout, reason), self.token)
        served = tuple(one for one in state.served if of_wanted(one.wanted) != of_wanted(rollout.wanted))
        self._tell_end(state, rollout, "refusal", reason)
        self._save(state.model_copy(update={"rollout": None, "served": served}))

    def _commit(self, state: State) -> None:
        """The entry comes before what it tells of: a live version that no entry explains would be worse."""
        rollout = state.rollout
        if rollout is None:
            return
        self._tell_end(state, rollout, rollout.kind, rollout.why)
        self._changed.add(state.component)
        self._save(with_served(state, rollout.wanted, time.time()))

    def _tell_end(self, state: State, rollout: Rollout, kind: ledger.Kind, why: str) -> None:
        """The roll-out's entry, with what it rested on. Nobody counted where there is no evidence."""
        passed = kind != "refusal"
        self.teller.event(
            kind,
            rollout.wanted,
            state.live,
            why=why,
            began=rollout.began,
            failed=rollout.failed if self.evidence else None,
            report=rollout.report,
            pages=self._pages(state, why, passed=passed),
        )

    def _pages(self, state: State, why: str, *, passed: bool) -> dict[str, str]:
        if self.evidence is None:
            return {}
        try:
            return self.evidence.pages(state, self.name, why, passed=passed)
        except Exception:  # whatever keeps a page from being drawn must not keep a version from being taken back
            log.exception("the roll-out of %s has no page", state.component)
            return {}

    def _withdraw(self, state: State) -> None:
        if state.live is None:
            return
        self.teller.event("withdrawal", state.live, state.live, why=self.why, began=state.live_since)
        self._save(state.model_copy(update={"live": None, "served": ()}))

    def _save(self, state: State) -> State:
        self.memory.save(state, self.token)
        return state

    def _recover(self) -> None:
        """A memory that was lost is made anew from what the gateway's node last reached."""
        if self.memory.states():
            return
        report = self.sight.reports().get(self.perimeter.gateway_node)
        for routed in report.told.routes if report and report.told else ():
            if routed.weight > 50:
                wanted = routed.version
                held = {node.name: (wanted,) for node in self.sight.holders}
                found = State(component=wanted.component, live=wanted, live_since=time.time(), hold=held)
                self._save(found.model_copy(update={"routes": (routed,)}))


def record_refusal(site: Site, name: str, version: ModelVersion, reason: str) -> None:
    """Write into the ledger that a request was turned down before it was made; the same refusal is written once."""
    what = (version.name, version.version, version.tags.get(TAG_DIGEST, ""))
    found = entry("refusal", what, store(name).state(version.name).live, why=reason, began=time.time())
    ledger.record(Tracking(site.tracking.url), name, found, outbox())


def _copies(state: State) -> int:
    """Percent of the requests that a shadow gets, by the component's policy; what is live gets all of a candidate's."""
    rollout = state.rollout
    if rollout is None or not 0 <= rollout.stage < len(rollout.weights) or rollout.weights[rollout.stage]:
        return 100
    stages = component_settings(state.component).rollout.stages
    return stages[rollout.stage].copies if rollout.stage < len(stages) else 100


def _release(version: ModelVersion) -> Release:
    return Release(version.version, version.tags.get(TAG_DIGEST, ""))


def _with_settings(state: State, new: WantedVersion) -> State:
    """The state with `new` wherever its release was meant with other settings."""

    def settled(wanted: WantedVersion) -> WantedVersion:
        return new if of_wanted(wanted) == of_wanted(new) else wanted

    hold = {name: tuple(map(settled, held)) for name, held in state.hold.items()}
    routes = tuple(one.model_copy(update={"version": settled(one.version)}) for one in state.routes)
    return state.model_copy(update={"live": new, "hold": hold, "routes": routes})


def _readmitted(component: str, release: Release) -> Admission:
    return Admission(
        component=component,
        version=release.version,
        digest=release.digest,
        policy="served",
        admitted=True,
        reason="it has served here before",
        at=time.time(),
    )


def _refused(rollout: Rollout, reason: str) -> Admission:
    """What was admitted, and failed on its way."""
    return Admission(
        component=rollout.wanted.component,
        version=rollout.wanted.version,
        digest=rollout.wanted.digest,
        policy=rollout.policy,
        admitted=False,
        reason=reason,
        at=rollout.began,
        report=rollout.report,
    )
