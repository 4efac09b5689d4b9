import math
import random
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.config import Component, Metric
from torchrelay.errors import DataError
from torchrelay.gate import Live, compare, judge, report, slices
from torchrelay.handover import Evaluation, TrainedRun, Verdict


def component(floor: float = 0.5, allowed: float | None = 0.0) -> Component:
    metric = Metric(name="accuracy", floor=floor, allowed_regression=allowed)
    return Component(name="tiny", description="d", task="classification", data="d", metric=metric)


def evaluation(right: int, of: int, **more: object) -> Evaluation:
    return Evaluation(test_set="a" * 64, scores=[1.0] * right + [0.0] * (of - right), **more)


def run(**metrics: float) -> TrainedRun:
    return TrainedRun(
        run_id="r1", experiment_id="1", model_uri="models:/m-1", metrics=metrics, parameters={}, device="cpu"
    )


def verdict_of(component: Component, candidate: Evaluation, live: Live | None = None) -> Verdict:
    """Of a run that logged what its scores average."""
    logged = {"accuracy": sum(candidate.scores) / len(candidate.scores)} if candidate.scores else {}
    return judge(component, run(**logged), candidate, live)


def test_the_first_deployment_needs_only_the_floor():
    verdict = verdict_of(component(0.9), evaluation(90, 100))
    assert (verdict.verdict, verdict.candidate, verdict.live, verdict.reasons) == ("pass", 0.9, None, [])


def test_below_the_floor_is_refused_and_says_by_which_figures():
    verdict = verdict_of(component(0.9), evaluation(8999, 10000))
    assert verdict.verdict == "refuse"
    assert verdict.reasons == ["accuracy 0.8999 is below the floor of 0.9"]


@pytest.mark.parametrize(("right", "passes"), [(91, True), (90, True), (89, False)])
def test_a_regression_is_allowed_up_to_the_limit_and_no_further(right, passes):
    verdict = verdict_of(component(0.5, allowed=0.01), evaluation(right, 100), Live("7", evaluation(91, 100)))
    assert (verdict.verdict == "pass") is passes
    assert verdict.difference == (right - 91) / 100
    assert passes or verdict.reasons == ["accuracy is 0.02 below live version 7; 0.01 is allowed"]


def test_both_faults_are_named():
    assert len(verdict_of(component(0.9), evaluation(80, 100), Live("7", evaluation(95, 100))).reasons) == 2


def test_the_live_version_itself_passes():
    verdict = verdict_of(component(), evaluation(91, 100), Live("7", evaluation(91, 100)))
    assert (verdict.verdict, verdict.difference) == ("pass", 0.0)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([], "the evaluation of the candidate holds no scores"),
        ([1.0, math.nan], "1 of 2 scores of the candidate are not finite numbers"),
        ([1.0, math.inf], "1 of 2 scores of the candidate are not finite numbers"),
    ],
)
def test_scores_without_a_mean_are_refused(scores, reason):
    verdict = verdict_of(component(), Evaluation(test_set="a", scores=scores))
    assert (verdict.verdict, verdict.candidate, verdict.reasons) == ("refuse", None, [reason])
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_another_number_of_scores_than_live_is_refused():
    verdict = verdict_of(component(), evaluation(9, 10), Live("7", evaluation(9, 11)))
    assert verdict.reasons == ["the candidate has 10 scores and live version 7 has 11, on the same test set"]
    assert verdict.difference is None


def test_a_broken_live_evaluation_is_refused_since_nothing_can_be_compared():
    live = Live("7", Evaluation(test_set="a" * 64, scores=[math.nan] * 10))
    assert verdict_of(component(), evaluation(9, 10), live).reasons == [
        "10 of 10 scores of live version 7 are not finite numbers"
    ]


def test_a_slicing_of_another_length_is_refused():
    verdict = verdict_of(component(), evaluation(9, 10, slices={"class": ["a"]}))
    assert verdict.reasons == ["slicing 'class' of the candidate is for 1 samples, of 10"]


def test_another_test_set_is_the_callers_error():
    live = Evaluation(test_set="b" * 64, scores=[1.0] * 10)
    with pytest.raises(DataError, match="live version 7 of tiny was evaluated on test set bbbbbbbbbbbb"):
        verdict_of(component(), evaluation(9, 10), Live("7", live))


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"f1": 0.8}, "training logged no accuracy in run.json, but f1"),
        ({}, "training logged no accuracy in run.json, but nothing"),
        ({"accuracy": 0.8}, "training logged accuracy 0.8, but its scores on the test set average 0.9"),
    ],
)
def test_a_metric_that_is_not_what_the_scores_say_is_refused(metrics, reason):
    verdict = judge(component(), run(**metrics), evaluation(9, 10), None)
    assert (verdict.verdict, verdict.reasons) == ("refuse", [reason])


def test_a_live_version_that_cannot_be_scored_is_a_verdict_with_its_reason():
    verdict = verdict_of(component(), evaluation(9, 10), Live("7", fault="it refuses its input"))
    assert verdict.reasons == ["live version 7 could not be compared with: it refuses its input"]
    assert (verdict.live_version, verdict.live) == ("7", None)
    assert "could not be compared with live version 7" in report(verdict, evaluation(9, 10), None, "#")


def test_a_policy_without_a_comparison_counts_the_floor_alone():
    verdict = verdict_of(component(0.5, allowed=None), evaluation(6, 10), Live("7"))
    assert (verdict.verdict, verdict.live_version, verdict.allowed_regression) == ("pass", "7", None)
    assert "asks for no comparison with live version 7" in report(verdict, evaluation(6, 10), None, "#").replace(
        "&#39;", "'"
    )
    assert verdict_of(component(0.9, allowed=None), evaluation(6, 10), Live("7")).verdict == "refuse"


def test_newcombes_interval_of_his_method_10_by_hand():
    """a=36, b=12, c=2, d=0: p1=.96, p2=.76; Wilson .8654-.9890 and .6259-.8570; ad-bc<0, so phi is not corrected."""
    candidate = [1.0] * 48 + [0.0] * 2
    live = [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    low, high = compare(candidate, live).interval
    phi = -24 / math.sqrt(48 * 2 * 38 * 12)
    below = math.sqrt(0.0946**2 - 2 * phi * 0.0946 * 0.0970 + 0.0970**2)
    above = math.sqrt(0.0290**2 - 2 * phi * 0.0290 * 0.1341 + 0.1341**2)
    assert (low, high) == pytest.approx((0.2 - below, 0.2 + above), abs=2e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """400 test sets of 80 samples, true difference .1: 95 % of the intervals should hold it."""
    dice = random.Random(1)
    held = 0
    for _ in range(400):
        pairs = [dice.choices([(1, 1), (1, 0), (0, 1), (0, 0)], [0.7, 0.15, 0.05, 0.1])[0] for _ in range(80)]
        low, high = compare([float(c) for c, _ in pairs], [float(o) for _, o in pairs]).interval
        held += low <= 0.1 <= high
    assert 0.925 <= held / 400 <= 0.985


scores = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-100, 100))


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=60))
def test_the_interval_holds_the_difference_and_mirrors(pairs):
    ours, theirs = [c for c, _ in pairs], [o for _, o in pairs]
    there, back = compare(ours, theirs), compare(theirs, ours)
    assert there.interval[0] <= there.difference + 1e-9
    assert there.difference - 1e-9 <= there.interval[1]
    assert there.difference == pytest.approx(-back.difference, abs=1e-9)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-9)


def test_losses_that_all_differ_by_the_same_leave_no_doubt():
    found = compare([-0.5, -0.25, -0.75], [-0.75, -0.5, -1.0])
    assert (found.difference, found.interval) == (0.25, (0.25, 0.25))


def test_one_loss_has_no_interval():
    live = Live("1", Evaluation(test_set="a", scores=[-0.4]))
    verdict = verdict_of(component(-1.0), Evaluation(test_set="a", scores=[-0.5]), live)
    assert (verdict.verdict, verdict.interval) == ("refuse", None)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_the_worst_slice_comes_first():
    candidate = evaluation(3, 4, slices={"class": ["bag", "bag", "boot", "boot"]})
    found = slices(candidate, evaluation(4, 4))
    assert [(s.name, s.samples, s.candidate, s.live, s.difference) for s in found] == [
        ("boot", 2, 0.5, 1.0, -0.5),
        ("bag", 2, 1.0, 1.0, 0.0),
    ]


class Page(HTMLParser):
    """The words of a page, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in ("src", "data") or (tag == "link" and name == "href")]

    def handle_data(self, data):
        self.words.append(data)


def shown(candidate: Evaluation, live: Evaluation | None, **settings: float) -> Page:
    verdict = verdict_of(component(**settings), candidate, Live("7", live) if live else None)
    return Page(report(verdict, candidate, live, "http://127.0.0.1:1/#/run"))


def test_the_page_says_what_was_decided_and_loads_nothing():
    names = {"class": ["shirt", "bag"] * 50}
    page = shown(evaluation(80, 100, slices=names), evaluation(95, 100), floor=0.9)
    assert "✗ Refused tiny" in page.text
    assert "accuracy 0.8 is below the floor of 0.9" in page.text
    assert "worse than live version 7" in page.text
    assert "shirt" in page.text
    assert not page.loads
    assert "script" not in page.tags


@pytest.mark.parametrize("live", [None, evaluation(91, 100)])
def test_a_pass_is_said(live):
    assert "✓ Passed tiny" in shown(evaluation(92, 100), live).text


@pytest.mark.parametrize(
    "candidate", [Evaluation(test_set="a" * 64, scores=[]), evaluation(3, 9, slices={"class": ["x"]})]
)
def test_what_cannot_be_judged_has_a_page_too(candidate):
    assert "✗ Refused tiny" in shown(candidate, evaluation(9, 10)).text


def test_names_from_the_data_cannot_write_html():
    page = shown(evaluation(1, 2, slices={"<i>": ["<script>x</script>", "b"]}), None)
    assert "<script>x</script>" in page.text
    assert not {"script", "i"} & page.tags


def test_many_slices_are_cut_and_that_is_said():
    page = shown(evaluation(50, 100, slices={"id": [f"s{n}" for n in range(100)]}), None)
    assert "70 more slices" in page.text
