"""What a control node may ask of a serving node. On a laptop these are functions; over SSH an `agent` answers for them.

A node's folders, its engines' ports and its gateway's admin interface are the node's own: nobody else reads them.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ConfigDict

from torchrelay.config import Frozen, GatewayPlace, NodeConfig
from torchrelay.errors import ServingError
from torchrelay.handover import Desired, HeldVersion, NodeReport, RouteShare
from torchrelay.serving import apply as node_apply
from torchrelay.serving import gateway, gateway_stats
from torchrelay.serving.gateway_stats import InFlight, Reading
from torchrelay.serving.predictions import Prediction, Request, Tail, read, replayable


class _Message(Frozen):
    """What crosses over to another machine as JSON: bytes as base64, and NaN as itself, as in Python's own."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants"
    )


class Parts(_Message):
    """An error, as it crosses over to another machine."""

    found: str
    expected: str
    next_command: str


class Applied(_Message):
    """What `apply` left behind, and what went wrong on the way."""

    report: NodeReport
    error: Parts | None = None


class Counted(_Message):
    """What a gateway has counted, what it is answering, and what it routes, read one after the other."""

    reading: Reading
    in_flight: InFlight
    shares: tuple[RouteShare, ...]


class Tailed(_Message):
    """What is new in a prediction log, and where the next look goes on."""

    predictions: tuple[Prediction, ...]
    state: dict[str, int]


class Answered(_Message):
    """What an engine answered."""

    status: int
    body: bytes
    milliseconds: float


class Logged(_Message):
    """A line of the prediction log, and of which component it is."""

    component: str
    prediction: Prediction


class Calls:
    """One node, by its folder. Every method may raise TorchrelayError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def apply(self, desired: Desired) -> Applied:
        """Bring the node to the desired state. FencedError when it listens to somebody newer."""
        try:
            return Applied(report=node_apply.apply(self._config, desired))
        except node_apply.ApplyError as error:
            parts = Parts(found=error.found, expected=error.expected, next_command=error.next_command)
            return Applied(report=error.report, error=parts)

    def observe(self) -> NodeReport:
        """What the node holds and routes. Changes nothing."""
        return node_apply.observe(self._config)

    def counted(self) -> Counted:
        """What its gateway has counted; ServingError where it has none, or none answers."""
        place = self._gateway
        return Counted(
            reading=gateway_stats.read(place), in_flight=gateway_stats.in_flight(place), shares=gateway.shares(place)
        )

    def tail(self, component: str, told: Mapping[str, int] | None = None, since: float = 0) -> Tailed:
        """What its workers logged after `told`, the state of the look before, and not before `since` (unix seconds)."""
        tail = Tail(self._config.predictions, component, dict(told or {}), since=since)
        return Tailed(predictions=tuple(tail.poll()), state=tail.state)

    def requests(self, component: str, limit: int) -> tuple[Request, ...]:
        """The newest distinct requests of callers that can be sent again."""
        return tuple(replayable(self._config.predictions, component, limit))

    def find(self, request_id: str) -> Logged | None:
        """The newest answer to a caller with this request id."""
        folder = self._config.predictions
        for component in sorted(path.name for path in folder.glob("*") if path.is_dir()):
            for one in read(folder, component, newest_first=True):
                if one.id == request_id and not one.shadow:
                    return Logged(component=component, prediction=one)
        return None

    def ask(self, held: HeldVersion, body: bytes, headers: Mapping[str, str], patience_s: float) -> Answered:
        """Send one request to an engine of the node, past the gateway. No answer in time counts as 504."""
        import urllib3

        url = f"http://{held.endpoint.host}:{held.endpoint.port}{held.path}"
        began = time.monotonic()
        try:
            found = urllib3.request("POST", url, body=body, headers=headers, timeout=patience_s, retries=False)
            status, data = found.status, found.data
        except urllib3.exceptions.HTTPError as error:
            status, data = 504, str(error).encode()
        return Answered(status=status, body=data, milliseconds=1000 * (time.monotonic() - began))

    def resign(self, digest: str, signature: bytes) -> bool:
        """Put the signature into the node's copy of an archive; False if it has none."""
        return node_apply.resign(self._folder, digest, signature)

    @property
    def _config(self) -> NodeConfig:
        return node_apply.node_config(self._folder)

    @property
    def _gateway(self) -> GatewayPlace:
        place = self._config.gateway
        if place is None:
            raise ServingError(f"node {self._config.name} has no gateway", "the perimeter's gateway node", "make up")
        return place
