"""The pure core of `converge`: from what is known of one component in a perimeter to the next step.

No clock, no network: a view in, a step out, so that every history can be tried in a test. Whoever executes a step
looks again before the next one: it is the state that decides, never the step before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Judgement = Literal["bake", "pass", "breach"]
LOADING = -1


@dataclass(frozen=True, order=True)
class Release:
    """A version of the component, and the very archive that is meant."""

    version: str
    digest: str


@dataclass(frozen=True)
class NodeView:
    """What a node says of itself. `gave_up` names what it could not load at this time, for no fault of the version."""

    name: str
    reachable: bool = True
    healthy: frozenset[Release] = frozenset()
    held: frozenset[Release] = frozenset()
    gave_up: frozenset[Release] = frozenset()


@dataclass(frozen=True)
class Routing:
    """What the gateway does with the component: percent by release, who gets copies, and each release's nodes."""

    weights: Mapping[Release, int] = field(default_factory=dict)
    mirror: Release | None = None
    nodes: Mapping[Release, frozenset[str]] = field(default_factory=dict)
    draining: frozenset[Release] = frozenset()


@dataclass(frozen=True)
class Underway:
    """A roll-out: `stage` is LOADING, the place of a stage, or the number of stages: then it gets all requests."""

    candidate: Release
    stage: int
    weights: tuple[int, ...] = ()

    @property
    def everything(self) -> bool:
        """Whether the candidate gets all requests by now."""
        return self.stage >= len(self.weights)


@dataclass(frozen=True)
class View:
    """All that is known of one component in one perimeter at one moment.

    `known` is False while the registry cannot be asked; `verdict` is that on the requested release, None while there
    is none; `judgement` and `fault` concern the release underway.
    """

    known: bool
    requested: Release | None
    verdict: Literal["admitted", "refused"] | None
    live: Release | None
    warm: frozenset[Release]
    underway: Underway | None
    judgement: Judgement
    reason: str
    fault: str | None
    nodes: tuple[NodeView, ...]
    routing: Routing | None
    keeps_last: bool = False


@dataclass(frozen=True)
class Admit:
    """Decide, once, whether this release may be served."""

    release: Release


@dataclass(frozen=True)
class Begin:
    """Start the roll-out of an admitted release."""

    release: Release


@dataclass(frozen=True)
class Hold:
    """Have a node hold exactly these releases."""

    node: str
    releases: frozenset[Release]


@dataclass(frozen=True)
class Route:
    """Have the gateway split requests so; empty weights route nothing."""

    weights: tuple[tuple[Release, int], ...]
    mirror: Release | None
    nodes: Mapping[Release, frozenset[str]] = field(hash=False)


@dataclass(frozen=True)
class Advance:
    """Enter this stage."""

    stage: int


@dataclass(frozen=True)
class Refuse:
    """Turn the release underway down; what is live gets all requests again."""

    release: Release
    reason: str


@dataclass(frozen=True)
class Abandon:
    """Stop the roll-out without blame: something else is asked for now."""

    release: Release


@dataclass(frozen=True)
class Commit:
    """The release got all requests and serves: it is live."""

    release: Release


@dataclass(frozen=True)
class Withdraw:
    """Nobody asks for the component any more, and nothing of it is routed: nothing of it is live."""


@dataclass(frozen=True)
class Rest:
    """Nothing to do until something changes; `soon` when that is a matter of seconds."""

    soon: bool
    why: str


Step = Admit | Begin | Hold | Route | Advance | Refuse | Abandon | Commit | Withdraw | Rest


def next_step(view: View) -> Step:
    """The one thing to do now."""
    return (
        _end_of_rollout(view)
        or _split(view)
        or _missing(view)
        or _endpoints(view)
        or _progress(view)
        or _surplus(view)
        or _request(view)
        or _draining(view)
        or Rest(soon=False, why="converged" if view.known else "the registry does not answer")
    )


def _end_of_rollout(view: View) -> Step | None:
    """What ends a roll-out comes first: nothing is worth more than a fast way back."""
    if view.underway is None:
        return None
    candidate = view.underway.candidate
    if view.fault:
        return Refuse(candidate, view.fault)
    if view.judgement == "breach":
        return Refuse(candidate, view.reason)
    if view.known and view.requested != candidate:
        return Abandon(candidate)
    return None


def _withdrawn(view: View) -> bool:
    return view.known and view.requested is None and not view.keeps_last


def _wanted_split(view: View) -> tuple[dict[Release, int], Release | None]:
    """Percent by release, and who gets copies: the candidate in a shadow stage, later what is live.

    So every answer of the candidate is compared until it gets all requests, and no more is copied than that takes.
    """
    if view.underway is None or view.underway.stage == LOADING:
        return ({view.live: 100} if view.live and not _withdrawn(view) else {}), None
    candidate = view.underway.candidate
    if view.underway.everything or view.live is None:
        return {candidate: 100}, None
    weight = view.underway.weights[view.underway.stage]
    if weight == 0:
        return {view.live: 100}, candidate
    return {view.live: 100 - weight, candidate: weight}, view.live


def _nodes_of(view: View, release: Release) -> frozenset[str]:
    """Where the gateway may send the release's requests: a node that cannot be asked keeps what it had."""
    had = view.routing.nodes.get(release, frozenset()) if view.routing else frozenset()
    return frozenset(node.name for node in view.nodes if (release in node.held if node.reachable else node.name in had))


def _route(view: View) -> Route | None:
    """The routes as they should be; None if some release that they need is nowhere held."""
    weights, mirror = _wanted_split(view)
    needed = weights.keys() | ({mirror} if mirror else set())
    nodes = {release: _nodes_of(view, release) for release in needed}
    if not all(nodes.values()):
        return None
    return Route(tuple(sorted(weights.items())), mirror, nodes)


def _split(view: View) -> Step | None:
    """The shares first, before any node is touched: a way back must not wait for a load."""
    route = _route(view)
    if view.routing is None or route is None:
        return None
    same = dict(route.weights) == dict(view.routing.weights) and route.mirror == view.routing.mirror
    return None if same else route


def _needed(view: View) -> frozenset[Release]:
    """What every node should hold."""
    if _withdrawn(view) and view.underway is None:
        return frozenset()
    needed = {view.live} if view.live else set()
    if view.underway:
        needed.add(view.underway.candidate)
    return frozenset(needed) | view.warm


def _missing(view: View) -> Step | None:
    """A node that lacks something gets it, beside what it holds; what serves before what is to come."""
    needed = _needed(view)
    for node in view.nodes:
        if node.reachable and needed - node.healthy - node.gave_up:
            return Hold(node.name, (needed - node.gave_up) | node.held)
    return None


def _endpoints(view: View) -> Step | None:
    """The gateway knows every node that holds what is routed, and no other."""
    route = _route(view)
    if view.routing is None or route is None:
        return None
    return None if all(view.routing.nodes.get(one) == nodes for one, nodes in route.nodes.items()) else route


def _progress(view: View) -> Step | None:
    """One stage further when the present one has passed and the request still stands."""
    rollout = view.underway
    if rollout is None:
        return None
    if not any(rollout.candidate in node.healthy for node in view.nodes if node.reachable):
        return Rest(soon=False, why="no node could load it yet")
    if view.routing is None:
        return Rest(soon=True, why="the gateway does not answer")
    return Commit(rollout.candidate) if rollout.everything else _stage_after(view, rollout)


def _stage_after(view: View, rollout: Underway) -> Step:
    if not view.known:
        return Rest(soon=True, why="the registry does not answer, so the roll-out waits where it is")
    if rollout.stage == LOADING:
        return Advance(0 if view.live else len(rollout.weights))
    if view.judgement == "pass":
        return Advance(rollout.stage + 1)
    return Rest(soon=True, why=view.reason or "baking")


def _surplus(view: View) -> Step | None:
    """Nodes let go of what is not needed once no request for it is in flight."""
    needed = _needed(view)
    if view.routing is None:
        return None
    routed = frozenset(view.routing.weights) | frozenset(filter(None, [view.routing.mirror]))
    for node in view.nodes:
        extra = node.held - needed - routed
        if node.reachable and extra - view.routing.draining:
            return Hold(node.name, (node.held & (needed | routed | view.routing.draining)))
    return None


def _request(view: View) -> Step | None:
    """A request that is not met yet."""
    if not view.known or view.underway:
        return None
    if _withdrawn(view):
        return Withdraw() if view.live and _gone(view) else None
    if view.requested in (None, view.live):
        return None
    if view.verdict is None:
        return Admit(view.requested)
    return Begin(view.requested) if view.verdict == "admitted" else None


def _draining(view: View) -> Step | None:
    """Nothing is left to do but to unload what still answers. A request does not wait for that."""
    left = any(node.held - _needed(view) for node in view.nodes if node.reachable)
    if left and view.routing is not None and view.routing.draining:
        return Rest(soon=True, why="the last requests of the version before are still being answered")
    return None


def _gone(view: View) -> bool:
    """Whether the gateway and every node say that they have nothing of the component."""
    routed = view.routing is None or view.routing.weights or view.routing.mirror
    return not routed and all(node.reachable and not node.held for node in view.nodes)
