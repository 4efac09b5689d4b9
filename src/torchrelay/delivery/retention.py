"""What takes up room on this machine and on the tracking server, what of it may go, and how it goes.

The plan is a pure function: from the things that were found, and from what may serve again (`Window`), to a fate with
its reason for each. `sweep` looks and plans once more while it holds the lease of each perimeter and the lock of each
of its nodes, so that nothing is brought up in the meantime, and renames what goes aside. It is deleted when the leases
are given back: a kill at any point leaves a thing whole, or a rest that the next sweep takes away.
"""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from torchrelay import components
from torchrelay.config import (
    Frozen,
    NodeConfig,
    Perimeter,
    Retention,
    Site,
    component_names,
    read_json,
    root,
    settings,
    write_json,
)
from torchrelay.delivery import reach
from torchrelay.delivery.store import State, store
from torchrelay.errors import BusyError, ConfigError, DataError, TorchrelayError, TrackingError
from torchrelay.handover import ArchiveRecord, Desired, Manifest, Registration, WantedVersion
from torchrelay.lineage import TAG_DIGEST, TAG_ENVIRONMENT
from torchrelay.rest import AGAIN, NOT_THERE, AnsweredError, Rest
from torchrelay.serving.engine import Instance
from torchrelay.tracking import ModelVersion, Tracking

_DAY_S = 86400.0
_PATIENCE_S = 5.0
# `.<name>.<pid>`: written, or put aside, by that process.
_ASIDE = re.compile(r"\.(.+)\.(\d+)")
_REFUSED = ".refused"

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


# The plan: pure


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


# The look around


class Survey:
    """Looks at a site. What was measured once is not measured again by the same survey."""

    def __init__(self, site: Site, retention: Retention) -> None:
        self.site = site
        self.retention = retention
        self.tracking = Tracking(site.tracking.url)
        self.notes: list[str] = []
        self._sizes: dict[Path | str, int] = {}
        self._unused: list[Path] | None = None
        self._state = settings().state

    def plan(self) -> list[Fate]:
        """The fate of everything there is, as things stand now."""
        self.notes = []
        answers = self.tracking.healthy()
        if not answers:
            self.notes.append(
                f"the tracking server at {self.site.tracking.url} does not answer: this is about local things only, "
                "and environments stay, since an alias may ask for them"
            )
        window = self.window(answers)
        if window.unknown:
            self.notes.append(
                f"what may serve again is not known, so all that may be part of it stays: {window.unknown}"
            )
        return plan(self.things(answers), window, self.retention, time.time())

    # What may serve again

    def window(self, registry: bool) -> Window:
        """All that any perimeter, node, alias or this checkout needs, `registry`: whether to ask for aliases."""
        found = _Needed()
        try:
            for name in self.site.perimeters:
                self._remembered(name, found)
            for folder in self._node_folders():
                self._on_node(folder, found)
            for perimeter in self.site.perimeters.values():
                self._held(perimeter, found)
            self._built_here(found)
            if registry:
                self._asked_for(found)
        except (TorchrelayError, ValidationError, sqlite3.Error, OSError) as error:
            found.unknown = error.found if isinstance(error, TorchrelayError) else f"{type(error).__name__}: {error}"
        return Window(
            digests=found.digests,
            versions=found.versions,
            environments=found.environments,
            unknown=found.unknown,
            registry=registry,
        )

    def _remembered(self, name: str, found: "_Needed") -> None:
        """What the perimeter's control node remembers; a memory that was never made has nothing."""
        if not (self._state / "perimeters" / name / "control.db").is_file():
            return
        for state in store(name).states().values():
            for wanted, why in _of_state(state):
                found.add(wanted, f"{why} in {name}")
            for release in state.placed:
                found.digests.setdefault(release.partition("@")[2], f"routed in {name}")

    def _node_folders(self) -> list[Path]:
        """Of the site's nodes, and of those that it had: their engines may run until somebody stops them."""
        ours = [node.folder for perimeter in self.site.perimeters.values() for node in perimeter.nodes]
        return list(dict.fromkeys([*ours, *sorted(self._state.glob("perimeters/*/nodes/*"))]))

    def _on_node(self, folder: Path, found: "_Needed") -> None:
        """What the node goes back to by itself, and what its engines were given."""
        if (folder / "desired.json").is_file():
            desired = read_json(Desired, folder / "desired.json", "make status")
            for wanted in (*desired.components, *(routed.version for routed in desired.routes)):
                found.add(wanted, f"node {folder.name} was told to hold it")
        for file in sorted(folder.glob("engines/*/instance.json")):
            python = Path(read_json(Instance, file, "make up").python)
            for name in (part.name for part in python.parents):
                found.environments.setdefault(name, f"an engine on {folder.name} runs in it")
        for file in sorted(folder.glob("engines/*/digests/*/*")):
            found.digests.setdefault(file.read_text().strip(), f"an engine on {folder.name} was given it")

    def _held(self, perimeter: Perimeter, found: "_Needed") -> None:
        """What the nodes' engines and the gateway say themselves."""
        for node in perimeter.nodes:
            if not (node.folder / "node.json").is_file():
                continue
            report = reach.observe_on(node)
            releases = [(one.component, one.version, one.digest) for one in report.held]
            releases += [(one.component, one.version, one.digest) for one in report.routed or ()]
            for component, version, digest in releases:
                found.release(component, version, digest, "", f"node {node.name} has it")

    def _built_here(self, found: "_Needed") -> None:
        """What the checkout built last, and the environments that its locks ask for."""
        for path in sorted(root().glob("results/*/archive.json")):
            record = read_json(ArchiveRecord, path, "make deploy-dev")
            found.release(record.component, record.version, record.digest, record.environment, "built here last")
        for path in sorted(root().glob("results/*/registration.json")):
            registered = read_json(Registration, path, "make deploy-dev")
            found.versions.setdefault(f"{registered.component}@{registered.version}", "built here last")
        for name in component_names():
            with suppress(ConfigError):  # without a lock for this machine it has no environment here
                found.environments.setdefault(components.environment_name(name), f"the lock of {name} asks for it")

    def _asked_for(self, found: "_Needed") -> None:
        for model, aliases in self.tracking.models().items():
            for alias, number in aliases.items():
                version = self.tracking.version(model, number)
                tags = version.tags if version else {}
                digest, environment = tags.get(TAG_DIGEST, ""), tags.get(TAG_ENVIRONMENT, "")
                found.release(model, number, digest, environment, f"@{alias} points at it")

    # What there is

    def things(self, registry: bool) -> list[Thing]:
        """Everything that takes up room; versions only where the registry answers."""
        return [
            *self._things_of_perimeters(),
            *self._shared(),
            *self._logs(),
            *(self._versions() if registry else ()),
            *self._dvc_objects(),
        ]

    def _things_of_perimeters(self) -> Iterator[Thing]:
        for name, perimeter in self.site.perimeters.items():
            for node in perimeter.nodes:
                yield from self._archives(node.folder / "archives", node.name, (name,))
                yield from self._engines(node.folder / "engines", node.name, (name,))
                if (node.folder / "node.json").is_file():
                    config = read_json(NodeConfig, node.folder / "node.json", "make up")
                    yield from self._segments(config.predictions, node.name, (name,))
            admission = self._state / "perimeters" / name / "admission"
            yield from self._archives(admission, f"{name}'s admission", (name,))
            for file in sorted(admission.glob("evaluations/*.json")):
                digest = file.stem.partition("-")[0]
                yield self._thing("evaluation", file, f"{name}'s admission", (name,), digest=digest)

    def _archives(self, folder: Path, where: str, guards: tuple[str, ...]) -> Iterator[Thing]:
        for path in sorted(one for one in _entries(folder) if one.is_dir() and one.name != "evaluations"):
            if _ASIDE.fullmatch(path.name):
                yield self._aside(path, where, guards)
            elif path.suffix == _REFUSED:
                yield self._thing("refused archive", path, where, guards)
            else:
                yield self._archive(path, where, guards)

    def _archive(self, path: Path, where: str, guards: tuple[str, ...]) -> Thing:
        try:
            manifest = read_json(Manifest, path / "manifest.json", "make gc")
        except ConfigError:  # then it is its name alone that says what it is
            return self._thing("archive", path, where, guards, digest=path.name)
        about = {"component": manifest.component, "version": manifest.version, "environment": manifest.environment}
        return self._thing("archive", path, where, guards, digest=path.name, **about)

    def _engines(self, folder: Path, where: str, guards: tuple[str, ...]) -> Iterator[Thing]:
        """The folders of engines: one with its instance.json is the node's own to remove."""
        for path in sorted(one for one in _entries(folder) if one.is_dir()):
            if _ASIDE.fullmatch(path.name):
                yield self._aside(path, where, guards)
            else:
                yield self._thing("engine", path, where, guards, running=(path / "instance.json").is_file())

    def _segments(self, folder: Path, where: str, guards: tuple[str, ...]) -> Iterator[Thing]:
        for file in sorted(folder.glob("*/*.jsonl")):
            yield self._thing("predictions", file, where, guards, component=file.parent.name)

    def _shared(self) -> Iterator[Thing]:
        """What serves all perimeters: it goes only while each of them stands still."""
        everybody = tuple(self.site.perimeters)
        yield from self._archives(self._state / "archives", "this machine", everybody)
        folder = self._state / "environments"
        if folder.is_symlink():
            self.notes.append(f"environments stay: {folder} is a link, so they are another checkout's as well")
            return
        for path in sorted(one for one in _entries(folder) if one.is_dir()):
            if _ASIDE.fullmatch(path.name):
                yield self._aside(path, "this machine", everybody)
            else:
                yield self._thing("environment", path, "this machine", everybody, environment=path.name)

    def _logs(self) -> Iterator[Thing]:
        """Rotated logs, and those of programs that are no more; what a program writes to is left to its rotation."""
        programs = {file.stem for file in self._state.glob("supervisor/programs/*.conf")} | {"configure"}
        for file in sorted(self._state.glob("logs/*.log*")):
            current = file.suffix == ".log" and file.stem in programs
            yield self._thing("log", file, "this machine", (), running=current)

    def _versions(self) -> Iterator[Thing]:
        for model in self.tracking.models():
            for version in self.tracking.versions(model):
                yield Thing(
                    kind="version",
                    name=f"{model} {version.version}",
                    where="the registry",
                    size=self._stored(version),
                    guards=tuple(self.site.perimeters),
                    component=model,
                    version=version.version,
                    digest=version.tags.get(TAG_DIGEST, ""),
                    environment=version.tags.get(TAG_ENVIRONMENT, ""),
                )

    def _stored(self, version: ModelVersion) -> int | None:
        """Bytes of the version's archives on the tracking server, without the logged model; None if all versions stay.

        That takes some requests for each version.
        """
        if self.retention.versions is None:
            return None
        key = f"{version.name}@{version.version}"
        if key not in self._sizes:
            rest, rows = Rest(self.tracking.url), []
            for folder in _archive_folders(self.tracking, version):
                rows += rest.get("artifacts/list", {"run_id": version.run_id, "path": folder}).get("files", [])
            self._sizes[key] = sum(int(row.get("file_size") or 0) for row in rows)
        return self._sizes[key]

    def _dvc_objects(self) -> Iterator[Thing]:
        """What `dvc gc` would remove. DVC takes seconds, so it is asked once, and only with the setting."""
        if not self.retention.dvc_cache:
            cache = self._state / "dvc" / "cache"
            if cache.is_dir():
                yield self._thing("DVC cache", cache, "this machine", ())
            return
        if self._unused is None:
            self._unused = _unused_by_dvc()
        for path in self._unused:
            yield self._thing("DVC cache", path, "this machine", ())

    def _aside(self, path: Path, where: str, guards: tuple[str, ...]) -> Thing:
        import psutil

        found = _ASIDE.fullmatch(path.name)
        alive = found is not None and psutil.pid_exists(int(found[2]))
        return self._thing("leftover", path, where, guards, running=alive)

    def _thing(self, kind: Kind, path: Path, where: str, guards: tuple[str, ...], **more: str | bool) -> Thing:
        if path not in self._sizes:
            self._sizes[path] = _size(path)
        try:
            changed = path.lstat().st_mtime
        except FileNotFoundError:  # its owner has just deleted it
            changed = time.time()
        about = {"kind": kind, "name": path.name, "where": where, "path": path, "guards": guards, **more}
        return Thing.model_validate({**about, "size": self._sizes[path], "changed": changed})


@dataclass
class _Needed:
    """A window in the making. The first reason found for a thing is the one that is told."""

    digests: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    environments: dict[str, str] = field(default_factory=dict)
    unknown: str = ""

    def add(self, wanted: WantedVersion, why: str) -> None:
        self.release(wanted.component, wanted.version, wanted.digest, wanted.environment, why)

    def release(self, component: str, version: str, digest: str, environment: str, why: str) -> None:
        self.versions.setdefault(f"{component}@{version}", why)
        if digest:
            self.digests.setdefault(digest, why)
        if environment:
            self.environments.setdefault(environment, f"version {version} of {component} needs it: {why}")


def _of_state(state: State) -> Iterator[tuple[WantedVersion, str]]:
    """All that the perimeter's memory speaks of: what serves, comes, served before, is held and is routed."""
    if state.live:
        yield state.live, "live"
    if state.rollout:
        yield state.rollout.wanted, "underway"
    yield from ((one.wanted, "served before") for one in reversed(state.served))
    yield from ((wanted, f"held on {node}") for node, held in state.hold.items() for wanted in held)
    yield from ((routed.version, "routed") for routed in state.routes)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    """Bytes that the file, or all in the folder, takes up on the disk. Links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return _blocks(path)
    return sum(_blocks(Path(folder, name)) for folder, _, files in os.walk(path) for name in files)


def _blocks(file: Path) -> int:
    try:
        return file.lstat().st_blocks * 512
    except FileNotFoundError:  # its owner has just deleted it
        return 0


# The sweep


@dataclass
class Swept:
    """What a sweep did."""

    gone: list[Fate] = field(default_factory=list)
    busy: list[Fate] = field(default_factory=list)
    kept: list[Fate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[TorchrelayError] = field(default_factory=list)


class Retired(Frozen):
    """`<state>/retired/….json`: a version whose artifacts are still to be deleted, written before it goes itself."""

    component: str
    version: str
    urls: tuple[str, ...] = Field(description="Of the folders on the tracking server.")


def sweep(site: Site, retention: Retention, patience_s: float = _PATIENCE_S) -> Swept:
    """Delete what may go. What belongs to a perimeter that somebody else steers now is left, and named as busy.

    Errors of single things are collected; the others go all the same.
    """
    survey, swept = Survey(site, retention), Swept()
    survey.plan()  # measures, so that the leases are held for a moment only
    aside: list[Path] = []
    with ExitStack() as stack:
        held = {name for name in site.perimeters if _stands_still(stack, site, name, patience_s, swept)}
        for fate in survey.plan():
            _carry_out(fate, held, survey, swept, aside)
    for path in aside:
        _delete(path, swept)
    swept.notes += survey.notes
    _empty_retired(survey, swept)
    _empty_cache(swept)
    return swept


def _delete(folder: Path, swept: Swept) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        swept.errors.append(_undeletable(folder, error))


def _stands_still(stack: ExitStack, site: Site, name: str, patience_s: float, swept: Swept) -> bool:
    """Take the perimeter's lease and its nodes' locks, in the order of converge; whether they could all be had."""
    with ExitStack() as mine:
        try:
            mine.enter_context(store(name).lease(patience_s))
            for node in site.perimeters[name].nodes:
                if node.folder.is_dir():
                    mine.enter_context(FileLock(node.folder / "apply.lock", timeout=patience_s))
        except (BusyError, Timeout):
            swept.notes.append(f"{name} is being brought up to date just now: what is its own stays for this time")
            return False
        stack.enter_context(mine.pop_all())
    return True


def _carry_out(fate: Fate, held: set[str], survey: Survey, swept: Swept, aside: list[Path]) -> None:
    thing = fate.thing
    if not fate.goes:
        swept.kept.append(fate)
    elif not held.issuperset(thing.guards):
        swept.busy.append(fate)
    else:
        try:
            done = _retire(thing, survey) if thing.path is None else _put_aside(thing, thing.path, aside)
        except (TorchrelayError, OSError) as error:
            swept.errors.append(error if isinstance(error, TorchrelayError) else _undeletable(thing.path, error))
            return
        (swept.gone if done else swept.busy).append(fate)


def _put_aside(thing: Thing, path: Path, aside: list[Path]) -> bool:
    """A file goes at once, a folder becomes one of ours to delete; False while somebody builds the environment."""
    if thing.kind == "environment":
        try:
            with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
                aside.append(path.rename(path.with_name(f".{path.name}.{os.getpid()}")))
        except Timeout:
            return False
    elif thing.kind == "DVC cache":
        return True  # DVC looks again by itself, and takes its own lock: _empty_cache
    elif not path.is_dir():
        path.unlink(missing_ok=True)
    elif thing.kind == "leftover":
        aside.append(path)
    else:
        aside.append(path.rename(path.with_name(f".{path.name}.{os.getpid()}")))
    return True


def _undeletable(path: Path | None, error: OSError) -> TorchrelayError:
    what = error.filename or path
    return ConfigError(f"{what}: {error.strerror}", "a file of ours that can be deleted", f"ls -ld {what}")


# Versions


def _retire(thing: Thing, survey: Survey) -> bool:
    """Delete the version, once it is written down what its artifacts are; False if an alias has come to point at it."""
    tracking = survey.tracking
    version = tracking.version(thing.component, thing.version)
    if version is None:
        return True
    if thing.version in tracking.aliases(thing.component).values():
        return False
    others = [one for one in tracking.versions(thing.component) if one.version != version.version]
    folders = _archive_folders(tracking, version)
    if version.run_id not in [one.run_id for one in others]:
        folders = [str(Path(folder).parent) for folder in folders]
    urls = [tracking.artifact_url(version.run_id, folder) for folder in folders]
    if version.source.startswith("models:/m-") and version.source not in [one.source for one in others]:
        urls.append(_model_url(tracking, version.source.removeprefix("models:/")))
    retired = Retired(component=thing.component, version=thing.version, urls=tuple(urls))
    write_json(_retired() / f"{thing.component}-{thing.version}.json", retired)
    gone = {"name": thing.component, "version": thing.version}
    Rest(tracking.url).repeat("model-versions/delete", gone, method="DELETE")
    return True


def _archive_folders(tracking: Tracking, version: ModelVersion) -> list[str]:
    """The version's archives among its run's artifacts: the pipeline's own, and the perimeters' countersigned ones."""
    digest = version.tags.get(TAG_DIGEST)
    if not digest or not version.run_id or not tracking.has_run(version.run_id):
        return []
    kept = [path for path in tracking.artifacts(version.run_id, "torchrelay") if Path(path).name.startswith("archive")]
    return [f"{path}/{digest}" for path in kept]


def _model_url(tracking: Tracking, model: str) -> str:
    from urllib.parse import urlsplit

    rest = Rest(tracking.url)
    uri = urlsplit(str(rest.get(f"logged-models/{model}")["model"]["info"]["artifact_uri"]))
    return rest.artifact(uri.path.strip("/"))


def _retired() -> Path:
    return settings().state / "retired"


def _empty_retired(survey: Survey, swept: Swept) -> None:
    """Delete the artifacts of the versions that are gone, also those of a sweep that was killed in between.

    The run itself stays: the ledger, and whoever asks why, find its parameters and scores.
    """
    for file in sorted(_retired().glob("*.json")):
        try:
            retired = read_json(Retired, file, f"read {file}, then delete it")
            if survey.tracking.version(retired.component, retired.version) is None:
                for url in retired.urls:
                    _delete_artifact(url)
            file.unlink()
        except TorchrelayError as error:
            swept.errors.append(error)


def _delete_artifact(url: str) -> None:
    import urllib3

    try:
        answer = urllib3.request("DELETE", url, retries=AGAIN, timeout=60)
    except urllib3.exceptions.HTTPError as error:
        raise TrackingError(f"DELETE {url}: {error}", "the tracking server", "make up, then make gc") from error
    if answer.status >= 400 and NOT_THERE.encode() not in answer.data:
        raise AnsweredError(f"DELETE {url} → {answer.status}: {answer.data[:300]!r}", "200", "make gc", "")


# DVC


def _unused_by_dvc() -> list[Path]:
    """Files of DVC's cache that neither the workspace nor any commit uses."""
    lines = _dvc_gc("--dry").splitlines()
    return [Path(line.removeprefix("Removing ").strip()) for line in lines if line.startswith("Removing ")]


def _empty_cache(swept: Swept) -> None:
    if not any(fate.thing.kind == "DVC cache" for fate in swept.gone):
        return
    try:
        _dvc_gc("--force")
    except DataError as error:
        swept.errors.append(error)


def _dvc_gc(*words: str) -> str:
    """Run `dvc gc` and give what it printed. Raises DataError in DVC's own words."""
    command = [sys.executable, "-m", "dvc", "gc", "--workspace", "--all-commits", *words]
    environment = os.environ | {
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(settings().state / "dvc" / "site"),
    }
    done = subprocess.run(command, cwd=root(), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(
            f"dvc gc: {done.stderr.strip()[-500:]}", "exit code 0", f"cd {root()} && {' '.join(command[1:])}"
        )
    return done.stdout
