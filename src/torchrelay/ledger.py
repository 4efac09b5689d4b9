"""The ledger: one finished MLflow run for each roll-out, refusal, rollback, repair and withdrawal in a perimeter.

An entry is first a file in the outbox folder and is deleted there when it is in MLflow, so that neither a dead
tracking server nor a kill at any point loses or doubles one.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field, ValidationError

from torchrelay.config import Frozen, read_json, write_json
from torchrelay.errors import BusyError, ConfigError, TorchrelayError, TrackingError
from torchrelay.rest import AnsweredError
from torchrelay.tracking import PREFIX, Run, Tracking, tag_value

TAG_ENTRY = f"{PREFIX}entry"
Kind = Literal["rollout", "refusal", "rollback", "mend", "withdrawal"]
# MLflow cuts a run's tag at 8,000 characters, and the whole entry is one: no text in it may grow without limit.
Short = Annotated[str, AfterValidator(lambda text: text if len(text) <= 400 else text[:399] + "…")]
_SHOWN = ("kind", "component", "who", "why", "from_version", "to_version", "verdict", "digest")

log = logging.getLogger(__name__)


class Entry(Frozen):
    """One thing that happened to one component in one perimeter."""

    kind: Kind
    component: str
    who: Short
    why: Short
    from_version: str | None = Field(description="What served before; None at the first roll-out.")
    to_version: str | None = Field(description="What serves now; None after a withdrawal.")
    verdict: Short
    digest: str = Field(description="Of the archive; empty if the version never had one.")
    duration_s: float
    failed_requests: int | None = Field(description="During the change; None where nobody counted.")
    started: float = Field(description="Seconds since 1970.")
    report: str = Field("", description="URL of the report that the verdict rests on.")

    def key(self, perimeter: str) -> str:
        """The same for the same event. A refusal is the same however often the refused version is asked for again."""
        moment = self.why if self.kind == "refusal" else repr(self.started)
        parts = (perimeter, self.kind, self.component, self.to_version or "", self.digest, moment)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Waiting(Frozen):
    """A file in the outbox."""

    perimeter: str
    entry: Entry
    pages: dict[str, str] = Field(default_factory=dict, description="Artifacts of the entry's run: name to content.")


class Recorded(Frozen):
    """An entry that is in MLflow."""

    run_id: str
    url: str
    entry: Entry


def record(tracking: Tracking, perimeter: str, entry: Entry, outbox: Path) -> str | None:
    """Write the entry down; the id of its MLflow run, or None while the tracking server cannot take it.

    In that case it waits in `outbox` for the next `record` or `flush_outbox`, and the log says so.
    """
    key = note(perimeter, entry, outbox)
    try:
        return flush_outbox(tracking, outbox).get(key)
    except (TrackingError, BusyError, ConfigError) as error:
        log.warning("the ledger entry waits in %s: %s", outbox, error.found)
        return None


def note(perimeter: str, entry: Entry, outbox: Path, pages: Mapping[str, str] | None = None) -> str:
    """Write the entry into `outbox` alone, which no server can hold up; its key. `flush_outbox` carries it on.

    `pages` become artifacts of its run.
    """
    key = entry.key(perimeter)
    waiting = Waiting(perimeter=perimeter, entry=entry, pages=dict(pages or {}))
    write_json(outbox / f"{entry.started:017.3f}-{key[:16]}.json", waiting)
    return key


def flush_outbox(tracking: Tracking, outbox: Path) -> dict[str, str]:
    """Carry what waits in `outbox` to MLflow, oldest first: the run id of each by its key.

    A file that cannot be read, or that the server refuses, stays and does not hold up the others; the first such
    error is raised at the end. A server that does not answer ends it at once. Raises TrackingError, ConfigError,
    or BusyError if another process does not let go.
    """
    if not any(outbox.glob("*.json")):
        return {}
    try:
        with FileLock(outbox / ".lock", timeout=60):
            return _flush(tracking, outbox)
    except Timeout as error:
        raise BusyError(f"{outbox} is locked by another process", "nobody else flushing it", "make status") from error


def history(tracking: Tracking, perimeter: str, limit: int = 20) -> list[Recorded]:
    """The newest entries of the perimeter's ledger, newest first."""
    runs = tracking.search_runs(_experiment(perimeter), f"tags.`{PREFIX}perimeter` = '{perimeter}'", limit)
    return [_recorded(tracking, run) for run in runs]


def _flush(tracking: Tracking, outbox: Path) -> dict[str, str]:
    carried: dict[str, str] = {}
    faults: list[TorchrelayError] = []
    for file in sorted(outbox.glob("*.json")):
        try:
            waiting = read_json(Waiting, file, f"read {file}, then delete it")
            carried[waiting.entry.key(waiting.perimeter)] = _carry(tracking, waiting)
        except (AnsweredError, ConfigError) as error:
            faults.append(error)
        else:
            file.unlink()
    if faults:
        raise faults[0]
    return carried


def _carry(tracking: Tracking, waiting: Waiting) -> str:
    """The entry's run, complete: every step here can be repeated after a kill."""
    entry = waiting.entry
    began = round(entry.started * 1000)
    experiment = tracking.ensure_experiment(_experiment(waiting.perimeter))
    name = f"{entry.kind} {entry.component} {entry.from_version or '–'} → {entry.to_version or '–'}"
    run = tracking.create_run(experiment, name, entry.key(waiting.perimeter), _tags(waiting), began)
    if run.status != "FINISHED":
        figures = {"duration_s": entry.duration_s}
        if entry.failed_requests is not None:
            figures["failed_requests"] = float(entry.failed_requests)
        tracking.log_metrics(run.run_id, figures)
        for page, content in waiting.pages.items():
            tracking.upload_artifact(run.run_id, page, content.encode())
        tracking.finish_run(run.run_id, ended=began + round(entry.duration_s * 1000))
    return run.run_id


def _tags(waiting: Waiting) -> dict[str, str]:
    entry = waiting.entry
    shown = {f"{PREFIX}{name}": tag_value(str(getattr(entry, name) or "none")) for name in _SHOWN}
    return {
        **shown,
        f"{PREFIX}perimeter": waiting.perimeter,
        "mlflow.user": entry.who,
        TAG_ENTRY: entry.model_dump_json(),
    }


def _recorded(tracking: Tracking, run: Run) -> Recorded:
    url = tracking.run_url(run.experiment_id, run.run_id)
    try:
        return Recorded(run_id=run.run_id, url=url, entry=Entry.model_validate_json(run.tags.get(TAG_ENTRY, "")))
    except ValidationError as error:
        raise TrackingError(f"the ledger's run {run.name!r} holds no entry", f"its tag {TAG_ENTRY}", url) from error


def _experiment(perimeter: str) -> str:
    return f"ledger-{perimeter}"
