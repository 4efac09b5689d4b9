"""Deletes what may go, so that nothing that may serve again is lost, whenever it is killed.

It looks and plans once more while it holds the lease of each perimeter and the lock of each of its nodes, so that
nothing is brought up in the meantime, and renames what goes aside. It is deleted when the leases are given back: a kill
at any point leaves a thing whole, or a rest that the next sweep takes away.
"""

import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import Field

from torchrelay.config import Frozen, Retention, Site, read_json, settings, write_json
from torchrelay.delivery.retention import Fate, Thing
from torchrelay.delivery.store import store
from torchrelay.delivery.survey import Survey, archive_folders, dvc_gc
from torchrelay.errors import BusyError, ConfigError, DataError, TorchrelayError, TrackingError
from torchrelay.rest import AGAIN, NOT_THERE, AnsweredError, Rest
from torchrelay.tracking import Tracking

_PATIENCE_S = 5.0


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


def _retire(thing: Thing, survey: Survey) -> bool:
    """Delete the version, once it is written down what its artifacts are; False if an alias has come to point at it."""
    tracking = survey.tracking
    version = tracking.version(thing.component, thing.version)
    if version is None:
        return True
    if thing.version in tracking.aliases(thing.component).values():
        return False
    others = [one for one in tracking.versions(thing.component) if one.version != version.version]
    folders = archive_folders(tracking, version)
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


def _empty_cache(swept: Swept) -> None:
    if not any(fate.thing.kind == "DVC cache" for fate in swept.gone):
        return
    try:
        dvc_gc("--force")
    except DataError as error:
        swept.errors.append(error)
