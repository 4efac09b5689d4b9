"""The verdict as one self-contained page: what was decided, how sure that is, and where the run is worst."""

from torchrelay.gate.judging import Slice, binary, slices, unfit, usable
from torchrelay.gate.plots import Plot, difference_plot, score_plot, templates
from torchrelay.handover import Evaluation, Verdict

MOST_SLICES = 30


def report(
    verdict: Verdict, candidate: Evaluation, live: Evaluation | None, run_url: str, live_url: str | None = None
) -> str:
    """HTML of the verdict. The links lead to the run's page in MLflow and, if given, to the live version's."""
    rows = _slices(candidate, live)
    page = templates().get_template("page.html.j2")
    return page.render(
        verdict=verdict,
        samples=len(candidate.scores),
        meaning=_meaning(verdict),
        plots=[plot for plot in (_score_plot(verdict), _difference_plot(verdict)) if plot],
        slices=rows[:MOST_SLICES],
        left_out=max(len(rows) - MOST_SLICES, 0),
        slicings=", ".join(candidate.slices),
        binary=binary(candidate.scores),
        run_url=run_url,
        live_url=live_url,
    )


def _slices(candidate: Evaluation, live: Evaluation | None) -> list[Slice]:
    """The slices, as far as the evaluations can be cut at all; the verdict already says why they could not."""
    if any(unfit("the candidate", candidate)):
        return []
    comparable = live is not None and len(live.scores) == len(candidate.scores) and all(map(usable, live.scores))
    return slices(candidate, live if comparable else None)


def _meaning(verdict: Verdict) -> str:
    """What the interval says, in words."""
    if verdict.live_version is None:
        return "Nothing is live yet, so only the floor counts."
    if verdict.allowed_regression is None:
        return f"The component's policy asks for no comparison with live version {verdict.live_version}."
    if verdict.difference is None or verdict.interval is None:
        return f"It could not be compared with live version {verdict.live_version}."
    low, high = verdict.interval
    if verdict.difference == 0 and low <= 0 <= high:
        return f"It scores the same as live version {verdict.live_version}."
    if low <= 0 <= high:
        return f"The difference from live version {verdict.live_version} may be chance: its 95 % interval holds zero."
    word = "better" if low > 0 else "worse"
    return f"It is {word} than live version {verdict.live_version}: the 95 % interval does not hold zero."


def _score_plot(verdict: Verdict) -> Plot | None:
    if verdict.candidate is None:
        return None
    live = {} if verdict.live is None else {f"live v{verdict.live_version}": verdict.live}
    return score_plot(verdict.metric, (verdict.candidate, None), live, verdict.floor)


def _difference_plot(verdict: Verdict) -> Plot | None:
    if verdict.difference is None or verdict.allowed_regression is None:
        return None
    rows = {"difference": (verdict.difference, verdict.interval)}
    return difference_plot(f"{verdict.metric}: candidate minus live", rows, verdict.allowed_regression)
