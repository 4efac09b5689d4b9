"""What converge sees of a perimeter: the nodes' and the gateway's own reports, as views for the pure core."""

import logging
from collections.abc import Mapping

from torchrelay.config import Node, Perimeter
from torchrelay.delivery import reach
from torchrelay.delivery.plan import NodeView, Release, Routing
from torchrelay.delivery.store import State
from torchrelay.errors import TorchrelayError, UntrustedError
from torchrelay.handover import Endpoint, HeldVersion, NodeReport, RouteShare, WantedVersion

log = logging.getLogger(__name__)


class Sight:
    """One perimeter, looked at again and again; a node that did not answer is asked again after `forget`."""

    def __init__(self, perimeter: Perimeter) -> None:
        self.perimeter = perimeter
        self.gave_up: dict[tuple[str, str], set[Release]] = {}
        self.away: dict[str, TorchrelayError] = {}

    @property
    def holders(self) -> list[Node]:
        """The nodes that engines run on."""
        return [node for node in self.perimeter.nodes if node.holds]

    def forget(self) -> None:
        """What failed a while ago may be tried again."""
        self.gave_up.clear()
        self.away.clear()

    def reports(self) -> dict[str, NodeReport]:
        """What each node says now, by its name; those that do not answer are missing, and in `away`."""
        found = {}
        for node in self.perimeter.nodes:
            if node.name in self.away:
                continue
            try:
                found[node.name] = reach.observe_on(node)
            except UntrustedError:  # somebody else's machine may answer there: nothing goes on before that is known
                raise
            except TorchrelayError as error:
                self.away[node.name] = error
        return found

    def nodes(self, component: str, reports: Mapping[str, NodeReport]) -> tuple[NodeView, ...]:
        """What the nodes hold of the component."""
        return tuple(self._node(node.name, component, reports.get(node.name)) for node in self.holders)

    def _node(self, name: str, component: str, report: NodeReport | None) -> NodeView:
        if report is None:
            return NodeView(name, reachable=False)
        mine = [one for one in report.held if one.component == component]
        return NodeView(
            name,
            healthy=frozenset(Release(one.version, one.digest) for one in mine if one.healthy),
            held=frozenset(Release(one.version, one.digest) for one in mine),
            gave_up=frozenset(self.gave_up.get((name, component), ())),
        )

    def routing(self, state: State, reports: Mapping[str, NodeReport]) -> Routing | None:
        """What the gateway does with the component; None while it does not answer."""
        report = reports.get(self.perimeter.gateway_node)
        if report is None or report.routed is None or (report.routed and not report.gateway_healthy):
            return None
        shares = [share for share in report.routed if share.component == state.component]
        names = {f"{state.component}@{release.version}": release for release in known(state)}
        return Routing(
            weights={of_share(share): share.weight for share in shares if share.weight},
            mirror=next((of_share(share) for share in shares if share.mirror), None),
            nodes={of_share(share): self._nodes_behind(share, state, reports) for share in shares},
            draining=frozenset(release for name, release in names.items() if name in report.draining),
        )

    def _nodes_behind(self, share: RouteShare, state: State, reports: Mapping[str, NodeReport]) -> frozenset[str]:
        """The nodes whose engines the gateway has for this version; one out of reach counts as where it was."""
        places = self.places(state, of_share(share), frozenset(node.name for node in self.holders), reports)
        return frozenset(node for node, endpoint in places.items() if endpoint in share.endpoints)

    def places(
        self, state: State, release: Release, nodes: frozenset[str], reports: Mapping[str, NodeReport]
    ) -> dict[str, Endpoint]:
        """Where the release is on these nodes, as they say; or, out of reach, as it was when the gateway was told."""
        had = state.placed.get(text(release), {})
        found = {node: endpoint for node, endpoint in had.items() if node in nodes and node not in reports}
        for node in nodes & reports.keys():
            if one := _held(reports[node], state.component, release):
                found[node] = one.endpoint
        return found

    def path(self, state: State, release: Release, reports: Mapping[str, NodeReport]) -> str:
        """What the engines call the release: as a node says that holds it, or as the gateway was told before."""
        for report in reports.values():
            if one := _held(report, state.component, release):
                return one.path
        return next((one.path for one in state.routes if of_wanted(one.version) == release), "")


def of_wanted(wanted: WantedVersion) -> Release:
    """The release that a node is told to hold."""
    return Release(wanted.version, wanted.digest)


def of_share(share: RouteShare) -> Release:
    """The release that a gateway routes."""
    return Release(share.version, share.digest)


def text(release: Release) -> str:
    """The release as a key."""
    return f"{release.version}@{release.digest}"


def known(state: State) -> dict[Release, WantedVersion]:
    """Every version that the state can tell a node about."""
    found = [*(wanted for held in state.hold.values() for wanted in held), *(one.wanted for one in state.served)]
    found += [one for one in (state.live, state.rollout.wanted if state.rollout else None) if one]
    return {of_wanted(wanted): wanted for wanted in found}


def serves(perimeter: Perimeter, reports: Mapping[str, NodeReport], component: str, version: str | None) -> bool:
    """Whether every node holds this version in good health and the gateway sends it all requests, as they say.

    A version of None: nothing of the component is routed or held.
    """
    gateway = reports.get(perimeter.gateway_node)
    if gateway is None or any(node.name not in reports for node in perimeter.nodes):
        return False
    shares = [(one.version, one.weight) for one in gateway.routed or () if one.component == component and one.weight]
    holders = [reports[node.name] for node in perimeter.nodes if node.holds]
    if version is None:
        return not shares and not any(one.component == component for report in holders for one in report.held)
    return shares == [(version, 100)] and all(
        any((one.component, one.version, one.healthy) == (component, version, True) for one in report.held)
        for report in holders
    )


def _held(report: NodeReport, component: str, release: Release) -> HeldVersion | None:
    wanted = (component, release.version, release.digest)
    return next((one for one in report.held if (one.component, one.version, one.digest) == wanted), None)
