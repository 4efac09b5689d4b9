"""A roll-out as one self-contained page: how it ended, what was counted, and where the two versions disagreed most."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torchrelay.config import Frozen
from torchrelay.gate.plots import templates

LONGEST = 400


class RolloutSummary(Frozen):
    """What the page tells of a roll-out."""

    component: str
    perimeter: str
    version: str
    live_version: str | None
    passed: bool
    reason: str
    stages: tuple[str, ...]
    figures: Mapping[str, float]


def rollout_report(summary: RolloutSummary, disagreements: Sequence[Mapping[str, Any]]) -> str:
    """HTML of the roll-out. `disagreements` come worst first, as `predictions.Disagreement.as_json` gives them."""
    rows = [
        {
            "id": one["id"],
            "kind": one["kind"],
            "live": _short(one["live"]),
            "candidate": _short(one["candidate"]),
            "inputs": _short(one.get("instances")),
        }
        for one in disagreements
    ]
    verdict = {"verdict": "pass" if summary.passed else "refuse"}
    return templates().get_template("rollout.html.j2").render(summary=summary, rows=rows, verdict=verdict)


def _short(content: Any) -> str:
    if content is None:
        return ""
    text = json.dumps(content, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
