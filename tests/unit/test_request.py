"""The road of a request, with the control node's real memory, a registry in memory and no orchestrator but the test."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from torchrelay.cli import promote
from torchrelay.config import Node, Perimeter, Site, TrackingServer
from torchrelay.delivery import request
from torchrelay.delivery.store import Admission, Rollout, Served, State, Store
from torchrelay.errors import RefusedError, ServingError
from torchrelay.handover import WantedVersion
from torchrelay.lineage import TAG_ARCHIVE_URL, TAG_DIGEST, TAG_ENVIRONMENT, TAG_PROOF, TAG_SERVING, TAG_VERDICT
from torchrelay.tracking import ModelVersion


def _wanted(version: str) -> WantedVersion:
    return WantedVersion(
        component="digits",
        version=version,
        digest=f"d{version}",
        environment="e",
        url="http://x",
        workers=1,
        batch_size=1,
        max_batch_delay_ms=1,
        response_timeout_s=1,
        max_body_bytes=1024,
    )


def _model(version: str, **tags: str) -> ModelVersion:
    passed = {TAG_VERDICT: "pass", TAG_DIGEST: f"d{version}", TAG_PROOF: f"d{version}", TAG_ARCHIVE_URL: "http://x"}
    passed |= {TAG_ENVIRONMENT: "py311-cpu-0", TAG_SERVING: "{}"}
    return ModelVersion(
        name="digits", version=version, run_id="r", source="s", status="READY", tags={**passed, **tags}, aliases=()
    )


def _refusal(version: str, reason: str, policy: str = "policy") -> Admission:
    return Admission(
        component="digits", version=version, digest=f"d{version}", policy=policy, admitted=False, reason=reason, at=1.0
    )


class Rig:
    """Production with version 1 live, and what its orchestrator would do when it is woken."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = Store(folder / "control.db")
        self.there: dict[str, str] = {"production": "1"}
        self.refused: list[str] = []
        self.on_wake: Callable[[], None] = lambda: None
        node = Node(name="n1", folder=folder)
        place = Perimeter(
            alias="production",
            gateway="http://x",
            nodes=(node,),
            gateway_node="n1",
            keeps_last=True,
            orchestrator="http://o",
            poll_s=1,
        )
        self.site = Site(supervisor=folder, tracking=TrackingServer(url="http://x"), perimeters={"production": place})
        monkeypatch.setattr(request, "store", lambda _name: self.memory)
        monkeypatch.setattr(request, "Tracking", lambda _url: self)
        monkeypatch.setattr(request, "record_refusal", lambda _s, _n, _v, reason: self.refused.append(reason))
        monkeypatch.setattr(request, "_gatekeeper", lambda *_: self)
        monkeypatch.setattr(request, "wake", lambda _place: self.on_wake())
        monkeypatch.setattr(request, "settings", lambda: type("S", (), {"state": folder}))
        self.save(live=_wanted("1"))

    def policy(self, _version: ModelVersion) -> str:
        return "policy"

    def passing(self, _version: ModelVersion) -> str:
        return "committed"

    def set_alias(self, _name: str, alias: str, version: str) -> None:
        self.there[alias] = version

    def delete_alias(self, _name: str, alias: str) -> None:
        del self.there[alias]

    def aliases(self, _name: str) -> dict[str, str]:
        return self.there

    def save(self, **changes: Any) -> None:
        with self.memory.lease(5) as token:
            state = self.memory.state("digits").model_copy(update=changes)
            self.memory.save(State.model_validate(state.model_dump()), token)

    def decide(self, admission: Admission) -> None:
        with self.memory.lease(5) as token:
            self.memory.decide(admission, token)

    def deploy(self, version: str, **more: Any) -> None:
        request.deploy(self.site, "production", _model(version), why="test", **more)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def _rollout(version: str, stage: int, note: str) -> Rollout:
    return Rollout(
        wanted=_wanted(version),
        kind="rollout",
        policy="policy",
        who="w",
        why="y",
        began=1.0,
        stage=stage,
        since=1.0,
        weights=(0, 5),
        note=note,
        figures={"requests": 40, "errors_rate": 0.5, "live_errors_rate": 0.0},
    )


def test_it_follows_the_rollout_until_the_version_is_live(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    def roll_out() -> None:
        for stage in (-1, 0, 1, 2):
            rig.save(rollout=_rollout("2", stage, f"stage {stage}"))
            time.sleep(0.5)
        rig.save(live=_wanted("2"), rollout=None)

    rig.on_wake = threading.Thread(target=roll_out).start
    rig.deploy("2", timeout_s=20)
    assert rig.memory.state("digits").live == _wanted("2")
    assert rig.there == {"production": "2"}
    said = [line.split()[0] for line in capsys.readouterr().err.splitlines() if "stage" in line]
    assert said == ["loading", "shadow", "5", "100"]


def test_what_the_orchestrator_turns_down_is_an_error_that_says_what_serves(rig: Rig) -> None:
    rig.on_wake = lambda: rig.save(refused=_refusal("2", "too slow"))
    with pytest.raises(RefusedError, match="turned version 2 down and serves version 1, as before: too slow"):
        rig.deploy("2", timeout_s=20)


def test_a_refusal_of_before_counts_only_when_it_stands(rig: Rig) -> None:
    """The policy has changed since: the orchestrator takes its refusal back when it looks again."""
    rig.save(refused=_refusal("2", "too slow", policy="older"))

    def look_again() -> None:
        time.sleep(0.5)
        rig.save(refused=None, live=_wanted("2"))

    rig.on_wake = threading.Thread(target=look_again).start
    rig.deploy("2", timeout_s=20)
    rig.save(refused=_refusal("3", "too slow", policy="older"))
    rig.on_wake = lambda: None
    with pytest.raises(RefusedError, match="too slow"):
        rig.deploy("3", timeout_s=20)


def test_a_slow_orchestrator_is_named_with_its_log_and_the_request_stands(rig: Rig) -> None:
    with pytest.raises(ServingError, match="version 2 after 1 s") as caught:
        rig.deploy("2", timeout_s=1)
    assert "production-orchestrator.log" in caught.value.next_command
    assert rig.there == {"production": "2"}


def test_without_patience_it_asks_and_returns(rig: Rig) -> None:
    rig.deploy("2", timeout_s=0)
    assert rig.there == {"production": "2"}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_model("2", **{TAG_VERDICT: "refuse"}), "the gate refused it"),
        (_model("2", **{TAG_PROOF: "other"}), "not proven"),
        (_model("3"), "production refused it before: uncommitted"),
        (_model("4"), "production refused it before: worse"),
    ],
)
def test_what_may_not_go_moves_nothing_and_is_in_the_ledger(rig: Rig, model: ModelVersion, reason: str) -> None:
    rig.decide(_refusal("3", "uncommitted", policy="committed"))
    rig.decide(_refusal("4", "worse"))
    with pytest.raises(RefusedError, match=reason):
        request.deploy(rig.site, "production", model, why="test", timeout_s=5)
    assert rig.there == {"production": "1"}
    assert len(rig.refused) == 1


def test_what_served_here_needs_no_other_decision(rig: Rig) -> None:
    rig.decide(_refusal("2", "worse"))
    rig.save(served=(Served(wanted=_wanted("2"), since=1.0),))
    rig.on_wake = lambda: rig.save(live=_wanted("2"))
    rig.deploy("2", timeout_s=20)
    assert rig.refused == []


def test_what_served_here_is_gone_back_to_whatever_its_tags_say_by_now(rig: Rig) -> None:
    rig.save(served=(Served(wanted=_wanted("2"), since=1.0),))
    rig.on_wake = lambda: rig.save(live=_wanted("2"))
    request.deploy(rig.site, "production", _model("2", **{TAG_VERDICT: "refuse"}), why="test", timeout_s=20)
    assert rig.refused == []


def test_it_stops_following_when_somebody_asks_for_another_version(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "_SAY_EVERY_S", 0.1)

    def overtake() -> None:
        rig.there["production"] = "3"

    rig.on_wake = overtake
    with pytest.raises(RefusedError, match="asked production for version 3 of digits instead of version 2"):
        rig.deploy("2", timeout_s=20)


@pytest.mark.parametrize(
    ("underway", "version", "expected"),
    [(False, None, "0"), (True, None, "1"), (True, "1", "1"), (True, "0", "0"), (False, "1", None)],
)
def test_the_way_back_is_what_serves_while_another_version_rolls_out(
    underway: bool, version: str | None, expected: str | None
) -> None:
    state = State(component="digits", live=_wanted("1"), served=(Served(wanted=_wanted("0"), since=1.0),))
    with nullcontext() if expected else pytest.raises(RefusedError, match="none that served"):
        assert promote._rollback_target(state, "production", version, underway=underway) == expected


def test_what_is_live_is_asked_for_again_in_place_of_another_request(rig: Rig) -> None:
    rig.there = {"production": "9"}
    rig.deploy("1", timeout_s=20)
    assert rig.there == {"production": "1"}


def test_where_something_always_serves_a_withdrawal_is_refused(rig: Rig) -> None:
    with pytest.raises(RefusedError, match="goes on with it when @production is deleted"):
        request.withdraw(rig.site, "production", "digits", why="test", timeout_s=1)
    assert rig.there == {"production": "1"}


def test_a_request_that_never_went_live_can_be_withdrawn(rig: Rig) -> None:
    rig.save(live=None)
    request.withdraw(rig.site, "production", "digits", why="test")
    assert rig.there == {}
    request.withdraw(rig.site, "production", "digits", why="test")
