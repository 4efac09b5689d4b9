"""What of the things that take up room may go: a pure function of what was found and of what may serve again.

`torchrelay.delivery.survey` looks for both, `torchrelay.delivery.sweep` carries the plan out.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from torchrelay.config import Frozen, Retention

_DAY_S = 86400.0

Kind = Literal[
    "version",
    "archive",
    "refused archive",
    "evaluation",
    "environment",
    "engine",
    "predictions",
    "log",
    "leftover",
    "DVC cache",
]
# What the rollback window may speak of; none of it goes while the window is not known.
_WINDOWED = ("version", "archive", "evaluation", "environment")


class Thing(Frozen):
    """Something that takes up room."""

    kind: Kind
    name: str = Field(description="For people; unique together with kind and where.")
    where: str = Field(description="A node, a perimeter, this machine, the registry.")
    path: Path | None = Field(None, description="None: on the tracking server.")
    size: int | None = Field(None, description="Bytes on the disk, None where nobody can say.")
    changed: float = Field(0.0, description="Seconds since 1970.")
    guards: tuple[str, ...] = Field((), description="Perimeters whose leases must be held when it goes.")
    component: str = ""
    version: str = ""
    digest: str = ""
    environment: str = Field("", description="The one that it is, or that it needs.")
    running: bool = Field(False, description="Whether a process may be using it now.")


class Window(Frozen):
    """What may serve again, each with the reason: nothing of it ever goes."""

    digests: dict[str, str] = Field(default_factory=dict, description="Of archives.")
    versions: dict[str, str] = Field(default_factory=dict, description="By component@version.")
    environments: dict[str, str] = Field(default_factory=dict, description="By name.")
    unknown: str = Field("", description="Why it is not known in full; then all that it may speak of is kept.")
    registry: bool = Field(True, description="Whether the registry told what its aliases point at.")


class Fate(Frozen):
    """What becomes of a thing, and why."""

    thing: Thing
    goes: bool
    why: str


def plan(things: Iterable[Thing], window: Window, retention: Retention, now: float) -> list[Fate]:
    """The fate of each thing at `now` (seconds since 1970). An archive that stays keeps its environment."""
    things = list(things)
    spare = _spares(things, window, retention)
    fates = {id(one): _fate(one, window, retention, spare, now) for one in things if one.kind != "environment"}
    needed = dict(window.environments)
    for one in things:
        if one.kind == "archive" and one.environment and not fates[id(one)].goes:
            needed.setdefault(one.environment, f"an archive on {one.where} needs it")
    window = window.model_copy(update={"environments": needed})
    return [fates.get(id(one)) or _fate(one, window, retention, spare, now) for one in things]


def _fate(one: Thing, window: Window, retention: Retention, spare: Mapping[int, str], now: float) -> Fate:
    """What speaks for the thing decides; only a thing for which nothing speaks goes."""
    why = _in_window(one, window) or spare.get(id(one)) or _young(one, retention, now) or _kept(one, window, retention)
    return Fate(thing=one, goes=not why, why=why or _GOES[one.kind].format(retention=retention))


_GOES: dict[Kind, str] = {
    "version": "outside the rollback window, and not one of the newest {retention.versions}",
    "archive": "outside the rollback window, and not one of the newest {retention.archives}",
    "refused archive": "refused more than {retention.refused_days:g} days ago",
    "evaluation": "of an archive outside the rollback window, older than {retention.evaluations_days:g} days",
    "environment": "no instance, archive or lock needs it, older than {retention.environments_days:g} days",
    "engine": "a removed engine left it",
    "predictions": "older than {retention.predictions_days:g} days",
    "log": "older than {retention.logs_days:g} days",
    "leftover": "a process that has ended left it",
    "DVC cache": "neither the workspace nor any commit uses it",
}


def _in_window(one: Thing, window: Window) -> str:
    if one.kind not in _WINDOWED:
        return ""
    if window.unknown:
        return f"what may serve again is not known: {window.unknown}"
    if one.kind == "environment":
        return window.environments.get(one.environment, "")
    return window.digests.get(one.digest, "") or window.versions.get(f"{one.component}@{one.version}", "")


def _spares(things: Iterable[Thing], window: Window, retention: Retention) -> dict[int, str]:
    """The newest ones outside the window that are kept all the same, with the reason, by id of the thing."""
    groups: dict[tuple[str, str, str], list[Thing]] = {}
    for one in things:
        if one.kind == "version" or (one.kind == "archive" and one.component and not _in_window(one, window)):
            groups.setdefault((one.kind, one.where, one.component), []).append(one)
    found = {}
    for (kind, _, _), group in groups.items():
        group.sort(key=lambda one: (_number(one.version) if kind == "version" else 0, one.changed), reverse=True)
        number = retention.versions if kind == "version" else retention.archives
        found.update({id(one): f"one of the newest {number}" for one in group[: number or 0]})
    return found


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else 0


def _young(one: Thing, retention: Retention, now: float) -> str:
    """Why it is too young to go; empty where its age does not matter, or is enough."""
    days = {
        "refused archive": retention.refused_days,
        "evaluation": retention.evaluations_days,
        "environment": retention.environments_days,
        "predictions": retention.predictions_days,
        "log": retention.logs_days,
    }.get(one.kind, 0.0)
    return f"younger than {days:g} days" if days and one.changed > now - days * _DAY_S else ""


def _kept(one: Thing, window: Window, retention: Retention) -> str:
    """What else keeps it: somebody uses it, a setting says so, or it cannot be known that nobody asks for it."""
    if one.running:
        return "a process uses it"
    if one.kind == "version" and retention.versions is None:
        return "the setting retention.versions keeps all"
    if one.kind in ("version", "environment") and not window.registry:
        return "the tracking server does not answer, so it may be asked for"
    if one.kind == "DVC cache" and not retention.dvc_cache:
        return "the setting retention.dvc_cache is off"
    return ""
