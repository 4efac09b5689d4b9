import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchrelay.config import Rollout, Stage
from torchrelay.delivery.canary import Block, Judgement, alpha_share, judge, replay

POLICY = Rollout()
SHADOW, SMALL, LARGE = POLICY.stages
CLEAN = Block(requests=20, live_requests=20, compared=20)
COUNT = st.integers(0, 30)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    requests, live, compared = draw(COUNT), draw(COUNT), draw(COUNT)
    parts = [draw(st.integers(0, whole)) for whole in (requests, requests, live, live, compared)]
    names = ("errors", "slow", "live_errors", "live_slow", "disagreed")
    return Block(requests=requests, live_requests=live, compared=compared, **dict(zip(names, parts, strict=True)))


def test_the_shares_of_every_rule_stage_and_replay_add_up_to_alpha():
    for count in range(6):
        policy = Rollout(stages=(SMALL,) * count, alpha=0.01)
        assert alpha_share(policy) * 3 * 2 * max(1, count) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("stage", "counts", "baked_s", "kind", "says"),
    [
        (SMALL, [], 0, "bake", "0 of 20 s and 0 requests (a decision needs 50)"),
        (SMALL, [CLEAN] * 10, 19.9, "bake", "200 requests"),
        (SMALL, [CLEAN] * 2, 20, "starved", "Only 40 of 50 requests came in 20 s"),
        (SMALL, [], 1000, "starved", "Only 0 of 50"),
        (SMALL, [CLEAN] * 3, 20, "pass", "60 requests"),
        (SHADOW, [CLEAN] * 3, 20, "pass", "60 compared answers"),
        (SHADOW, [Block(requests=60, live_requests=60, compared=49)], 20, "starved", "Only 49 of 50 compared answers"),
        (SMALL, [Block(requests=50)], 20, "pass", "50 requests"),
        (Stage(weight=50, bake_s=0, min_requests=0), [], 0, "pass", "0 requests"),
    ],
)
def test_a_stage_without_a_breach(stage, counts, baked_s, kind, says):
    judgement = judge(POLICY, stage, counts, baked_s)
    assert (judgement.kind, judgement.rule) == (kind, None)
    assert says in judgement.reason


def test_a_stage_goes_on_while_a_rule_is_halfway_to_a_breach():
    """The next one would serve five times as much of what may be bad."""
    stage = Stage(weight=5, bake_s=1, min_requests=5)
    doubtful = Block(requests=10, live_requests=190, compared=10, disagreed=7)
    found = judge(POLICY, stage, [doubtful], 20)
    assert (found.kind, found.rule) == ("bake", None)
    assert "may be broken: 7 of 10 compared answers" in found.reason
    assert judge(POLICY, stage, [doubtful, *[CLEAN] * 20], 20).kind == "pass"
    assert judge(POLICY, stage, [doubtful, doubtful], 20).kind == "breach"


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("errors", {"requests": 20, "errors": 20, "live_requests": 20}),
        ("latency", {"requests": 20, "slow": 20, "live_requests": 20}),
        ("disagreement", {"requests": 20, "live_requests": 20, "compared": 20, "disagreed": 20}),
    ],
)
def test_a_breach_comes_before_everything_else_and_names_its_rule_and_figures(rule, bad):
    for baked_s in (0, 1000):
        judgement = judge(POLICY, SHADOW, [CLEAN, Block(**bad)], baked_s)
        assert (judgement.kind, judgement.rule) == ("breach", rule)
        assert judgement.reason.startswith(f"Rule {rule} is broken: 20 of 40 ")
        assert judgement.figures[f"{rule}_rate"] == 0.5
        assert judgement.figures[f"{rule}_evidence"] >= judgement.figures["evidence_needed"]


def test_the_reason_shows_the_live_version_beside():
    block = Block(requests=30, errors=24, live_requests=70, live_errors=1)
    assert judge(POLICY, LARGE, [block], 1).reason == (
        "Rule errors is broken: 24 of 30 requests failed, 1 of 70 of the live version's; 1.0% more may "
        "(by chance in at most one of 180,000 stages)."
    )


@pytest.mark.parametrize("rule", ["errors", "slow"])
@pytest.mark.parametrize("a_poll", range(1, 16))
@pytest.mark.parametrize("live_each", [0, 1, 3, 19])
def test_a_candidate_of_which_every_request_is_bad_is_stopped_within_fifteen(rule, a_poll, live_each):
    """With no live traffic beside, as much (shadow), three times as much (25 %), or 19 times (5 %)."""
    block = Block(requests=a_poll, live_requests=a_poll * live_each, **{rule: a_poll})
    count = math.ceil(15 / a_poll)
    assert judge(POLICY, SMALL, [block] * count, 0).kind == "breach"
    assert judge(POLICY, SMALL, [block] * (3 // a_poll), 0).kind == "bake", "three are not enough for anything"


def test_where_the_live_version_gets_a_tenth_it_takes_fifty():
    poll = Block(requests=9, errors=9, live_requests=1)
    assert judge(POLICY, Stage(weight=90), [poll] * 6, 0).kind == "breach"


def test_answers_that_all_differ_are_stopped_within_ten():
    assert judge(POLICY, SHADOW, [Block(requests=1, compared=1, disagreed=1)] * 10, 0).kind == "breach"


def test_once_breached_a_stage_stays_so():
    broken = [Block(requests=15, errors=15, live_requests=15)]
    assert judge(POLICY, LARGE, broken + [CLEAN] * 500, 1000).kind == "breach"


@pytest.mark.parametrize("kind", ["errors", "slow"])
def test_faults_that_the_live_version_shares_stop_nobody(kind):
    outage = Block(requests=5, live_requests=15, **{kind: 5, f"live_{kind}": 15})
    assert judge(POLICY, LARGE, [CLEAN, *[outage] * 20], 20).kind == "pass"
    other = "live_slow" if kind == "errors" else "live_errors"
    alone = Block(requests=5, live_requests=15, **{kind: 5, other: 15})
    assert judge(POLICY, LARGE, [CLEAN, *[alone] * 20], 20).kind == "breach", "another fault of it is no excuse"


@given(st.lists(blocks(), max_size=8), st.sampled_from(POLICY.stages), st.floats(0, 100))
def test_the_same_blocks_give_the_same_judgement_which_survives_json(history, stage, baked_s):
    judgement = judge(POLICY, stage, history, baked_s)
    stored = [Block.model_validate_json(block.model_dump_json()) for block in history]
    assert judge(POLICY, stage, stored, baked_s) == judgement
    assert Judgement.model_validate_json(judgement.model_dump_json()) == judgement
    json.dumps(judgement.figures, allow_nan=False)
    assert (judgement.rule is None) == (judgement.kind != "breach")


@given(st.lists(blocks(), max_size=8), blocks())
def test_more_blocks_never_undo_a_breach(history, another):
    if judge(POLICY, LARGE, history, 20).kind == "breach":
        assert judge(POLICY, LARGE, [*history, another], 21).kind == "breach"


def test_rules_that_allow_everything_never_break():
    policy = Rollout(max_error_excess=1, max_slow_excess=1, max_disagreement=1)
    worst = Block(requests=50, errors=50, slow=50, live_requests=50, compared=50, disagreed=50)
    assert judge(policy, SHADOW, [worst] * 20, 20).kind == "pass"


def test_no_disagreement_at_all_can_be_asked_for():
    policy = Rollout(max_disagreement=0)
    one = Block(requests=100, compared=100, disagreed=1)
    assert judge(policy, SHADOW, [CLEAN] * 50, 20).kind == "pass"
    assert judge(policy, SHADOW, [CLEAN, one], 20).rule == "disagreement"


@pytest.mark.parametrize(
    "counts",
    [
        {"requests": 1, "errors": 2},
        {"requests": 1, "slow": 2},
        {"requests": 2, "timed": 1, "slow": 2},
        {"live_requests": 1, "live_errors": 2},
        {"live_requests": 1, "live_slow": 2},
        {"compared": 1, "disagreed": 2},
        {"requests": -1},
    ],
)
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(ValidationError):
        Block(**counts)


def test_a_replay_of_good_answers_passes_and_says_what_was_replayed():
    judgement = replay(POLICY, compared=198, disagreed=4, errors=2, slow=3)
    assert (judgement.kind, judgement.figures["requests"]) == ("pass", 200)
    assert judgement.reason == "Replay of 200 logged requests: 2 failed, 3 were slow, 4 of 198 answers differ."


@pytest.mark.parametrize(
    ("counts", "rule"),
    [
        ({"compared": 160, "disagreed": 0, "errors": 40, "slow": 0}, "errors"),
        ({"compared": 200, "disagreed": 0, "errors": 0, "slow": 60}, "latency"),
        ({"compared": 200, "disagreed": 80, "errors": 0, "slow": 0}, "disagreement"),
        ({"compared": 0, "disagreed": 0, "errors": 15, "slow": 0}, "errors"),
    ],
)
def test_a_replay_of_bad_answers_is_a_breach(counts, rule):
    judgement = replay(POLICY, **counts)
    assert (judgement.kind, judgement.rule) == ("breach", rule)


def test_a_replay_of_nothing_does_not_pass():
    assert replay(POLICY, 0, 0, 0, 0).kind == "starved"


def test_good_roll_outs_are_stopped_at_most_as_often_as_alpha_says():
    """Whole roll-outs, all rules, at the edge of each of them, judged after every poll."""
    policy, rng, runs = Rollout(alpha=0.2), random.Random(1), 150
    stopped = sum(any(stage_stops(policy, stage, rng) for stage in policy.stages) for _ in range(runs))
    assert stopped <= policy.alpha * runs


def stage_stops(policy: Rollout, stage: Stage, rng: random.Random) -> bool:
    """Whether the judgement after the last of 20 polls is a breach, and so whether any before it was."""
    history = [polled(policy, stage, rng) for _ in range(20)]
    return judge(policy, stage, history, stage.bake_s).kind == "breach"


def polled(policy: Rollout, stage: Stage, rng: random.Random) -> Block:
    """One poll of 40 requests, with a live version that fails 1 % and is slow on 2 %."""

    def bad(count: int, rate: float) -> int:
        return sum(rng.random() < rate for _ in range(count))

    requests = 40 if stage.shadow else bad(40, stage.weight / 100)
    live, compared = 40 if stage.shadow else 40 - requests, 40 if stage.shadow else 0
    return Block(
        requests=requests,
        errors=bad(requests, 0.01 + policy.max_error_excess),
        slow=bad(requests, 0.02 + policy.max_slow_excess),
        live_requests=live,
        live_errors=bad(live, 0.01),
        live_slow=bad(live, 0.02),
        compared=compared,
        disagreed=bad(compared, policy.max_disagreement),
    )
