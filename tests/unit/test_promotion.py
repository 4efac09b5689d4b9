import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from torchrelay.config import Component, Golden, Latency, Metric, Rollout, Serving
from torchrelay.gate import Disagreement, Evidence, PromotionVerdict, Replay, policy_hash, promote, promotion_report
from torchrelay.gate.chance import at_least, mean_interval, share_interval
from torchrelay.handover import Evaluation

SIGNATURE = {"inputs": '[{"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, 28, 28]}}]'}
SIGNATURE["outputs"] = '[{"type": "long", "name": "class", "required": true}]'


def component(
    *,
    floor: float = 0.5,
    allowed: float | None = 0.01,
    slice_allowed: float | None = 0.05,
    alpha: float = 1e-4,
    task: str = "classification",
    **rollout: float,
) -> Component:
    return Component(
        name="tiny",
        description="d",
        task=task,
        data="d",
        metric=Metric(floor=floor, allowed_regression=allowed, allowed_slice_regression=slice_allowed),
        rollout=Rollout(alpha=alpha, **rollout),
    )


def evaluation(scores: list[float], classes: list[str] | None = None, test_set: str = "a" * 64) -> Evaluation:
    return Evaluation(test_set=test_set, scores=scores, slices={"class": classes} if classes else {})


def hits(right: int, of: int) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def evidence(candidate: Evaluation | None = None, live: Evaluation | None = None, **more: object) -> Evidence:
    """What is gathered of a good version, but for `more`."""
    good: dict[str, object] = {
        "candidate": candidate or evaluation(hits(900, 1000)),
        "live": live,
        "live_version": "7" if live else None,
        "signature_candidate": SIGNATURE,
        "signature_live": SIGNATURE if live else None,
        "proof_difference": 1e-6,
        "proof_tolerance": 1e-4,
        "latencies_ms": [5.0] * 200,
        "replay": Replay(compared=200, disagreed=3),
    }
    return Evidence(**{**good, **more})


def judged(found: Evidence, policy: Component | None = None) -> PromotionVerdict:
    """The verdict, which must survive JSON and have a page, whatever it says."""
    policy = policy or component()
    verdict = promote(policy, "8", found)
    assert PromotionVerdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert promotion_report(verdict, found).encode()
    assert (verdict.verdict == "refuse") == bool(verdict.reasons)
    return verdict


def compared(ours: list[float], theirs: list[float], **more: object) -> Evidence:
    return evidence(evaluation(ours), evaluation(theirs), **more)


def outcomes(verdict: PromotionVerdict) -> dict[str, str]:
    return {check.name: check.outcome for check in verdict.checks}


# The whole


def test_a_good_version_passes_every_check():
    verdict = judged(
        evidence(evaluation(hits(910, 1000), ["a", "b"] * 500), evaluation(hits(900, 1000), ["a", "b"] * 500))
    )
    assert (verdict.verdict, verdict.reasons, verdict.warnings) == ("pass", (), ())
    assert set(outcomes(verdict).values()) == {"passed"}
    assert (verdict.component, verdict.version, verdict.live_version, verdict.metric) == ("tiny", "8", "7", "accuracy")
    assert verdict.policy == policy_hash(component())


def test_the_first_promotion_counts_what_stands_by_itself():
    verdict = judged(evidence(replay=Replay()))
    skipped = {name for name, outcome in outcomes(verdict).items() if outcome == "skipped"}
    assert (verdict.verdict, skipped) == ("pass", {"signature", "regression", "slices", "replay"})
    assert verdict.check("regression").detail == "nothing is live yet"


def test_every_fault_is_named_in_one_verdict():
    found = compared(
        hits(300, 1000),
        hits(900, 1000),
        signature_candidate=None,
        proof_difference=0.5,
        latencies_ms=[500.0] * 60,
        replay=Replay(compared=100, disagreed=90),
        provenance_faults=["model.py is not committed", "handler.py is not committed"],
    )
    verdict = judged(found)
    refused = {name for name, outcome in outcomes(verdict).items() if outcome == "refused"}
    assert refused == {"provenance", "golden", "signature", "floor", "regression", "latency", "replay"}
    assert len(verdict.reasons) == 8
    assert "model.py is not committed" in verdict.reasons


def test_of_an_archive_that_was_not_run_only_its_code_is_refused():
    found = evidence(evaluation([], test_set=""), live_version="7", provenance_faults=["model.py is not committed"])
    verdict = judged(found)
    assert verdict.reasons == ("model.py is not committed",)
    assert set(outcomes(verdict).values()) == {"refused", "skipped"}


# Floor and regression


def test_the_floor_is_the_policys():
    verdict = judged(evidence(evaluation(hits(899, 1000))), component(floor=0.9))
    assert verdict.reasons == ("accuracy 0.899 is below the floor of 0.9",)
    assert judged(evidence(evaluation(hits(900, 1000))), component(floor=0.9)).check("floor").outcome == "warned"
    figure = judged(evidence(evaluation(hits(990, 1000))), component(floor=0.9)).check("floor").figures[0]
    assert figure.interval == pytest.approx(binomtest(990, 1000).proportion_ci(0.95, "wilson"))


@pytest.mark.parametrize(("right", "outcome"), [(989, "refused"), (990, "warned"), (1000, "passed")])
def test_the_mean_decides_and_the_interval_warns(right, outcome):
    """Of 3000 the candidate is right in `right`, the live version in 1000 and among them: .01 of 3000 are 30."""
    theirs = [1.0] * 1000 + [0.0] * 2000
    ours = [1.0] * right + [0.0] * (3000 - right)
    verdict = judged(compared(ours, theirs), component(floor=0.1, allowed=0.01 / 3))
    assert verdict.check("regression").outcome == outcome
    if outcome == "refused":
        assert verdict.reasons == ("accuracy is 0.00366667 below live version 7; 0.00333333 is allowed",)


def test_a_small_test_set_warns_of_what_it_cannot_exclude():
    verdict = judged(compared(hits(18, 20), hits(18, 20)))
    assert verdict.verdict == "pass"
    assert "a fall by more than 0.01, which is allowed, cannot be excluded" in verdict.warnings[-1]


def test_no_comparison_where_the_policy_asks_for_none():
    policy = component(allowed=None, slice_allowed=None)
    verdict = judged(evidence(evaluation(hits(600, 1000)), None, live_version="7", signature_live=SIGNATURE), policy)
    assert (verdict.verdict, outcomes(verdict)["regression"], outcomes(verdict)["slices"]) == (
        "pass",
        "skipped",
        "skipped",
    )


def test_losses_get_students_interval():
    dice = random.Random(1)
    theirs = [-abs(dice.gauss(0, 1)) for _ in range(200)]
    ours = [score + 0.2 + dice.gauss(0, 0.3) for score in theirs]
    found = judged(compared(ours, theirs), component(floor=-5, task="regression")).check("regression").figures[0]
    assert found.interval[0] < 0.2 < found.interval[1]
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.972 * 0.3 / math.sqrt(200), rel=0.15)


# Slices: noise, and what is more than noise


Draw = Callable[[random.Random, str], tuple[float, float]]


def drawn(dice: random.Random, sizes: dict[str, int], pair: Draw) -> Evidence:
    """A test set of classes of these sizes; `pair` gives one sample's candidate and live score."""
    classes = [name for name, size in sizes.items() for _ in range(size)]
    dice.shuffle(classes)
    pairs = [pair(dice, name) for name in classes]
    return evidence(evaluation([a for a, _ in pairs], classes), evaluation([b for _, b in pairs], classes))


def equally_good(dice: random.Random, _: str) -> tuple[float, float]:
    """Both right in nine of ten; where one is wrong, the other mostly is as well."""
    return dice.choices([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)], [0.86, 0.04, 0.04, 0.06])[0]


UNEVEN = {"one": 1, "two": 2, "few": 7, "some": 25, "more": 60, "many": 200, "most": 400, "also": 400}


def test_of_four_hundred_equally_good_versions_none_is_refused_for_a_slice():
    """Without regard to noise nearly every one would be: small classes fall by more than .05 all the time."""
    dice, warned = random.Random(7), 0
    for _ in range(400):
        check = promote(component(), "8", drawn(dice, UNEVEN, equally_good)).check("slices")
        assert check.ok, check.detail
        warned += check.outcome == "warned"
    assert warned > 120


def test_of_fifty_equally_good_versions_none_is_refused():
    dice = random.Random(3)
    classes = {f"class{n}": 500 for n in range(10)}
    for _ in range(50):
        verdict = promote(component(), "8", drawn(dice, classes, equally_good))
        assert verdict.verdict == "pass", verdict.reasons


def test_all_slices_together_are_refused_by_chance_no_more_often_than_alpha():
    """Each of 12 classes has fallen by exactly what is allowed; alpha is .05, so that there is something to see."""
    dice, refused, policy = random.Random(11), 0, component(alpha=0.05, allowed=None)

    def at_the_limit(dice: random.Random, _: str) -> tuple[float, float]:
        return dice.choices([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)], [0.8, 0.05, 0.1, 0.05])[0]

    for _ in range(300):
        found = drawn(dice, {f"class{n}": 120 for n in range(12)}, at_the_limit)
        refused += not promote(policy, "8", found).check("slices").ok
    assert refused / 300 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_a_broken_class_is_refused_by_name_though_the_mean_is_better():
    def pair(dice: random.Random, name: str) -> tuple[float, float]:
        return (float(dice.random() < 0.6), 1.0) if name == "shirt" else (1.0, float(dice.random() < 0.8))

    verdict = judged(drawn(random.Random(5), {"shirt": 300, "bag": 600, "boot": 600}, pair))
    assert len(verdict.reasons) == 1
    assert re.match(
        r"class shirt differs by -0\.\d+ \(99\.9933 % interval -0\.\d+ to -0\.\d+\) on 300", verdict.reasons[0]
    )
    assert verdict.check("slices").figures[0].name == "class shirt"


def test_a_fall_of_a_tenth_in_a_large_class_is_seen():
    def pair(dice: random.Random, name: str) -> tuple[float, float]:
        fall = (0.14, 0.02) if name == "shirt" else (0.02, 0.02)
        return dice.choices([(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)], [*fall, 1 - sum(fall)])[0]

    found = drawn(random.Random(2), {"shirt": 1000, **{f"class{n}": 1000 for n in range(9)}}, pair)
    assert not promote(component(allowed=0.05), "8", found).check("slices").ok


@pytest.mark.parametrize("size", [1, 2, 5, 10])
def test_a_handful_that_all_turned_wrong_is_told_and_not_refused(size):
    names = ["rare"] * size + ["usual"] * 500
    ours, theirs = [0.0] * size + [1.0] * 500, [1.0] * (size + 500)
    check = judged(evidence(evaluation(ours, names), evaluation(theirs, names)), component(allowed=0.1)).check("slices")
    assert (check.outcome, check.figures[0].name) == ("warned", "class rare")
    assert "1 fell by more than 0.05, which may be chance" in check.detail


def test_a_hundred_that_all_turned_wrong_are_refused_as_losses_too():
    names = ["rare"] * 100 + ["usual"] * 900
    theirs = [-0.5] * 1000
    ours = [-0.9] * 100 + [-0.4] * 900
    verdict = judged(
        evidence(evaluation(ours, names), evaluation(theirs, names)), component(floor=-1, task="regression")
    )
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("class rare differs by -0.4")


def test_any_fall_is_let_in_where_the_policy_says_so():
    names = ["rare"] * 100 + ["usual"] * 900
    found = evidence(evaluation([0.0] * 100 + [1.0] * 900, names), evaluation([1.0] * 1000, names))
    assert judged(found, component(allowed=0.2)).verdict == "refuse"
    assert judged(found, component(allowed=0.2, slice_allowed=None)).verdict == "pass"


# Evaluations that cannot be judged


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ([], [1.0], "the evaluation of the candidate holds no scores"),
        ([1.0], [], "the evaluation of live version 7 holds no scores"),
        ([math.nan, 1.0], [1.0, 1.0], "1 of 2 scores of the candidate are not finite numbers"),
        ([1.0, 1.0], [math.inf, 1.0], "1 of 2 scores of live version 7 are not finite numbers"),
        ([1e308, 1e308], [1.0, 1.0], "2 of 2 scores of the candidate are not finite numbers"),
        ([1.0, 5.0], [1.0, 1.0], "1 of 2 scores of the candidate are neither 0 nor 1, as in a classification"),
        ([1.0, 1.0], [1.0], "the candidate has 2 scores and live version 7 has 1"),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(ours, theirs, reason):
    verdict = judged(compared(ours, theirs))
    assert reason in verdict.reasons
    assert verdict.check("regression").outcome == "skipped"


def test_two_test_sets_are_refused():
    verdict = judged(evidence(evaluation(hits(9, 10)), evaluation(hits(9, 10), test_set="b" * 64)))
    assert verdict.reasons == (
        f"the candidate and live version 7 were scored on two test sets, {'a' * 12} and {'b' * 12}",
    )


def test_slices_that_differ_or_do_not_fit_are_refused():
    verdict = judged(evidence(evaluation(hits(9, 10), ["a"] * 10), evaluation(hits(9, 10), ["b"] * 10)))
    assert verdict.reasons == ("the candidate's slices of the test set are not those of live version 7",)
    assert judged(evidence(evaluation(hits(9, 10), ["a"] * 9))).verdict == "refuse"


def test_a_live_version_without_an_evaluation_is_refused():
    verdict = judged(evidence(live_version="7", signature_live=SIGNATURE))
    assert verdict.reasons == ("live version 7 was not evaluated",)
    assert judged(evidence(live=evaluation(hits(9, 10)), live_version=None)).verdict == "refuse"


numbers = st.floats(width=64, allow_nan=True, allow_infinity=True)
names = st.lists(st.sampled_from("ab"), max_size=5)


@settings(max_examples=150)
@given(
    ours=st.lists(st.one_of(st.sampled_from([0.0, 1.0]), numbers), max_size=5),
    theirs=st.lists(st.one_of(st.sampled_from([0.0, 1.0]), numbers), max_size=5),
    classes=names,
    proof=st.one_of(st.none(), numbers),
    latencies=st.lists(numbers, min_size=49, max_size=52),
    counts=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    signature=st.dictionaries(
        st.sampled_from(["inputs", "outputs", "params"]), st.one_of(st.text('[]{}:"a1'), st.integers())
    ),
    task=st.sampled_from(["classification", "regression"]),
)
def test_any_evidence_gets_a_verdict_and_a_page(ours, theirs, classes, proof, latencies, counts, signature, task):
    found = evidence(
        evaluation(ours, classes),
        evaluation(theirs, classes),
        proof_difference=proof,
        proof_tolerance=math.nan if proof is None else 1.0,
        latencies_ms=latencies,
        replay=Replay(compared=counts[0], disagreed=counts[1], errors=counts[2]),
        signature_candidate=signature,
    )
    judged(found, component(task=task))


# Golden proof, signature, provenance


@pytest.mark.parametrize(
    ("difference", "tolerance", "error", "passes"),
    [
        (1e-4, 1e-4, "", True),
        (0.0, 0.0, "", True),
        (2e-4, 1e-4, "", False),
        (math.nan, 1e-4, "", False),
        (math.inf, math.inf, "", False),
        (None, 1e-4, "", False),
        (0.0, 1e-4, "it ran for 300 s without an end", False),
    ],
)
def test_the_golden_proof(difference, tolerance, error, passes):
    found = evidence(proof_difference=difference, proof_tolerance=tolerance, proof_error=error)
    verdict = judged(found)
    assert (verdict.verdict == "pass") is passes
    assert not error or error in verdict.reasons[0]


def test_an_archive_cannot_allow_itself_more_than_the_policy_does():
    verdict = judged(evidence(proof_difference=0.5, proof_tolerance=1e9))
    assert verdict.reasons == ("the outputs differ from the golden outputs by 0.5, and 0.0001 is allowed",)


def test_a_signature_that_live_callers_know_must_not_be_lost():
    live = evaluation(hits(900, 1000))
    assert judged(evidence(live=live, signature_candidate=None)).reasons == (
        "version 8 has no model signature, which live version 7 has",
    )
    narrow = {"inputs": [{"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [1, 28, 28]}}]}
    assert "tensor of uint8 [1, 28, 28]" in judged(evidence(live=live, signature_candidate=narrow)).reasons[0]
    assert judged(evidence(live=live, signature_live=None)).check("signature").outcome == "warned"


# Latency and replay: chance


@pytest.mark.parametrize(
    ("fast", "slow", "outcome"),
    [
        (200, 0, "passed"),
        (197, 3, "warned"),
        (188, 12, "refused"),
        (0, 50, "refused"),
        (49, 0, "skipped"),
        (0, 49, "skipped"),
    ],
)
def test_the_latency_objective(fast, slow, outcome):
    check = judged(evidence(latencies_ms=[10.0] * fast + [150.0] * slow)).check("latency")
    assert check.outcome == outcome
    assert outcome != "skipped" or check.detail == "not measured: 49 requests were timed, at least 50 are needed"
    assert outcome != "refused" or "p99 is 150 ms" in check.detail


def test_latencies_that_are_no_times_are_refused():
    for wrong in (math.nan, -1.0, math.inf):
        verdict = judged(evidence(latencies_ms=[10.0] * 60 + [wrong]))
        assert verdict.reasons == ("1 of 61 latencies are not finite numbers from 0 on",)


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        (Replay(compared=200, disagreed=20), "passed"),
        (Replay(compared=200, disagreed=30), "warned"),
        (Replay(compared=200, disagreed=60), "refused"),
        (Replay(compared=3, disagreed=3), "warned"),
        (Replay(compared=5, disagreed=5), "refused"),
        (Replay(compared=195, errors=5), "warned"),
        (Replay(compared=180, errors=20), "refused"),
        (Replay(compared=0, errors=30), "refused"),
        (Replay(compared=2, disagreed=3), "refused"),
        (Replay(), "skipped"),
    ],
)
def test_replay_refuses_more_than_chance_and_warns_of_more_than_allowed(seen, outcome):
    assert judged(evidence(replay=seen)).check("replay").outcome == outcome


def test_no_disagreement_is_chance_where_none_is_allowed():
    assert judged(evidence(replay=Replay(compared=500, disagreed=1)), component(max_disagreement=0)).verdict == "refuse"
    assert judged(evidence(replay=Replay(compared=500)), component(max_disagreement=0)).verdict == "pass"
    assert judged(evidence(replay=Replay(compared=5, disagreed=5)), component(max_disagreement=1)).verdict == "pass"


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.001, 0.999))
def test_the_binomial_tail_is_scipys(count, of, share):
    assert at_least(min(count, of), of, share) == pytest.approx(binom.sf(min(count, of) - 1, of, share), abs=1e-12)


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_interval_of_a_share_is_the_exact_one(count, of):
    exact = binomtest(min(count, of), of).proportion_ci(0.95, "exact")
    assert share_interval(min(count, of), of) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_the_interval_of_a_mean():
    assert mean_interval([-1.0]) is None
    assert mean_interval([-1.0, -2.0, -3.0]) == pytest.approx(
        (-2 - 4.302653 / math.sqrt(3), -2 + 4.302653 / math.sqrt(3))
    )


# Policy


def test_the_policy_hash_follows_what_the_judgement_depends_on_and_nothing_else():
    before = component()
    changed = [
        component(floor=0.6),
        component(slice_allowed=None),
        component(alpha=1e-3),
        component(max_disagreement=0.2),
        component(task="regression"),
        before.model_copy(update={"latency": Latency(p99_ms=50)}),
        before.model_copy(update={"golden": Golden(tolerance=0.1)}),
    ]
    hashes = {policy_hash(policy) for policy in changed}
    assert len(hashes) == len(changed)
    assert policy_hash(before) not in hashes
    assert policy_hash(before) == policy_hash(component())
    assert policy_hash(before.model_copy(update={"description": "e", "serving": Serving(workers=9)})) == policy_hash(
        before
    )


# The page


class Page(HTMLParser):
    """The words of a page, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.classes: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.classes += [value for name, value in attrs if name == "class"]
        self.loads += [value for name, value in attrs if name in ("src", "data") or (tag == "link" and name == "href")]

    def handle_data(self, data):
        self.words.append(data)


def shown(found: Evidence, policy: Component | None = None) -> Page:
    verdict = promote(policy or component(), "8", found)
    return Page(promotion_report(verdict, found, "http://127.0.0.1:1/#/models/tiny/8"))


def test_the_page_shows_every_check_and_loads_nothing():
    names = ["shirt", "bag"] * 500
    examples = [Disagreement(id="req-1", live={"class": 3}, candidate={"class": 5})]
    page = shown(
        evidence(
            evaluation(hits(800, 1000), names),
            evaluation(hits(900, 1000), names),
            latencies_ms=[float(n) for n in range(1, 201)],
            replay=Replay(compared=50, disagreed=1, examples=examples),
        )
    )
    assert "✗ Refused tiny version 8" in page.text
    assert "accuracy is 0.1 below live version 7; 0.01 is allowed" in page.text
    for check in (
        "provenance",
        "golden",
        "signature",
        "evaluation",
        "floor",
        "regression",
        "slices",
        "latency",
        "replay",
    ):
        assert f" {check} " in page.text
    assert "class shirt" in page.text
    assert "objective of 100 ms" in page.text
    assert page.classes.count("bar") == 33, "of 40 up to 247.5 ms, those up to 200 ms"
    assert 'req-1 {"class": 3} {"class": 5}' in page.text
    assert not page.loads
    assert not {"script", "link", "img"} & set(page.tags)


def test_a_pass_is_said_on_the_page():
    page = shown(evidence())
    assert "✓ May go live tiny version 8" in page.text
    assert "Nothing is live in production yet" in page.text


def test_names_and_answers_cannot_write_html():
    names = ["<script>x</script>"] * 1000
    examples = [Disagreement(id="<b>", live="<script>", candidate={"\ud800": math.nan})] * 30
    found = evidence(
        evaluation(hits(900, 1000), names),
        evaluation(hits(900, 1000), names),
        provenance_faults=["<img src=x>"],
        replay=Replay(compared=100, disagreed=30, examples=examples),
    )
    page = shown(found)
    assert "<script>x</script>" in page.text
    assert not {"script", "img", "b"} & set(page.tags)
    assert "10 more." in page.text


def test_many_slices_are_cut_and_that_is_said():
    names = [f"s{n}" for n in range(100)] * 10
    page = shown(evidence(evaluation(hits(900, 1000), names), evaluation(hits(900, 1000), names)))
    assert "70 more slices" in page.text
