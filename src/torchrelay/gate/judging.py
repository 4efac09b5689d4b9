"""May this run be deployed? Scores in, verdict out; nothing here touches the world.

The figure that counts is the mean of the per-sample scores of the frozen test set. Candidate and live version
are compared sample by sample on the same set, since the noise of the set itself then cancels out.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from torchrelay.config import Component, Frozen, Metric
from torchrelay.errors import DataError
from torchrelay.handover import Evaluation, TrainedRun, Verdict

LARGEST = 1e100
"""A score beyond this is as good as infinite: its square would overflow."""


def normal(probability: float, _freedom: int = 0) -> float:
    """The quantile of the normal distribution, whatever the degrees of freedom."""
    return NormalDist().inv_cdf(probability)


class Comparison(NamedTuple):
    """Candidate minus live, paired, with its interval; one sample that is not 0 or 1 has none."""

    difference: float
    interval: tuple[float, float] | None


class Live(NamedTuple):
    """The version in service: its evaluation on the candidate's test set, or why there is none.

    Neither is there where the component's policy does not ask for a comparison.
    """

    version: str
    evaluation: Evaluation | None = None
    fault: str = ""


class Slice(Frozen):
    """One part of the test set, for example a class."""

    slicing: str
    name: str
    samples: int
    candidate: float
    live: float | None = None
    difference: float | None = None


def judge(component: Component, run: TrainedRun, candidate: Evaluation, live: Live | None) -> Verdict:
    """Refuse a candidate below the floor, or further below the live version than the component allows.

    `live` is the version in service, None at the first deployment: then only the floor counts.
    A candidate that is the live version itself gives the same scores and so differs by nothing.
    Raises DataError if the two were evaluated on different test sets: evaluate the live version again first.
    """
    theirs = live.evaluation if live else None
    if live and theirs:
        _insist_on_one_test_set(component, candidate, live.version, theirs)
    reasons = list(unfit("the candidate", candidate)) or list(_live_faults(candidate, live))
    figure = mean(candidate.scores)
    compared = compare(candidate.scores, theirs.scores) if theirs and not reasons else None
    if figure is not None:
        reasons += _unlike_logged(component.metric, run, figure)
        reasons += below_floor(component.metric, figure)
    if live and compared:
        reasons += below_live(component.metric, live.version, compared.difference)
    return Verdict(
        component=component.name,
        run_id=run.run_id,
        verdict="refuse" if reasons else "pass",
        reasons=reasons,
        metric=component.metric.name,
        candidate=figure,
        floor=component.metric.floor,
        allowed_regression=component.metric.allowed_regression,
        live_version=live.version if live else None,
        live=mean(theirs.scores) if theirs else None,
        difference=compared.difference if compared else None,
        interval=compared.interval if compared else None,
        test_set=candidate.test_set,
    )


def compare(
    candidate: Sequence[float],
    live: Sequence[float],
    confidence: float = 0.95,
    quantile: Callable[[float, int], float] = normal,
) -> Comparison:
    """Mean paired difference of two equally long score lists, with its two-sided interval.

    Scores that are all 0 or 1 get Newcombe's interval for the difference of paired proportions (Statistics in
    Medicine 17, 1998, 2635-2650, method 10), which stays honest where few or no samples differ. Others get that of
    the mean paired difference by `quantile` (of a probability and the degrees of freedom); the normal approximation
    is fair from some thirty samples on.
    """
    differences = [c - o for c, o in zip(candidate, live, strict=True)]
    average = math.fsum(differences) / len(differences)
    if binary(candidate, live):
        return Comparison(average, _newcombe(candidate, live, average, normal((1 + confidence) / 2)))
    if len(differences) < 2:
        return Comparison(average, None)
    half = quantile((1 + confidence) / 2, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return Comparison(average, (average - half, average + half))


def binary(*scores: Sequence[float]) -> bool:
    """Whether all scores are 0 or 1, as those of a classification are."""
    return all({0.0, 1.0}.issuperset(some) for some in scores)


def wilson(successes: int, n: int, z: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion, `z` standard deviations to both sides."""
    p = successes / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def slices(candidate: Evaluation, live: Evaluation | None) -> list[Slice]:
    """Every slice of the test set, the worst candidate figure first."""
    found = [
        _slice(slicing, name, places, candidate, live)
        for slicing, names in candidate.slices.items()
        for name, places in places_of(names).items()
    ]
    return sorted(found, key=lambda row: (row.candidate, row.slicing, row.name))


def _slice(slicing: str, name: str, places: list[int], candidate: Evaluation, live: Evaluation | None) -> Slice:
    ours = fmean(candidate.scores[i] for i in places)
    theirs = fmean(live.scores[i] for i in places) if live else None
    difference = None if theirs is None else ours - theirs
    return Slice(slicing=slicing, name=name, samples=len(places), candidate=ours, live=theirs, difference=difference)


def places_of(names: list[str]) -> dict[str, list[int]]:
    """Slice name to the positions of its samples."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        found[name].append(place)
    return found


def _insist_on_one_test_set(component: Component, ours: Evaluation, version: str, theirs: Evaluation) -> None:
    if theirs.test_set != ours.test_set:
        raise DataError(
            f"live version {version} of {component.name} was evaluated on test set {theirs.test_set[:12]}",
            f"both evaluated on test set {ours.test_set[:12]}",
            f"make deploy-dev COMPONENT={component.name}",
        )


def usable(score: float) -> bool:
    """Whether a score is a finite number that can be reckoned with."""
    return abs(score) <= LARGEST


def unfit(whose: str, evaluation: Evaluation) -> Iterator[str]:
    """What makes an evaluation unfit to be judged."""
    if not evaluation.scores:
        yield f"the evaluation of {whose} holds no scores"
    broken = sum(not usable(score) for score in evaluation.scores)
    if broken:
        yield f"{broken} of {len(evaluation.scores)} scores of {whose} are not finite numbers"
    for slicing, names in evaluation.slices.items():
        if len(names) != len(evaluation.scores):
            yield f"slicing {slicing!r} of {whose} is for {len(names)} samples, of {len(evaluation.scores)}"


def _live_faults(candidate: Evaluation, live: Live | None) -> Iterator[str]:
    """What makes the live version unfit to be compared with, where it should be."""
    if live and live.fault:
        yield f"live version {live.version} could not be compared with: {live.fault}"
    if live is None or live.evaluation is None:
        return
    version, theirs = live.version, live.evaluation
    yield from unfit(f"live version {version}", theirs)
    if len(theirs.scores) != len(candidate.scores):
        yield (
            f"the candidate has {len(candidate.scores)} scores and live version {version} has {len(theirs.scores)}, "
            "on the same test set"
        )


def _unlike_logged(metric: Metric, run: TrainedRun, figure: float) -> Iterator[str]:
    """The figure that is judged must be the one that training logged under the metric's name."""
    logged = run.metrics.get(metric.name)
    if logged is None:
        yield f"training logged no {metric.name} in run.json, but {', '.join(sorted(run.metrics)) or 'nothing'}"
    elif not math.isclose(logged, figure, rel_tol=1e-4, abs_tol=1e-6):
        yield f"training logged {metric.name} {logged:.6g}, but its scores on the test set average {figure:.6g}"


def below_floor(metric: Metric, figure: float) -> Iterator[str]:
    """The reason to refuse a mean score that lies below the floor."""
    if figure < metric.floor:
        yield f"{metric.name} {figure:.6g} is below the floor of {metric.floor:.6g}"


def below_live(metric: Metric, version: str, difference: float) -> Iterator[str]:
    """The reason to refuse a candidate that lies further below the live version than the policy allows."""
    if metric.allowed_regression is not None and difference < -metric.allowed_regression:
        allowed = f"{metric.allowed_regression:.6g} is allowed" if metric.allowed_regression else "none is allowed"
        yield f"{metric.name} is {-difference:.6g} below live version {version}; {allowed}"


def mean(scores: Sequence[float]) -> float | None:
    """The mean, or None if it would not be a number."""
    return fmean(scores) if scores and all(map(usable, scores)) else None


def _newcombe(candidate: Sequence[float], live: Sequence[float], mean: float, z: float) -> tuple[float, float]:
    """Newcombe's method 10: Wilson intervals of both proportions, joined with the correlation of the pairs."""
    n = len(candidate)
    cells = Counter(zip(candidate, live, strict=True))
    a, b, c, d = cells[1, 1], cells[1, 0], cells[0, 1], cells[0, 0]
    p1, p2 = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = wilson(a + b, n, z), wilson(a + c, n, z)
    phi = _phi(a, b, c, d, n)
    below = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    above = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
    return mean - math.sqrt(max(below, 0.0)), mean + math.sqrt(max(above, 0.0))


def _phi(a: int, b: int, c: int, d: int, n: int) -> float:
    """Correlation of the pairs, with Newcombe's continuity correction; 0 where a margin is empty."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return 0.0
    excess = a * d - b * c
    return (max(excess - n / 2, 0.0) if excess > 0 else excess) / math.sqrt(margins)
