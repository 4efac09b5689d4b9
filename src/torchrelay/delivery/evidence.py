"""Gathers what a roll-out's stage is judged on: the gateway's counts, and the answers that shadows gave.

What was counted goes into the roll-out's state, so that an orchestrator that was killed goes on where it was. Only the
worst disagreements, which are for people, and answers that still wait for their partner are kept in memory.
"""

import json
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from torchrelay.config import Component, Json, Perimeter, Stage
from torchrelay.config import component as component_settings
from torchrelay.delivery import reach
from torchrelay.delivery.canary import Block, Judgement, judge, replay
from torchrelay.delivery.store import Rollout, State
from torchrelay.errors import TorchrelayError
from torchrelay.gate import RolloutSummary, rollout_report
from torchrelay.handover import HeldVersion, WantedVersion
from torchrelay.serving import gateway_stats
from torchrelay.serving.gateway_stats import BackendCounts, Reading
from torchrelay.serving.predictions import (
    Comparison,
    Difference,
    Disagreement,
    Prediction,
    Request,
    Tail,
    difference,
    replayable,
)

TOLERANCE = 0.05

log = logging.getLogger(__name__)


@dataclass
class Replayed:
    """What came of sending logged requests to a version."""

    compared: int = 0
    disagreed: int = 0
    errors: int = 0
    milliseconds: list[float] = field(default_factory=list)
    worst: list[Disagreement] = field(default_factory=list)


class CanaryEvidence:
    """Judges a stage by the component's policy (an `Evidence` of converge)."""

    def __init__(self) -> None:
        self._comparisons: dict[tuple[str, str, float], Comparison] = {}

    def gather(self, state: State, perimeter: Perimeter) -> State:
        """The state with one more block of counts, and the judgement on the stage so far."""
        rollout = state.rollout
        if rollout is None:
            return state
        policy = component_settings(state.component)
        try:
            rollout = self._counted(state, rollout, perimeter, policy)
        except TorchrelayError as error:
            note = f"the gateway could not be asked: {error.found}"
            return state.model_copy(update={"rollout": rollout.model_copy(update={"note": note})})
        stage = _stage(policy, rollout)
        found = judge(policy.rollout, stage, rollout.blocks, time.time() - rollout.since)
        if found.kind == "starved" and policy.rollout.little_traffic == "replay":
            found = self._replayed(rollout, perimeter, policy)
        return state.model_copy(update={"rollout": _judged(rollout, found, stage)})

    def pages(self, state: State, perimeter: str, reason: str, *, passed: bool) -> dict[str, str]:
        """The roll-out's page with the worst disagreements of its shadow, and these as JSON."""
        rollout = state.rollout
        if rollout is None:
            return {}
        comparison = self._comparisons.get((state.component, rollout.wanted.version, rollout.began))
        worst = [one.as_json() for one in comparison.worst] if comparison else []
        summary = RolloutSummary(
            component=state.component,
            perimeter=perimeter,
            version=rollout.wanted.version,
            live_version=state.live.version if state.live else None,
            passed=passed,
            reason=reason if not passed else rollout.passed or reason,
            stages=tuple(f"{weight} %" if weight else "shadow" for weight in rollout.weights),
            figures=rollout.figures,
        )
        page = rollout_report(summary, worst)
        return {"rollout.html": page, **({"disagreements.json": json.dumps(worst)} if worst else {})}

    def _counted(self, state: State, rollout: Rollout, perimeter: Perimeter, policy: Component) -> Rollout:
        node = next(one for one in perimeter.nodes if one.name == perimeter.gateway_node)
        reading = gateway_stats.read(reach.gateway_of(node))
        before = rollout.marks.get("reading")
        compared, disagreed, tails = self._compared(state.component, rollout, perimeter)
        now = reading.model_dump(mode="json")
        marks = {"reading": now, "first": rollout.marks.get("first", now), "tails": tails}
        if before is None:  # the stage has just begun: what was counted until now says nothing of it
            return rollout.model_copy(update={"marks": marks})
        block = _block(state, rollout, reading.since(Reading.model_validate(before)), policy.latency.p99_ms)
        quantiles = _quantiles(state, rollout, reading.since(Reading.model_validate(marks["first"])))
        block = block.model_copy(update={"compared": compared, "disagreed": disagreed})
        blocks = (*rollout.blocks, block) if any(block.model_dump().values()) else rollout.blocks
        failed = rollout.failed + block.live_errors + (0 if _stage(policy, rollout).shadow else block.errors)
        return rollout.model_copy(update={"marks": marks, "blocks": blocks, "failed": failed, "figures": quantiles})

    def _compared(self, component: str, rollout: Rollout, perimeter: Perimeter) -> tuple[int, int, dict[str, Any]]:
        """How many more pairs of answers were compared, how many differed, and how far each node's log was read."""
        key = (component, rollout.wanted.version, rollout.began)
        if key not in self._comparisons:
            self._comparisons = {key: Comparison(rollout.wanted.version, TOLERANCE)}
        comparison = self._comparisons[key]
        before = (comparison.compared, comparison.disagreed)
        tails = {}
        lines: list[Prediction] = []
        for node in (one for one in perimeter.nodes if one.holds):
            told = rollout.marks.get("tails", {}).get(node.name)
            tail = Tail(reach.config_of(node).predictions, component, told, since=rollout.since)
            lines += tail.poll()
            tails[node.name] = tail.state
        comparison.add(sorted(lines, key=lambda one: one.time))
        return comparison.compared - before[0], comparison.disagreed - before[1], tails

    def _replayed(self, rollout: Rollout, perimeter: Perimeter, policy: Component) -> Judgement:
        """What came is too little: logged requests of this perimeter go to the candidate, straight to an engine."""
        found = replay_on(perimeter, rollout.wanted, policy.rollout.replay_requests)
        slow = sum(one > policy.latency.p99_ms for one in found.milliseconds)
        verdict = replay(policy.rollout, found.compared, found.disagreed, found.errors, slow)
        said = f"too little traffic for a decision; {verdict.reason}"
        if verdict.kind != "starved":
            return verdict.model_copy(update={"reason": said})
        return verdict.model_copy(
            update={"kind": "pass", "reason": f"{said} It goes on, on the gate's word and the golden proof alone."}
        )


def replay_on(perimeter: Perimeter, wanted: WantedVersion, limit: int) -> Replayed:
    """Send the newest logged requests of the perimeter to this version on a node that holds it, and compare.

    Nothing is sent, and so nothing compared, where nothing was logged with its inputs.
    """
    found = Replayed()
    held = _somewhere(perimeter, wanted)
    if held is None:
        return found
    for request in logged_requests(perimeter, wanted.component, limit):
        answer = _send(held, wanted, request)
        found.milliseconds.append(answer.milliseconds)
        if answer.status >= 500:
            found.errors += 1
            continue
        found.compared += 1
        how: Difference | None = difference(request.logged, answer, TOLERANCE)
        if how is not None:
            found.disagreed += 1
            found.worst.append(Disagreement(how, request.logged, answer))
    found.worst = sorted(found.worst, key=lambda one: one.difference, reverse=True)[:20]
    return found


def logged_requests(perimeter: Perimeter, component: str, limit: int) -> list[Request]:
    """The newest distinct logged requests over all nodes that were answered and can be sent again, newest first."""
    requests = [
        one
        for node in perimeter.nodes
        if node.holds
        for one in replayable(reach.config_of(node).predictions, component, limit)
    ]
    return sorted(requests, key=lambda one: -one.logged.time)[:limit]


def _somewhere(perimeter: Perimeter, wanted: WantedVersion) -> HeldVersion | None:
    """The version on the first node that holds it in good health."""
    for node in (one for one in perimeter.nodes if one.holds):
        try:
            report = reach.observe_on(node)
        except TorchrelayError as error:
            log.warning("%s", error.found)
            continue
        for one in report.held:
            if (one.component, one.version, one.digest) == (wanted.component, wanted.version, wanted.digest):
                return one
    return None


def _send(held: HeldVersion, wanted: WantedVersion, request: Request) -> Prediction:
    """The answer, as the log would have it. A request that gets none counts as 504. Logged as a shadow's."""
    import urllib3

    logged, body = request.logged, request.body
    url = f"http://{held.endpoint.host}:{held.endpoint.port}{held.path}"
    headers = {
        "x-torchrelay-shadow": "1",
        "content-type": request.content_type,
        "x-torchrelay-request-id": f"replay-{logged.id}"[:128],
    }
    began, timeout = time.monotonic(), wanted.response_timeout_s + 5
    try:
        answer = urllib3.request("POST", url, body=body, headers=headers, timeout=timeout, retries=False)
        status, data = answer.status, answer.data
    except urllib3.exceptions.HTTPError as error:
        status, data = 504, json.dumps({"error": str(error)}).encode()
    given = {"status": status, "output": _parsed(data), "milliseconds": 1000 * (time.monotonic() - began)}
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


def _stage(policy: Component, rollout: Rollout) -> Stage:
    """The stage of the policy; of a policy that changed meanwhile, one of the same weight."""
    stages = policy.rollout.stages
    weight = rollout.weights[rollout.stage]
    if rollout.stage < len(stages) and stages[rollout.stage].weight == weight:
        return stages[rollout.stage]
    return Stage(weight=weight)


def _block(state: State, rollout: Rollout, since: Reading, objective_ms: float) -> Block:
    nothing = BackendCounts()
    counts = since.versions
    candidate = counts.get((state.component, rollout.wanted.version), nothing)
    live = counts.get((state.component, state.live.version), nothing) if state.live else nothing
    # Latency follows the other figures by a moment: no more can be slow than were answered.
    return Block(
        requests=candidate.requests,
        errors=min(candidate.errors, candidate.requests),
        slow=min(candidate.slower_than(objective_ms), candidate.requests),
        live_requests=live.requests,
        live_errors=min(live.errors, live.requests),
        live_slow=min(live.slower_than(objective_ms), live.requests),
    )


def _name(stage: Stage) -> str:
    return "Shadow" if stage.shadow else f"{stage.weight} %"


def _quantiles(state: State, rollout: Rollout, since: Reading) -> dict[str, float]:
    """p99 in ms of both versions over the stage, where it is known."""
    versions = {"p99_ms": rollout.wanted.version, "live_p99_ms": state.live.version if state.live else ""}
    counts = since.versions
    found = {
        name: counts[state.component, version].quantile(0.99)
        for name, version in versions.items()
        if (state.component, version) in counts
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _judged(rollout: Rollout, found: Judgement, stage: Stage) -> Rollout:
    judgement = found.kind if found.kind in ("pass", "breach") else "bake"
    note = found.reason
    passed = f"{rollout.passed} {_name(stage)}: {note}".strip() if judgement == "pass" else rollout.passed
    if found.kind == "starved":
        note = f"{found.reason} It waits, as the policy says (little_traffic: wait)."
    figures = {name: value for name, value in found.figures.items() if value is not None}
    return rollout.model_copy(
        update={"judgement": judgement, "note": note, "figures": {**rollout.figures, **figures}, "passed": passed}
    )
