"""Sends requests that callers once sent to a version that nobody asks yet, and compares what it answers."""

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from torchrelay.config import Component, Json, Node, Perimeter
from torchrelay.delivery import reach
from torchrelay.errors import TorchrelayError, UntrustedError
from torchrelay.handover import HeldVersion, WantedVersion
from torchrelay.serving.predictions import Difference, Disagreement, Prediction, Request, difference

TOLERANCE = 0.05
# A replayed request that takes this many times the latency objective counts as failed.
_PATIENCE = 20
_ENOUGH_ERRORS = 20
_REPLAY_S = 15.0

log = logging.getLogger(__name__)


@dataclass
class Replayed:
    """What came of sending logged requests to a version."""

    compared: int = 0
    disagreed: int = 0
    errors: int = 0
    milliseconds: list[float] = field(default_factory=list)
    worst: list[Disagreement] = field(default_factory=list)


def replay_on(perimeter: Perimeter, wanted: WantedVersion, policy: Component) -> Replayed:
    """Send the newest logged requests of the perimeter to this version on a node that holds it, and compare.

    Nothing is sent, and so nothing compared, where nothing was logged with its inputs. It ends early when so many
    failed that no more are needed to know, and after a quarter of a minute, since nothing else is looked at meanwhile.
    """
    found = Replayed()
    there = _somewhere(perimeter, wanted)
    if there is None:
        return found
    patience_s, end = patience(policy), time.monotonic() + _REPLAY_S
    for request in logged_requests(perimeter, wanted.component, policy.rollout.replay_requests):
        if time.monotonic() > end:
            break
        answer = _send(*there, wanted, request, patience_s)
        found.milliseconds.append(answer.milliseconds)
        if answer.status >= 500:
            found.errors += 1
            if found.errors >= _ENOUGH_ERRORS:
                break
            continue
        found.compared += 1
        how: Difference | None = difference(request.logged, answer, TOLERANCE)
        if how is not None:
            found.disagreed += 1
            found.worst.append(Disagreement(how, request.logged, answer))
    found.worst = sorted(found.worst, key=lambda one: one.difference, reverse=True)[:20]
    return found


def patience(policy: Component) -> float:
    """How long a replayed request may take, in seconds: one that hangs must not hold up every roll-out."""
    return min(float(policy.serving.response_timeout_s), _PATIENCE * policy.latency.p99_ms / 1000)


def logged_requests(perimeter: Perimeter, component: str, limit: int) -> list[Request]:
    """The newest distinct logged requests over all nodes that were answered and can be sent again, newest first."""
    requests: list[Request] = []
    for node in (one for one in perimeter.nodes if one.holds):
        try:
            requests += reach.calls(node).requests(component, limit)
        except UntrustedError:
            raise
        except TorchrelayError as error:  # what the other nodes logged is as good
            log.warning("the prediction log of %s was not read: %s", node.name, error.found)
    return sorted(requests, key=lambda one: -one.logged.time)[:limit]


def _somewhere(perimeter: Perimeter, wanted: WantedVersion) -> tuple[Node, HeldVersion] | None:
    """The first node that holds the version."""
    for node in (one for one in perimeter.nodes if one.holds):
        try:
            report = reach.observe_on(node)
        except TorchrelayError as error:
            log.warning("%s", error.found)
            continue
        for one in report.held:
            if (one.component, one.version, one.digest) == (wanted.component, wanted.version, wanted.digest):
                return node, one
    return None


def _send(node: Node, held: HeldVersion, wanted: WantedVersion, request: Request, patience_s: float) -> Prediction:
    """The answer, as the log would have it. A request that gets none counts as 504. Logged as a shadow's."""
    logged = request.logged
    headers = {
        "x-torchrelay-shadow": "1",
        "content-type": request.content_type,
        "x-torchrelay-request-id": f"replay-{logged.id}"[:128],
    }
    answer = reach.calls(node).ask(held, request.body, headers, patience_s)
    given = {"status": answer.status, "output": _parsed(answer.body), "milliseconds": answer.milliseconds}
    return answered(logged, given, wanted.version, wanted.digest)


def answered(logged: Prediction, answer: Json, version: str, digest: str) -> Prediction:
    """A version's answer to a logged request, as the log would have it."""
    return Prediction(
        id=logged.id,
        time=time.time(),
        version=version,
        digest=digest,
        shadow=True,
        status=answer["status"],
        milliseconds=answer["milliseconds"],
        summary=None,
        output=answer["output"],
    )


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
