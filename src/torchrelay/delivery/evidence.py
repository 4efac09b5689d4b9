"""Gathers what a roll-out's stage is judged on: the gateway's counts, and what both versions answered to one request.

What was counted goes into the roll-out's state, so that an orchestrator that was killed goes on where it was. Only the
worst disagreements, which are for people, and answers that still wait for their partner are kept in memory.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torchrelay.config import Component, Latency, Node, Perimeter, Stage
from torchrelay.config import component as component_settings
from torchrelay.delivery import reach
from torchrelay.delivery.canary import Block, Judgement, judge, measured, replay
from torchrelay.delivery.replaying import TOLERANCE, replay_on
from torchrelay.delivery.store import Rollout, State
from torchrelay.errors import TorchrelayError, UntrustedError
from torchrelay.gate import RolloutSummary, rollout_report
from torchrelay.handover import RouteShare
from torchrelay.serving.calls import Counted
from torchrelay.serving.gateway_stats import BackendCounts, Key, Reading
from torchrelay.serving.predictions import Comparison, Prediction

Figure = TypeVar("Figure")
log = logging.getLogger(__name__)


class Overdue:
    """Requests that hang: counters know them only when they end, which may be half a minute too late.

    Of the requests that had begun by a moment in the past, at most as many can have ended as have ended by now.
    """

    def __init__(self) -> None:
        self._begun: deque[tuple[float, dict[Key, int]]] = deque()

    def look(
        self, counts: Mapping[Key, BackendCounts], in_flight: Mapping[Key, int], objective: Latency
    ) -> dict[Key, int]:
        """How many requests, at least, each (component, version) has had under way for longer than the objective."""
        now = time.monotonic()
        versions = {*counts, *in_flight}
        ended = {one: counts[one].requests if one in counts else 0 for one in versions}
        self._begun.append((now, {one: ended[one] + in_flight.get(one, 0) for one in versions}))
        past = now - objective.p99_ms / 1000
        while len(self._begun) > 1 and self._begun[1][0] <= past:
            self._begun.popleft()
        when, begun = self._begun[0]
        return {one: max(0, begun.get(one, 0) - ended[one]) for one in versions} if when <= past else {}


class CanaryEvidence:
    """Judges a stage by the component's policy (an `Evidence` of converge)."""

    def __init__(self) -> None:
        self._comparisons: dict[tuple[str, str, float], Comparison] = {}
        self._overdue: dict[tuple[str, str, float], Overdue] = {}

    def gather(self, state: State, perimeter: Perimeter) -> State:
        """The state with one more block of counts, and the judgement on the stage so far."""
        rollout = state.rollout
        if rollout is None:
            return state
        policy = component_settings(state.component)
        try:
            seen = reach.calls(_gateway_node(perimeter)).counted()
            if "first" not in rollout.marks and not _begins(rollout, seen.shares):
                note = "the gateway is about to route by this stage"
                return state.model_copy(update={"rollout": rollout.model_copy(update={"note": note})})
            rollout = self._counted(state, rollout, perimeter, policy, seen)
        except TorchrelayError as error:
            note = f"the gateway could not be asked: {error.found}"
            return state.model_copy(update={"rollout": rollout.model_copy(update={"note": note})})
        stage = _stage(policy, rollout)
        found = judge(policy.rollout, stage, rollout.blocks, time.time() - rollout.since)
        if found.kind == "starved" and policy.rollout.little_traffic == "replay":
            found = self._replayed(rollout, perimeter, policy)
        return state.model_copy(update={"rollout": _judged(rollout, found, stage)})

    def pages(self, state: State, perimeter: str, reason: str, *, passed: bool) -> dict[str, str]:
        """The roll-out's page with its worst disagreements with the live version, and these as JSON."""
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

    def _counted(
        self, state: State, rollout: Rollout, perimeter: Perimeter, policy: Component, seen: Counted
    ) -> Rollout:
        """The roll-out with a block of what was counted since the last look, `marks` saying where that was."""
        reading, asked = seen.reading, seen.in_flight
        if "first" not in rollout.marks:
            rollout = rollout.model_copy(update={"since": time.time()})
        first = Reading.model_validate(rollout.marks["first"]) if "first" in rollout.marks else reading
        counted = reading.since(first)
        shadow = (state.component, rollout.wanted.version) if _stage(policy, rollout).shadow else None
        since = _concerned(counted.versions, counted.copies, shadow)
        in_flight = _concerned(asked.versions, asked.copies, shadow)
        key = (state.component, rollout.wanted.version, rollout.since)
        overdue = self._overdue.setdefault(key, Overdue()).look(since, in_flight, policy.latency)
        totals = _totals(state, rollout, since, overdue, policy.latency)
        before = rollout.marks.get("totals", dict.fromkeys(totals, 0))
        # One that hung has ended before its time is known: what was counted once is not counted again.
        totals = {name: max(value, before[name]) for name, value in totals.items()}
        compared, disagreed, tails = self._compared(state, rollout, perimeter)
        block = _block({name: value - before[name] for name, value in totals.items()}, compared, disagreed)
        return rollout.model_copy(
            update={
                "since": rollout.since,
                "marks": {"first": first.model_dump(mode="json"), "totals": totals, "tails": tails},
                "blocks": (*rollout.blocks, block) if any(block.model_dump().values()) else rollout.blocks,
                "failed": rollout.failed + block.live_errors + (0 if shadow else block.errors),
                "figures": _quantiles(state, rollout, since),
            }
        )

    def _compared(self, state: State, rollout: Rollout, perimeter: Perimeter) -> tuple[int, int, dict[str, Any]]:
        """How many more pairs of answers were compared, how many differed, and how far each node's log was read.

        A node out of reach is read from where it was left once it is back; the others' answers are judged meanwhile.
        """
        component, live = state.component, state.live.version if state.live else ""
        key = (component, rollout.wanted.version, rollout.began)
        if key not in self._comparisons:
            others = {one: kept for one, kept in self._comparisons.items() if one[0] != component}
            self._comparisons = {**others, key: Comparison(rollout.wanted.version, live, TOLERANCE)}
        comparison = self._comparisons[key]
        before = (comparison.compared, comparison.disagreed)
        tails = {}
        lines: list[Prediction] = []
        for node in (one for one in perimeter.nodes if one.holds):
            told = rollout.marks.get("tails", {}).get(node.name)
            try:
                found = reach.calls(node).tail(component, told, rollout.since)
            except UntrustedError:
                raise
            except TorchrelayError as error:
                log.warning("the prediction log of %s was not read: %s", node.name, error.found)
                tails[node.name] = told
                continue
            lines += found.predictions
            tails[node.name] = found.state
        comparison.add(sorted(lines, key=lambda one: one.time))
        return comparison.compared - before[0], comparison.disagreed - before[1], tails

    def _replayed(self, rollout: Rollout, perimeter: Perimeter, policy: Component) -> Judgement:
        """What came is too little: logged requests of this perimeter go to the candidate, straight to an engine."""
        found = replay_on(perimeter, rollout.wanted, policy)
        slow = sum(one > policy.latency.p99_ms for one in found.milliseconds)
        verdict = replay(policy.rollout, found.compared, found.disagreed, found.errors, slow)
        said = f"too little traffic for a decision; {verdict.reason}"
        if verdict.kind != "starved":
            return verdict.model_copy(update={"reason": said})
        return verdict.model_copy(
            update={"kind": "pass", "reason": f"{said} It goes on, on the gate's word and the golden proof alone."}
        )


def _gateway_node(perimeter: Perimeter) -> Node:
    return next(one for one in perimeter.nodes if one.name == perimeter.gateway_node)


def _begins(rollout: Rollout, shares: Iterable[RouteShare]) -> bool:
    """Whether the gateway routes by the stage: before that, what is counted says nothing of it."""
    weight, key = rollout.weights[rollout.stage], (rollout.wanted.component, rollout.wanted.version)
    share = next((one for one in shares if (one.component, one.version) == key), None)
    return share is not None and (share.weight, share.mirror) == (weight, weight == 0)


def _concerned(answered: Mapping[Key, Figure], copies: Mapping[Key, Figure], shadow: Key | None) -> dict[Key, Figure]:
    """Of each version what it is judged on: callers' requests, or, of a shadow, copies of them."""
    if shadow is None:
        return dict(answered)
    found = {key: one for key, one in answered.items() if key != shadow}
    return {**found, shadow: copies[shadow]} if shadow in copies else found


def _stage(policy: Component, rollout: Rollout) -> Stage:
    """The stage of the policy; of a policy that changed meanwhile, one of the same weight."""
    stages = policy.rollout.stages
    weight = rollout.weights[rollout.stage]
    if rollout.stage < len(stages) and stages[rollout.stage].weight == weight:
        return stages[rollout.stage]
    return Stage(weight=weight)


def _totals(
    state: State,
    rollout: Rollout,
    since: Mapping[Key, BackendCounts],
    overdue: Mapping[Key, int],
    objective: Latency,
) -> dict[str, int]:
    """Requests, failed, timed and slow ones of both versions since the stage began; an overdue one is slow already."""
    found = {}
    versions = {"": rollout.wanted.version, "live_": state.live.version if state.live else ""}
    for prefix, version in versions.items():
        counts = since.get((state.component, version), BackendCounts())
        late = overdue.get((state.component, version), 0)
        found[f"{prefix}requests"] = counts.requests + late
        found[f"{prefix}errors"] = counts.errors
        found[f"{prefix}timed"] = counts.timed + late
        found[f"{prefix}slow"] = counts.slower_than(objective.p99_ms) + late
    return found


def _block(counted: Mapping[str, int], compared: int, disagreed: int) -> Block:
    """One block. Figures that Envoy keeps one after the other: no more can be slow, or fail, than were counted.

    Times follow the other figures by a moment, also from one stage into the next, so they have a count of their own.
    """
    wholes = {"errors": "requests", "slow": "timed"}
    capped = dict(counted)
    for prefix in ("", "live_"):
        for part, whole in wholes.items():
            capped[f"{prefix}{part}"] = min(counted[f"{prefix}{part}"], counted[f"{prefix}{whole}"])
    return Block(**capped, compared=compared, disagreed=disagreed)


def _name(stage: Stage) -> str:
    return "Shadow" if stage.shadow else f"{stage.weight} %"


def _quantiles(state: State, rollout: Rollout, counts: Mapping[Key, BackendCounts]) -> dict[str, float]:
    """p99 in ms of both versions over the stage, where it is known."""
    versions = {"p99_ms": rollout.wanted.version, "live_p99_ms": state.live.version if state.live else ""}
    found = {
        name: counts[state.component, version].quantile(0.99)
        for name, version in versions.items()
        if (state.component, version) in counts
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _judged(rollout: Rollout, found: Judgement, stage: Stage) -> Rollout:
    judgement = found.kind if found.kind in ("pass", "breach") else "bake"
    note = found.reason
    if found.kind == "starved":
        note = f"{found.reason} It waits, as the policy says (little_traffic: wait)."
    figures = {**rollout.figures, **{name: value for name, value in found.figures.items() if value is not None}}
    passed = rollout.passed
    if judgement == "pass":
        passed = f"{passed}\n{_name(stage)}: {measured(figures)}{note}".strip()
    return rollout.model_copy(update={"judgement": judgement, "note": note, "figures": figures, "passed": passed})
