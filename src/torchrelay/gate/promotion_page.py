"""The promotion verdict as one self-contained page: every check, how sure it is, and what was seen on the way."""

import json
from typing import Any

from torchrelay.gate.evidence import Evidence, Figure, PromotionVerdict
from torchrelay.gate.plots import Bars, Plot, difference_plot, histogram, score_plot, templates

MOST_SLICES = 30
MOST_EXAMPLES = 20
LONGEST_ANSWER = 300
SYMBOLS = {"passed": "✓", "warned": "!", "skipped": "–", "refused": "✗"}


def promotion_report(
    verdict: PromotionVerdict, evidence: Evidence, url: str | None = None, live_url: str | None = None
) -> str:
    """HTML of the verdict. The links lead to the version's page in MLflow, and to the live version's."""
    slices = verdict.check("slices").figures
    examples = evidence.replay.examples
    page = templates().get_template("promotion.html.j2")
    return page.render(
        verdict=verdict,
        symbols=SYMBOLS,
        plots=[plot for plot in (_score_plot(verdict), _difference_plot(verdict)) if plot],
        slices=slices[:MOST_SLICES],
        slices_left_out=max(len(slices) - MOST_SLICES, 0),
        slice_plot=_slice_plot(slices[:MOST_SLICES]),
        latencies=_latencies(verdict, evidence),
        shares=[figure for name in ("latency", "replay") for figure in verdict.check(name).figures if figure.interval],
        examples=[(each.id, _answer(each.live), _answer(each.candidate)) for each in examples[:MOST_EXAMPLES]],
        examples_left_out=max(len(examples) - MOST_EXAMPLES, 0),
        url=url,
        live_url=live_url,
    )


def _score_plot(verdict: PromotionVerdict) -> Plot | None:
    found, compared = verdict.check("floor").figures, verdict.check("regression").figures
    if not found or found[0].value is None or found[0].limit is None:
        return None
    live = {f"live v{verdict.live_version}": one.live for one in compared if one.live is not None}
    return score_plot(verdict.metric, (found[0].value, found[0].interval), live, found[0].limit)


def _difference_plot(verdict: PromotionVerdict) -> Plot | None:
    found = verdict.check("regression").figures
    return _differences(f"{verdict.metric}: candidate minus live", dict(zip(["difference"], found, strict=False)))


def _slice_plot(slices: tuple[Figure, ...]) -> Plot | None:
    sure = f"{100 * slices[0].confidence:.6g}" if slices else ""
    rule = f"where a slice is refused if its whole bar, the {sure} % interval, lies there; all bars hold together"
    return _differences("Candidate minus live by slice, worst first", {one.name: one for one in slices}, rule)


def _differences(title: str, figures: dict[str, Figure], rule: str = "") -> Plot | None:
    rows = {name: (one.difference, one.interval) for name, one in figures.items() if one.difference is not None}
    limits = [one.limit for one in figures.values() if one.limit is not None]
    return difference_plot(title, rows, -limits[0], rule) if rows and limits else None


def _latencies(verdict: PromotionVerdict, evidence: Evidence) -> Bars | None:
    """The histogram, where the check found the latencies fit to be judged."""
    objective = next((one.limit for one in verdict.check("latency").figures if one.limit is not None), None)
    if objective is None:
        return None
    shaded = f"Shaded: beyond the objective of {objective:.6g} ms"
    return histogram("Latency in ms", list(evidence.latencies_ms), objective, shaded)


def _answer(answer: Any) -> str:
    """An answer as JSON, cut where it is long."""
    text = json.dumps(answer, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= LONGEST_ANSWER else f"{text[:LONGEST_ANSWER]}…"
