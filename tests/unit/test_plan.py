"""The decision core of converge: an alias is a request, and only an admitted version is wanted."""

import json

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from torchrelay.config import Serving
from torchrelay.delivery.plan import Candidate, Claim, decide, desired, refusal, serves, wanted_version
from torchrelay.handover import ServedVersion
from torchrelay.lineage import TAG_ARCHIVE_URL, TAG_DIGEST, TAG_ENVIRONMENT, TAG_PROOF, TAG_SERVING, TAG_VERDICT


def candidate(version: str = "1", **changes: str) -> Candidate:
    tags = {
        TAG_VERDICT: "pass",
        TAG_DIGEST: "d" * 64,
        TAG_PROOF: "d" * 64,
        TAG_ARCHIVE_URL: "http://127.0.0.1:1/a",
        TAG_ENVIRONMENT: "py311-cpu-0",
        TAG_SERVING: json.dumps(Serving().model_dump()),
        **changes,
    }
    return Candidate("tiny", version, {key: value for key, value in tags.items() if value})


def test_a_passed_signed_and_proven_version_is_admitted() -> None:
    assert refusal(candidate()) is None


def test_each_missing_proof_refuses_with_its_own_reason() -> None:
    reasons = {
        refusal(candidate(**{TAG_VERDICT: ""})),
        refusal(candidate(**{TAG_VERDICT: "refuse"})),
        refusal(candidate(**{TAG_DIGEST: ""})),
        refusal(candidate(**{TAG_PROOF: ""})),
    }
    assert None not in reasons
    assert len(reasons) == 4


def test_a_proof_of_another_archive_does_not_count() -> None:
    assert "not proven" in (refusal(candidate(**{TAG_PROOF: "e" * 64})) or "")


def test_a_refused_request_leaves_what_is_live_wanted() -> None:
    live = candidate("3")
    decision = decide(Claim("tiny", candidate("4", **{TAG_VERDICT: "refuse"}), live))
    assert decision.wanted == live
    assert decision.refused is not None
    assert decision.refused.version == "4"


def test_no_request_wants_nothing() -> None:
    assert decide(Claim("tiny", None, candidate())).wanted is None


def test_the_desired_state_needs_nothing_but_the_registry() -> None:
    wanted = wanted_version(candidate(**{TAG_SERVING: json.dumps({"workers": 3})}))
    assert wanted.workers == 3
    assert desired("dev", [decide(Claim("tiny", candidate(), None))]).components[0].version == "1"


@given(healthy=st.booleans(), version=st.sampled_from(["1", "2"]), digest=st.sampled_from(["d" * 64, "e" * 64]))
def test_a_node_serves_what_is_wanted_only_in_good_health_and_with_the_very_digest(
    healthy: bool, version: str, digest: str
) -> None:
    served = ServedVersion(component="tiny", version=version, digest=digest, healthy=healthy)
    assert serves(candidate("1"), served) == (healthy and version == "1" and digest == "d" * 64)


class Perimeter(RuleBasedStateMachine):
    """Any history of requests, kills and converges: only an admitted version ever serves."""

    def __init__(self) -> None:
        super().__init__()
        self.requested: Candidate | None = None
        self.live: Candidate | None = None
        self.serving: Candidate | None = None
        self.count = 0

    @rule(good=st.booleans())
    def request_a_new_version(self, good: bool) -> None:
        self.count += 1
        self.requested = candidate(str(self.count), **({} if good else {TAG_VERDICT: "refuse"}))

    @rule(stops_before_alias=st.booleans(), node_is_down=st.booleans())
    def converge(self, stops_before_alias: bool, node_is_down: bool) -> None:
        wanted = decide(Claim("tiny", self.requested, self.live)).wanted
        if node_is_down or wanted is None:
            return
        self.serving = wanted
        if not stops_before_alias:
            self.live = wanted

    @rule()
    def the_node_forgets_everything(self) -> None:
        self.serving = None

    @invariant()
    def only_admitted_versions_serve(self) -> None:
        for found in (self.serving, self.live):
            assert found is None or refusal(found) is None

    @invariant()
    def one_undisturbed_converge_reaches_the_goal(self) -> None:
        wanted = decide(Claim("tiny", self.requested, self.live)).wanted
        again = decide(Claim("tiny", self.requested, wanted)).wanted
        assert again == wanted


TestPerimeter = Perimeter.TestCase
