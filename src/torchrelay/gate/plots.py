"""What the gates' pages draw with: inline SVG by Jinja templates, and numbers as people read them."""

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from torchrelay.config import Frozen

if TYPE_CHECKING:
    from jinja2 import Environment

Value = tuple[float, tuple[float, float] | None]
"""A figure with its interval, if it has one."""


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
    note: str = Field("", description="What else to say below it.")


class Bars(Frozen):
    """A histogram. Places and heights are percentages of its width and height; right of `limit` is too much."""

    title: str
    bars: tuple[tuple[float, float], ...]
    width: float
    limit: float
    ticks: tuple[tuple[float, str], ...]
    note: str


def templates() -> "Environment":
    """The templates beside this file, which escape whatever the data hold."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(loader=PackageLoader("torchrelay.gate", "."), autoescape=True, undefined=StrictUndefined)
    found.filters.update(figure=figure, signed=signed)
    return found


def figure(value: float | None) -> str:
    """A number for people, with four significant digits and a real minus sign."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def signed(value: float | None) -> str:
    """A difference for people: with its sign, and no more digits than it is worth."""
    if value is None:
        return "–"
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def score_plot(title: str, candidate: Value, live: dict[str, float], floor: float) -> Plot:
    """The candidate's figure with its interval, the live version's under its label, and the floor."""
    rows = {"candidate": candidate, **{label: (value, None) for label, value in live.items()}, "floor": (floor, None)}
    low, high = axis([end for value, interval in rows.values() for end in (value, *(interval or ()))])
    kinds = {"candidate": "candidate", "floor": "floor"}
    return Plot(
        title=title,
        rows=tuple(
            _mark(label, figure(row[0]), row, (low, high), kinds.get(label, "live")) for label, row in rows.items()
        ),
        limit=percent(floor, low, high),
        limit_text=f"left of {figure(floor)} is refused",
        ticks=ticks(low, high),
        note=_interval_note(candidate[1], figure),
    )


def difference_plot(title: str, rows: dict[str, Value], allowed: float, rule: str = "") -> Plot:
    """Differences from the live version, by label; the limit is the fall that is allowed.

    `rule` says when a row is refused; without one it is when its point lies left of the limit.
    """
    low, high = axis([0.0, -allowed, *(end for value, interval in rows.values() for end in (value, *(interval or ())))])
    only = next(iter(rows.values()))[1] if not rule else None
    return Plot(
        title=title,
        rows=tuple(_mark(label, signed(row[0]), row, (low, high), "candidate") for label, row in rows.items()),
        limit=percent(-allowed, low, high),
        limit_text=rule or f"left of {figure(-allowed or 0.0)} is refused",
        ticks=ticks(low, high),
        zero=percent(0.0, low, high),
        note=_interval_note(only, signed),
    )


def histogram(title: str, values: list[float], limit: float, limit_text: str, count: int = 40) -> Bars:
    """`values` (finite, from 0 on, at least one) in `count` bars of equal width; the last takes all larger ones."""
    high = 1.25 * max(limit, sorted(values)[math.ceil(0.99 * len(values)) - 1])
    places = Counter(min(int(count * value / high), count - 1) for value in values)
    most, beyond = max(places.values()), sum(value > high for value in values)
    more = f" The last bar holds {beyond} beyond {figure(high)}." if beyond else ""
    return Bars(
        title=title,
        bars=tuple((100 * place / count, 100 * places[place] / most) for place in sorted(places)),
        width=100 / count,
        limit=percent(limit, 0, high),
        ticks=ticks(0, high),
        note=f"{limit_text}. The highest bar is {most} of {len(values):,}.{more}",
    )


def _mark(label: str, text: str, row: Value, ends: tuple[float, float], kind: str) -> Mark:
    value, interval = row
    span = (percent(interval[0], *ends), percent(interval[1], *ends)) if interval else None
    return Mark(label=label, text=text, place=percent(value, *ends), span=span, kind=kind)


def _interval_note(interval: tuple[float, float] | None, shown: Callable[[float], str]) -> str:
    return f"The bar is the 95 % interval, {shown(interval[0])} to {shown(interval[1])}." if interval else ""


def axis(values: list[float]) -> tuple[float, float]:
    """The axis: all values with some air around them."""
    low, high = min(values), max(values)
    air = 0.18 * (high - low) or 0.05 * abs(high) or 0.01
    return low - air, high + air


def percent(value: float, low: float, high: float) -> float:
    """Where a value lies on the axis, in percent of its width."""
    return round(100 * (value - low) / (high - low), 3)


def ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Three or four round numbers on the axis, none so near an end that its label would be cut."""
    rough = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    places = [(percent(n * step, low, high), figure(n * step or 0.0)) for n in range(first, last + 1)]
    return tuple((place, text) for place, text in places if 4 <= place <= 96)
