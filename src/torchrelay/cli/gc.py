"""`torchrelay gc`: what takes up room, what of it may go and why, and with a yes its deletion."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from torchrelay.config import settings, site
from torchrelay.console import leg, paint, result, say

if TYPE_CHECKING:
    from torchrelay.delivery.retention import Fate

_NAMED = 3


@click.command()
@click.option("--confirm", default="", help="yes: delete it; anything else only shows the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print every thing with its fate as JSON.")
def gc(confirm: str, as_json: bool) -> None:
    """Free disk space: show what may go and why the rest stays, and delete it with --confirm yes.

    What serves, what comes and what one may roll back to always stay.
    """
    from torchrelay.delivery.survey import Survey
    from torchrelay.delivery.sweep import sweep

    here, retention = site(), settings().retention
    if confirm != "yes":
        survey = Survey(here, retention)
        with leg("plan", "what may go"):
            fates = survey.plan()
        _show(fates, survey.notes, done=False, as_json=as_json)
        return
    with leg("gc", "delete what may go"):
        swept = sweep(here, retention)
    _show([*swept.gone, *swept.kept], swept.notes, done=True, as_json=as_json, busy=swept.busy)
    if swept.errors:
        raise swept.errors[0]


def _show(fates: list["Fate"], notes: list[str], *, done: bool, as_json: bool, busy: Iterable["Fate"] = ()) -> None:
    gone, kept = [one for one in fates if one.goes], [one for one in fates if not one.goes]
    waiting = list(busy)
    if as_json:
        result(json.dumps(_as_json(gone, kept, waiting, notes, done), indent=2))
        return
    for title, some in (("keeps", kept), ("waits, since it is in use", waiting), ("deleted" if done else "goes", gone)):
        if some:
            result(paint(title, "bold"))
            for line in _lines(some):
                result(f"  {line}")
    for note in notes:
        result(f"{paint('note', 'yellow')} {note}")
    result(f"{'freed' if done else 'would free'} {_megabytes(_total(gone))}; {_megabytes(_total(kept))} stay")
    if gone and not done:
        say("  next: make gc CONFIRM=yes")


def _as_json(
    gone: list["Fate"], kept: list["Fate"], busy: list["Fate"], notes: list[str], done: bool
) -> dict[str, Any]:
    return {
        "done": done,
        "bytes": _total(gone),
        "kept_bytes": _total(kept),
        "notes": notes,
        "goes": [_row(one) for one in gone],
        "busy": [_row(one) for one in busy],
        "keeps": [_row(one) for one in kept],
    }


def _row(fate: "Fate") -> dict[str, Any]:
    about = fate.thing.model_dump(mode="json", exclude={"guards", "running"})
    return {**about, "why": fate.why}


def _lines(fates: Iterable["Fate"]) -> list[str]:
    """One line for the things of one kind at one place that share a reason; a few of them are named."""
    groups: dict[tuple[str, str, str], list[Fate]] = {}
    for one in fates:
        groups.setdefault((one.thing.kind, one.thing.where, one.why), []).append(one)
    return [_line(*key, group) for key, group in sorted(groups.items())]


def _line(kind: str, where: str, why: str, group: list["Fate"]) -> str:
    names = ", ".join(_name(one) for one in group) if len(group) <= _NAMED else f"{len(group)} of them"
    return f"{kind:<15} {where:<22} {_megabytes(_total(group)):>9}  {names}: {why}"


def _name(fate: "Fate") -> str:
    thing = fate.thing
    if thing.kind == "archive":
        return f"{thing.component or 'unreadable'} {thing.version} ({thing.digest[:12]})"
    return thing.name


def _total(fates: Iterable["Fate"]) -> int:
    return sum(one.thing.size or 0 for one in fates)


def _megabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"
