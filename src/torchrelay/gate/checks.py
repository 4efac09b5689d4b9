"""The promotion gate's questions, one function each: evidence in, `Check` out. None raises, whatever the evidence.

What chance alone may do is bounded by `rollout.alpha`: a refusal is final for the version, so of many good versions
none must be refused for being unlucky.
"""

import math
from collections.abc import Iterator

from torchrelay.config import Component
from torchrelay.gate.chance import at_least, mean_interval, share_interval, student
from torchrelay.gate.evidence import Check, Evidence, Figure
from torchrelay.gate.judging import below_floor, below_live, compare, mean, places_of, unfit
from torchrelay.gate.signatures import Finding, differences
from torchrelay.handover import Evaluation

FEWEST_LATENCIES = 50
SLOW_SHARE = 0.01
"""What may be slower than the objective of a 99th percentile."""


def evaluation(component: Component, evidence: Evidence) -> Check:
    """Whether the scores of both can be judged and compared at all."""
    faults = [*_own_faults(component, evidence.candidate), *_common_faults(component, evidence)]
    whom = f"the candidate and live version {evidence.live_version}" if evidence.live else "the candidate"
    ours = evidence.candidate
    told = f"this gate scored {whom} on {len(ours.scores):,} samples of test set {ours.test_set[:12]}"
    return _answer("evaluation", faults, told)


def floor(component: Component, evidence: Evidence) -> Check:
    """Whether the mean score reaches the floor; warns where its 95 % interval reaches below."""
    metric, scores = component.metric, evidence.candidate.scores
    value = mean(scores)
    if value is None or any(_own_faults(component, evidence.candidate)):
        return skipped("floor", "the candidate's scores cannot be judged")
    interval = mean_interval(scores)
    figure = Figure(name=metric.name, value=value, interval=interval, limit=metric.floor, samples=len(scores))
    told = f"{metric.name} is {value:.6g}, the floor is {metric.floor:.6g}"
    warning = "a true figure below the floor cannot be excluded" if not interval or interval[0] < metric.floor else ""
    return _answer("floor", list(below_floor(metric, value)), told, warning, (figure,))


def regression(component: Component, evidence: Evidence) -> Check:
    """Whether the mean falls below the live version's by more than allowed; warns where the interval reaches there."""
    metric, theirs, version = component.metric, evidence.live, evidence.live_version
    allowed = metric.allowed_regression
    if allowed is None:
        return skipped("regression", "the policy asks for no comparison with the live version")
    if theirs is None or version is None or any(_faults(component, evidence)):
        return skipped("regression", _why_not(evidence))
    figure = _compared(metric.name, evidence.candidate.scores, theirs.scores, 0.95, allowed)
    told = f"{_told(figure)} against live version {version}"
    unsure = figure.interval is None or figure.interval[0] < -allowed
    warning = f"a fall by more than {allowed:.6g}, which is allowed, cannot be excluded" if unsure else ""
    faults = list(below_live(metric, version, _difference(figure)))
    return _answer("regression", faults, told, warning, (figure,))


def slices(component: Component, evidence: Evidence) -> Check:
    """Whether any part of the test set falls further than allowed, beyond what chance does to so many parts.

    Refused when the whole paired interval of a slice lies below the fall that is allowed. The intervals hold all
    together but for a chance of `rollout.alpha` (Bonferroni). A slice so small that an equally good version could, by
    that chance, be worse in every single sample (one in 2^n: the sign test) is told of and never refused.
    """
    allowed, theirs, names = component.metric.allowed_slice_regression, evidence.live, evidence.candidate.slices
    if allowed is None:
        return skipped("slices", "the policy allows any fall of a slice")
    if theirs is None or any(_faults(component, evidence)):
        return skipped("slices", _why_not(evidence))
    if not names:
        return skipped("slices", "the evaluation is not cut into slices")
    chance = component.rollout.alpha / sum(len(set(each)) for each in names.values())
    figures = sorted(_slices(evidence.candidate, theirs, 1 - 2 * chance, allowed), key=_difference)
    below = [figure for figure in figures if _difference(figure) < -allowed]
    faults = [f"{_told(figure)}; a fall by {allowed:.6g} is allowed" for figure in below if _surely(figure, chance)]
    told = f"the worst of {len(figures)}: {_told(figures[0])}"
    warning = f"{len(below)} fell by more than {allowed:.6g}, which may be chance" if below else ""
    return _answer("slices", faults, told, warning, tuple(figures))


def signature(version: str, evidence: Evidence) -> Check:
    """Whether callers of the live version can be answered by the candidate as before."""
    ours, theirs, live = evidence.signature_candidate, evidence.signature_live, evidence.live_version
    if live is None:
        return skipped("signature", "nothing is live yet, so there are no callers to keep to")
    if theirs is None:
        told = f"live version {live} has no model signature"
        return _answer("signature", [], told, "so nothing shows what its callers rely on")
    lacking = Finding(f"version {version} has no model signature, which live version {live} has")
    found = [lacking] if ours is None else differences(ours, theirs, live)
    faults = [finding.text for finding in found if finding.fatal]
    warning = "; ".join(finding.text for finding in found if not finding.fatal)
    return _answer("signature", faults, f"all that callers of version {live} rely on is there", warning)


def golden(component: Component, evidence: Evidence) -> Check:
    """Whether the exact archive reproduced its golden outputs, within its own tolerance and the policy's."""
    found, limit = evidence.proof_difference, min(evidence.proof_tolerance, component.golden.tolerance)
    if evidence.proof_error:
        return _answer("golden", [f"the archive could not be proven: {evidence.proof_error}"])
    if found is None:
        return _answer("golden", ["the archive was not run against its golden outputs"])
    told = f"the outputs differ from the golden outputs by {found:.6g}, and {limit:.6g} is allowed"
    kept = 0 <= found <= limit
    figure = Figure(name="largest difference", value=_finite(found), limit=_finite(limit))
    return _answer("golden", [] if kept else [told], told, figures=(figure,))


def latency(component: Component, evidence: Evidence) -> Check:
    """Whether more than one request in a hundred takes longer than the objective, beyond chance."""
    times, objective = sorted(evidence.latencies_ms), component.latency.p99_ms
    n, broken = len(times), sum(not 0 <= time < math.inf for time in times)
    if broken:
        return _answer("latency", [f"{broken} of {n} latencies are not finite numbers from 0 on"])
    if n < FEWEST_LATENCIES:
        return skipped("latency", f"not measured: {n} requests were timed, at least {FEWEST_LATENCIES} are needed")
    slow, p99 = sum(time > objective for time in times), times[math.ceil(0.99 * n) - 1]
    told = f"p99 is {p99:.4g} ms over {n} requests, the objective is {objective:.6g} ms"
    much = at_least(slow, n, SLOW_SHARE) < component.rollout.alpha
    faults = [f"{told}: {slow} took longer, which is more than chance"] if much else []
    warning = f"{slow} took longer, which may be chance" if p99 > objective else ""
    share = _share("slower than the objective", slow, n, SLOW_SHARE)
    return _answer(
        "latency", faults, told, warning, (Figure(name="p99 in ms", value=p99, limit=objective, samples=n), share)
    )


def replay(component: Component, evidence: Evidence) -> Check:
    """Whether the candidate fails on, or answers differently, more of production's requests than the policy allows."""
    seen, policy = evidence.replay, component.rollout
    sent = seen.compared + seen.errors
    if seen.disagreed > seen.compared:
        return _answer("replay", [f"the replay counts {seen.disagreed} disagreements in {seen.compared} comparisons"])
    if not sent:
        return skipped("replay", "no logged request was replayed")
    different = f"{seen.disagreed} of {seen.compared} replayed requests were answered differently"
    rules = (
        (f"{seen.errors} of {sent} replayed requests failed", seen.errors, sent, policy.max_error_excess),
        (different, seen.disagreed, seen.compared, policy.max_disagreement),
    )
    faults = [
        f"{told}; a share of {limit:.6g} is allowed"
        for told, many, of, limit in rules
        if at_least(many, of, limit) < policy.alpha
    ]
    over = any(many > limit * of for _, many, of, limit in rules)
    figures = (
        _share("failed", seen.errors, sent, policy.max_error_excess),
        _share("answered differently", seen.disagreed, seen.compared, policy.max_disagreement),
    )
    warning = "more than allowed, which may be chance" if over else ""
    return _answer("replay", faults, "; ".join(rule[0] for rule in rules), warning, figures)


def provenance(evidence: Evidence) -> Check:
    """Whether the archive's code is code that was committed."""
    return _answer("provenance", list(evidence.provenance_faults), "the archive's code is that of its commit")


def _answer(name: str, faults: list[str], told: str = "", warning: str = "", figures: tuple[Figure, ...] = ()) -> Check:
    """Refused for `faults`; without any, what was found is told, with the warning if there is one."""
    if faults:
        return Check(name=name, outcome="refused", detail="; ".join(faults), reasons=tuple(faults), figures=figures)
    detail = f"{told}; {warning}" if warning else told
    return Check(name=name, outcome="warned" if warning else "passed", detail=detail, figures=figures)


def skipped(name: str, why: str) -> Check:
    """The answer where there is nothing to judge."""
    return Check(name=name, outcome="skipped", detail=why)


def _why_not(evidence: Evidence) -> str:
    first = evidence.live is None and evidence.live_version is None
    return "nothing is live yet" if first else "the scores cannot be compared"


def _faults(component: Component, evidence: Evidence) -> Iterator[str]:
    """What keeps candidate and live version from being compared."""
    yield from _own_faults(component, evidence.candidate)
    yield from _common_faults(component, evidence)


def _own_faults(component: Component, ours: Evaluation) -> Iterator[str]:
    yield from unfit("the candidate", ours)
    if not ours.test_set:
        yield "the evaluation of the candidate names no test set"
    odd = sum(score not in (0, 1) for score in ours.scores)
    if odd and component.task == "classification":
        yield f"{odd} of {len(ours.scores)} scores of the candidate are neither 0 nor 1, as in a classification"


def _common_faults(component: Component, evidence: Evidence) -> Iterator[str]:
    """Where the policy compares at all."""
    metric, ours, theirs, version = component.metric, evidence.candidate, evidence.live, evidence.live_version
    if metric.allowed_regression is None and metric.allowed_slice_regression is None:
        return
    if (theirs is None) != (version is None):
        yield f"live version {version} was not evaluated" if version else "the evaluated live version has no name"
    if theirs is None:
        return
    yield from unfit(f"live version {version}", theirs)
    if theirs.test_set != ours.test_set:
        sets = f"{ours.test_set[:12]} and {theirs.test_set[:12]}"
        yield f"the candidate and live version {version} were scored on two test sets, {sets}"
    elif len(theirs.scores) != len(ours.scores):
        yield f"the candidate has {len(ours.scores)} scores and live version {version} has {len(theirs.scores)}"
    elif theirs.slices != ours.slices:
        yield f"the candidate's slices of the test set are not those of live version {version}"


def _slices(ours: Evaluation, theirs: Evaluation, confidence: float, allowed: float) -> Iterator[Figure]:
    for slicing, names in ours.slices.items():
        for name, places in places_of(names).items():
            a, b = [ours.scores[i] for i in places], [theirs.scores[i] for i in places]
            yield _compared(f"{slicing} {name}", a, b, confidence, allowed)


def _compared(name: str, ours: list[float], theirs: list[float], confidence: float, allowed: float) -> Figure:
    difference, interval = compare(ours, theirs, confidence, student)
    return Figure(
        name=name,
        value=mean(ours),
        live=mean(theirs),
        difference=difference,
        interval=interval,
        confidence=confidence,
        limit=-allowed,
        samples=len(ours),
    )


def _difference(figure: Figure) -> float:
    return figure.difference or 0.0


def _surely(figure: Figure, chance: float) -> bool:
    """Whether a fall below the limit is more than chance: the interval says so, and there are enough samples."""
    enough = figure.samples is not None and 2.0**-figure.samples <= chance
    return enough and figure.interval is not None and figure.limit is not None and figure.interval[1] < figure.limit


def _told(figure: Figure) -> str:
    sure = f" ({100 * figure.confidence:.6g} % interval {_from_to(figure.interval)})" if figure.interval else ""
    return f"{figure.name} differs by {_difference(figure):+.4g}{sure} on {figure.samples:,} samples"


def _from_to(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.3g} to {interval[1]:+.3g}"


def _share(name: str, many: int, of: int, limit: float) -> Figure:
    """The share of `many` in `of`, with its exact interval; without a value where there is none."""
    if not of:
        return Figure(name=name, value=None, limit=limit, samples=0)
    return Figure(name=name, value=many / of, interval=share_interval(many, of), limit=limit, samples=of)


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
