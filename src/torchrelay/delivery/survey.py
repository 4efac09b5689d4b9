"""Looks at a site for what takes up room on this machine and on the tracking server, and for what may serve again."""

import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from torchrelay import components
from torchrelay.config import NodeConfig, Perimeter, Retention, Site, component_names, read_json, root, settings
from torchrelay.delivery import reach
from torchrelay.delivery.retention import Fate, Kind, Thing, Window, plan
from torchrelay.delivery.store import State, store
from torchrelay.errors import ConfigError, DataError, TorchrelayError
from torchrelay.handover import ArchiveRecord, Desired, Manifest, Registration, WantedVersion
from torchrelay.lineage import TAG_DIGEST, TAG_ENVIRONMENT
from torchrelay.rest import Rest
from torchrelay.serving.engine import Instance
from torchrelay.tracking import ModelVersion, Tracking

# `.<name>.<pid>`: written, or put aside, by that process.
_ASIDE = re.compile(r"\.(.+)\.(\d+)")
_REFUSED = ".refused"


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
            for folder in archive_folders(self.tracking, version):
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


def archive_folders(tracking: Tracking, version: ModelVersion) -> list[str]:
    """The version's archives among its run's artifacts: the pipeline's own, and the perimeters' countersigned ones."""
    digest = version.tags.get(TAG_DIGEST)
    if not digest or not version.run_id or not tracking.has_run(version.run_id):
        return []
    kept = [path for path in tracking.artifacts(version.run_id, "torchrelay") if Path(path).name.startswith("archive")]
    return [f"{path}/{digest}" for path in kept]


def _unused_by_dvc() -> list[Path]:
    """Files of DVC's cache that neither the workspace nor any commit uses."""
    lines = dvc_gc("--dry").splitlines()
    return [Path(line.removeprefix("Removing ").strip()) for line in lines if line.startswith("Removing ")]


def dvc_gc(*words: str) -> str:
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
