"""What a stage is judged on: requests that hang are counted before they end, and never twice."""

import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config import Latency, Stage
from torchrelay.config import Rollout as Policy
from torchrelay.delivery import evidence
from torchrelay.delivery.canary import judge
from torchrelay.delivery.evidence import CanaryEvidence, Overdue, _begins, _block, _concerned, _totals
from torchrelay.delivery.sequential import Sample
from torchrelay.delivery.store import Rollout, State
from torchrelay.errors import ServingError
from torchrelay.handover import RouteShare, WantedVersion
from torchrelay.serving.gateway_stats import BackendCounts, Bucket

KEY, LIVE = ("tiny", "2"), ("tiny", "1")
OBJECTIVE = Latency(p99_ms=1000)


def wanted(version: str) -> WantedVersion:
    return WantedVersion(
        component="tiny",
        version=version,
        digest="d",
        environment="e",
        url="u",
        workers=1,
        batch_size=1,
        max_batch_delay_ms=1,
        response_timeout_s=30,
        max_body_bytes=1024,
    )


ROLLOUT = Rollout(
    wanted=wanted("2"), kind="rollout", policy="p", who="w", why="y", began=0, stage=0, since=0, weights=(0, 5)
)
STATE = State(component="tiny", live=wanted("1"), rollout=ROLLOUT)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(evidence.time, "monotonic", lambda: self.now)


def counts(requests: int, slow: int = 0) -> dict[tuple[str, str], BackendCounts]:
    bars = (
        Bucket(lower_ms=5, width_ms=1, requests=requests - slow),
        Bucket(lower_ms=2000, width_ms=100, requests=slow),
    )
    return {KEY: BackendCounts(requests=requests, latency=tuple(bar for bar in bars if bar.requests))}


def test_a_request_that_hangs_counts_as_slow_once_it_is_over_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, overdue = Clock(monkeypatch), Overdue()
    assert overdue.look(counts(0), {KEY: 3}, OBJECTIVE) == {}
    clock.now += 0.5
    assert overdue.look(counts(0), {KEY: 3}, OBJECTIVE) == {}
    clock.now += 0.6
    assert overdue.look(counts(0), {KEY: 3}, OBJECTIVE) == {KEY: 3}
    clock.now += 1
    assert overdue.look(counts(1, slow=1), {KEY: 2}, OBJECTIVE) == {KEY: 2}


def test_a_busy_version_whose_requests_end_in_time_has_none_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, overdue = Clock(monkeypatch), Overdue()
    for answered in range(0, 1000, 50):
        assert overdue.look(counts(answered), {KEY: 8}, OBJECTIVE).get(KEY, 0) == 0
        clock.now += 0.5


def test_what_was_counted_while_it_hung_is_not_counted_again_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, overdue = Clock(monkeypatch), Overdue()
    overdue.look(counts(0), {KEY: 2}, OBJECTIVE)
    clock.now += 2
    hanging = _totals(STATE, ROLLOUT, counts(0), overdue.look(counts(0), {KEY: 2}, OBJECTIVE), OBJECTIVE)
    clock.now += 20
    ended = counts(2, slow=2)
    after = _totals(STATE, ROLLOUT, ended, overdue.look(ended, {KEY: 0}, OBJECTIVE), OBJECTIVE)
    assert (hanging["requests"], hanging["slow"]) == (2, 2) == (after["requests"], after["slow"])


@given(
    st.fixed_dictionaries(
        {f"{p}{n}": st.integers(0, 50) for p in ("", "live_") for n in ("requests", "errors", "timed", "slow")}
    )
)
def test_a_block_is_always_one_that_can_be(counted: dict[str, int]) -> None:
    block = _block(counted, compared=3, disagreed=1)
    assert block.errors <= block.requests
    assert block.live_slow <= (block.live_timed or 0)


def test_a_time_that_comes_late_is_told_of_the_requests_that_it_is_of() -> None:
    """Nine slow requests of the stage before become known when nine fast ones of this one were counted."""
    counted = {"requests": 9, "errors": 0, "timed": 160, "slow": 9}
    block = _block(counted | {f"live_{name}": value for name, value in counted.items()}, compared=0, disagreed=0)
    assert block.times[0] == Sample(160, 9)
    assert judge(Policy(), Stage(weight=5), [block], 5).kind != "breach"


def share(weight: int, mirror: bool = False) -> RouteShare:
    return RouteShare(component="tiny", version="2", digest="d", weight=weight, mirror=mirror)


@pytest.mark.parametrize(
    ("stage", "routed", "begins"),
    [
        (0, None, False),
        (0, share(0, mirror=True), True),
        (0, share(5), False),
        (1, share(0, mirror=True), False),
        (1, share(5), True),
        (2, share(25), True),
    ],
)
def test_a_stage_begins_when_it_is_routed(stage: int, routed: RouteShare | None, begins: bool) -> None:
    rollout = ROLLOUT.model_copy(update={"stage": stage, "since": time.time(), "weights": (0, 5, 25)})
    assert _begins(rollout, [routed] if routed else []) is begins


@pytest.mark.parametrize(("shadow", "found"), [(None, {KEY: 5, LIVE: 90}), (KEY, {KEY: 70, LIVE: 90})])
def test_a_shadow_is_judged_on_copies_and_everything_else_on_callers_requests(
    shadow: tuple[str, str] | None, found: dict[tuple[str, str], int]
) -> None:
    assert _concerned({KEY: 5, LIVE: 90}, {KEY: 70, LIVE: 3}, shadow) == found
    assert _concerned({LIVE: 90}, {}, KEY) == {LIVE: 90}


class Counting:
    """A gateway's figures: every request to the candidate fails."""

    versions: ClassVar = {KEY: BackendCounts(requests=500, errors=500), LIVE: BackendCounts(requests=9500)}
    copies: ClassVar[dict[tuple[str, str], BackendCounts]] = {}

    def since(self, _first: object) -> "Counting":
        return self

    def model_dump(self, mode: str) -> dict[str, object]:
        return {}


@pytest.mark.parametrize("dead", [False, True])
def test_a_breach_is_seen_though_the_log_of_a_node_cannot_be_read(dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = SimpleNamespace(
        gateway_node="gw", nodes=[SimpleNamespace(name=n, holds=n != "gw") for n in ("gw", "a", "b")]
    )

    def tail(node: str) -> SimpleNamespace:
        if dead and node == "b":
            raise ServingError("node b is out of reach", "an answer", "make status")
        return SimpleNamespace(predictions=(), state={node: 7})

    asked = SimpleNamespace(versions={}, copies={})
    seen = SimpleNamespace(reading=Counting(), in_flight=asked, shares=[share(5)])

    def calls(node: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(counted=lambda: seen, tail=lambda *_: tail(node.name))

    monkeypatch.setattr(evidence.reach, "calls", calls)
    monkeypatch.setattr(evidence.Reading, "model_validate", lambda _: Counting())
    policy = SimpleNamespace(rollout=Policy(), latency=OBJECTIVE)
    monkeypatch.setattr(evidence, "component_settings", lambda _: policy)
    zero = {f"{p}{n}": 0 for p in ("", "live_") for n in ("requests", "errors", "timed", "slow")}
    marks = {"first": {}, "totals": zero, "tails": {"a": {"a": 1}, "b": {"b": 2}}}
    rollout = ROLLOUT.model_copy(update={"stage": 1, "since": time.time() - 60, "marks": marks})
    found = CanaryEvidence().gather(STATE.model_copy(update={"rollout": rollout}), place).rollout  # type: ignore[arg-type]
    assert found is not None
    assert found.judgement == "breach"
    assert found.marks["tails"] == {"a": {"a": 7}, "b": {"b": 2} if dead else {"b": 7}}
