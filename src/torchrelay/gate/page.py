"""The verdict as one self-contained page: what was decided, how sure that is, and where the run is worst."""

import math

from torchrelay.config import Frozen
from torchrelay.gate.judging import Slice, slices
from torchrelay.handover import Evaluation, Verdict

MOST_SLICES = 30


class Mark(Frozen):
    """One row of a plot. Places are percentages of the plot's width."""

    label: str
    text: str
    place: float
    span: tuple[float, float] | None = None
    kind: str


class Plot(Frozen):
    """Rows over one axis; what lies left of `limit` is refused."""

    title: str
    rows: tuple[Mark, ...]
    limit: float
    limit_text: str
    ticks: tuple[tuple[float, str], ...]
    zero: float | None = None


def report(
    verdict: Verdict, candidate: Evaluation, live: Evaluation | None, run_url: str, live_url: str | None = None
) -> str:
    """HTML of the verdict. The links lead to the run's page in MLflow and, if given, to the live version's."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rows = _slices(candidate, live)
    pages = Environment(loader=PackageLoader("torchrelay.gate", "."), autoescape=True, undefined=StrictUndefined)
    pages.filters.update(figure=figure, signed=signed)
    return pages.get_template("page.html.j2").render(
        verdict=verdict,
        samples=len(candidate.scores),
        meaning=_meaning(verdict),
        plots=[plot for plot in (_score_plot(verdict), _difference_plot(verdict)) if plot],
        slices=rows[:MOST_SLICES],
        left_out=max(len(rows) - MOST_SLICES, 0),
        slicings=", ".join(candidate.slices),
        binary=set(candidate.scores) <= {0.0, 1.0},
        run_url=run_url,
        live_url=live_url,
    )


def figure(value: float | None) -> str:
    """A number for people, with four significant digits and a real minus sign."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def signed(value: float | None) -> str:
    """A difference for people: with its sign, and no more digits than it is worth."""
    if value is None:
        return "–"
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _slices(candidate: Evaluation, live: Evaluation | None) -> list[Slice]:
    """The slices, as far as the evaluations can be cut at all; the verdict already says why they could not."""
    n = len(candidate.scores)
    if (
        not n
        or not all(math.isfinite(s) for s in candidate.scores)
        or any(len(x) != n for x in candidate.slices.values())
    ):
        return []
    comparable = live is not None and len(live.scores) == n and all(math.isfinite(s) for s in live.scores)
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
    values = {"candidate": verdict.candidate, "floor": verdict.floor}
    if verdict.live is not None:
        values = {
            "candidate": verdict.candidate,
            f"live v{verdict.live_version}": verdict.live,
            "floor": verdict.floor,
        }
    low, high = _range(list(values.values()))
    kinds = {"candidate": "candidate", "floor": "floor"}
    return Plot(
        title=verdict.metric,
        rows=tuple(
            Mark(label=name, text=figure(x), place=_percent(x, low, high), kind=kinds.get(name, "live"))
            for name, x in values.items()
        ),
        limit=_percent(verdict.floor, low, high),
        limit_text=f"left of {figure(verdict.floor)} is refused",
        ticks=_ticks(low, high),
    )


def _difference_plot(verdict: Verdict) -> Plot | None:
    if verdict.difference is None or verdict.allowed_regression is None:
        return None
    ends = verdict.interval or (verdict.difference, verdict.difference)
    low, high = _range([0.0, -verdict.allowed_regression, *ends])
    span = (_percent(ends[0], low, high), _percent(ends[1], low, high))
    place = _percent(verdict.difference, low, high)
    return Plot(
        title=f"{verdict.metric}: candidate minus live",
        rows=(Mark(label="difference", text=signed(verdict.difference), place=place, span=span, kind="candidate"),),
        limit=_percent(-verdict.allowed_regression, low, high),
        limit_text=f"left of {figure(-verdict.allowed_regression or 0.0)} is refused",
        ticks=_ticks(low, high),
        zero=_percent(0.0, low, high),
    )


def _range(values: list[float]) -> tuple[float, float]:
    """The axis: all values with some air around them."""
    low, high = min(values), max(values)
    air = 0.18 * (high - low) or 0.05 * abs(high) or 0.01
    return low - air, high + air


def _percent(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 3)


def _ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Three or four round numbers on the axis, none so near an end that its label would be cut."""
    rough = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    places = [(_percent(n * step, low, high), figure(n * step or 0.0)) for n in range(first, last + 1)]
    return tuple((place, text) for place, text in places if 4 <= place <= 96)
