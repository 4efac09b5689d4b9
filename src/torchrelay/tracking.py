"""The MLflow server as this project uses it: runs, artifacts, model versions and aliases, typed.

Everything is plain REST (see `rest.py`). What is created is looked up first, by the key or the run that it
belongs to, so that a step which was killed can simply run again. Looking and creating are two requests: two
processes that create the same thing at once must share a file lock, which the caller holds.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from torchrelay.config import Frozen, Json
from torchrelay.errors import TrackingError
from torchrelay.rest import NOT_THERE, AnsweredError, Rest, size_of

PREFIX = "torchrelay."
KEY = PREFIX + "key"
# MLflow 3.17 takes 8,000 characters in a run's tag (and cuts the rest without a word) and 100,000 in a version's;
# older servers take 5,000 in either.
LONGEST_TAG = 5000
BATCH = 100
Status = Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]


class Run(Frozen):
    """One MLflow run. Times are milliseconds since 1970."""

    run_id: str
    experiment_id: str
    name: str
    status: Status
    started: int
    ended: int | None = Field(None, description="None while it runs.")
    artifact_uri: str
    parameters: dict[str, str]
    metrics: dict[str, float] = Field(description="The last value of each metric.")
    tags: dict[str, str]


class ModelVersion(Frozen):
    """One version of a registered model."""

    name: str
    version: str
    run_id: str
    source: str = Field(description="models:/m-… or runs:/….")
    status: str = Field(description="READY, PENDING_REGISTRATION or FAILED_REGISTRATION.")
    tags: dict[str, str]
    aliases: tuple[str, ...]


class Tracking:
    """The tracking server at `url`. Every method raises TrackingError when it cannot do what it says."""

    def __init__(self, url: str, *, hasty: bool = False) -> None:
        """`hasty` gives up after 5 s and tries nothing twice, for whoever looks again anyway."""
        self._rest = Rest(url, hasty=hasty)
        self._places: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Where the server and its pages are, without a trailing slash."""
        return self._rest.url

    def healthy(self) -> bool:
        """Whether the server answers now; never raises, waits two seconds at most."""
        return self._rest.healthy()

    # Runs

    def ensure_experiment(self, name: str) -> str:
        """The id of the experiment, which is made if it is new. A deleted one is an error, not a new one."""
        found = self._experiment(name)
        if found is None:
            return self._new_experiment(name)
        if found["lifecycle_stage"] != "active":
            number = found["experiment_id"]
            raise TrackingError(
                f"somebody deleted the experiment {name!r}",
                "an active experiment",
                f"MLFLOW_TRACKING_URI={self.url} mlflow experiments restore --experiment-id {number}",
            )
        return str(found["experiment_id"])

    def create_run(
        self,
        experiment_id: str,
        name: str,
        key: str,
        tags: Mapping[str, str] | None = None,
        started: int | None = None,
    ) -> Run:
        """The run with this idempotency `key` in the experiment: the one that is there, else a new one.

        `started` is in milliseconds since 1970, now if not given. `tags` are set only on a new run.
        """
        there = self._search([experiment_id], f"tags.`{KEY}` = {_quoted(key)}", 1)
        if there:
            return there[0]
        body = {
            "experiment_id": experiment_id,
            "run_name": name,
            "start_time": _now() if started is None else started,
            "tags": _pairs({**(tags or {}), KEY: key}),
        }
        return _run(self._rest.create("runs/create", body)["run"])

    def get_run(self, run_id: str) -> Run:
        """The run as it is now."""
        return _run(self._rest.get("runs/get", {"run_id": run_id})["run"])

    def has_run(self, run_id: str) -> bool:
        """Whether the run is there, and nobody deleted it."""
        try:
            found = self._rest.get("runs/get", {"run_id": run_id})["run"]
        except AnsweredError as error:
            if error.code != NOT_THERE:
                raise
            return False
        return bool(found["info"]["lifecycle_stage"] == "active")

    def search_runs(self, experiment: str, condition: str = "", limit: int = 100) -> list[Run]:
        """Runs of the experiment named `experiment` that meet MLflow's filter, newest first."""
        found = self._experiment(experiment)
        return [] if found is None else self._search([str(found["experiment_id"])], condition, limit)

    def finish_run(self, run_id: str, status: Status = "FINISHED", ended: int | None = None) -> None:
        """Say how the run ended. `ended` is in milliseconds since 1970, now if not given."""
        end = _now() if ended is None else ended
        self._rest.repeat("runs/update", {"run_id": run_id, "status": status, "end_time": end})

    def log_params(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Log parameters. The same again is no error, another value for a parameter that is there is."""
        for some in _batches(_pairs(parameters), BATCH):
            self._rest.repeat("runs/log-batch", {"run_id": run_id, "params": some})

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at `step`, stamped now."""
        now = _now()
        rows = [{"key": k, "value": _number(v), "timestamp": now, "step": step} for k, v in metrics.items()]
        for some in _batches(rows, BATCH):
            self._rest.repeat("runs/log-batch", {"run_id": run_id, "metrics": some})

    def set_run_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of the run; those that are not named stay."""
        for some in _batches(_pairs(tags), BATCH):
            self._rest.repeat("runs/log-batch", {"run_id": run_id, "tags": some})

    # Artifacts

    def upload_artifact(self, run_id: str, path: str, content: bytes | Path) -> None:
        """Store `content` (bytes, or a file that is streamed) as the run's artifact `path`, over what was there."""
        place, size = self._stored(run_id, path), size_of(content)
        if isinstance(content, bytes):
            self._rest.put_file(place, content, size)
            return
        with content.open("rb") as file:
            self._rest.put_file(place, file, size)

    def download_artifact(self, run_id: str, path: str) -> bytes:
        """The run's artifact `path`, in memory."""
        return self._rest.get_file(self._stored(run_id, path))

    def save_artifact(self, run_id: str, path: str, target: Path) -> None:
        """Stream the run's artifact `path` into the file `target`, which appears only when it is whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.part")
        try:
            with aside.open("wb") as file:
                self._rest.copy_file(self._stored(run_id, path), file)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def artifacts(self, run_id: str, folder: str = "") -> list[str]:
        """Paths of the run's artifacts directly in `folder`."""
        found = self._rest.get("artifacts/list", {"run_id": run_id, "path": folder})
        return [str(row["path"]) for row in found.get("files", [])]

    def artifact_url(self, run_id: str, path: str) -> str:
        """Plain URL of the run's artifact `path`. If that is a folder, a GET of `<url>/<file>` downloads the file."""
        return self._rest.artifact(self._stored(run_id, path))

    # Model versions

    def ensure_model(self, name: str) -> None:
        """Make the registered model if it is new."""
        try:
            self._rest.get("registered-models/get", {"name": name})
        except AnsweredError as error:
            if error.code != NOT_THERE:
                raise
            self._new_model(name)

    def versions(self, name: str) -> list[ModelVersion]:
        """Every version of the model, oldest first; none if there is no such model."""
        return self._with_aliases(name, list(self._search_versions(f"name = {_quoted(name)}")))

    def version(self, name: str, version: str) -> ModelVersion | None:
        """One version of the model, or None."""
        try:
            found = self._rest.get("model-versions/get", {"name": name, "version": version})
        except AnsweredError as error:
            if error.code != NOT_THERE:
                raise
            return None
        return _version(found["model_version"])

    def signature(self, name: str, version: str) -> Json | None:
        """MLflow's signature of the version's model: `inputs`, `outputs` and `params`; None if it has none."""
        import yaml

        found = self.version(name, version)
        if found is None or not found.source.startswith("models:/m-"):
            return None
        model = self._rest.get(f"logged-models/{found.source.removeprefix('models:/')}")["model"]
        uri = urlsplit(str(model["info"]["artifact_uri"]))
        content = yaml.safe_load(self._rest.get_file(f"{uri.path.strip('/')}/MLmodel"))
        signature = content.get("signature") or {}
        return {part: json.loads(text) for part, text in signature.items() if text} or None

    def version_of_run(self, name: str, run_id: str) -> ModelVersion | None:
        """The first version that was made of this run, or None. Its aliases are left out, as in MLflow's search."""
        condition = f"name = {_quoted(name)} and run_id = {_quoted(run_id)}"
        return next(self._search_versions(condition), None)

    def create_version(self, name: str, run_id: str, source: str, tags: Mapping[str, str]) -> ModelVersion:
        """The version of this run, made if there is none; the model must be there.

        For a `models:/m-…` source the server wants the model's id as well: it is what links the version to the
        logged model, and so to its signature and input example.
        """
        there = self.version_of_run(name, run_id)
        if there is not None:
            return there
        body = {"name": name, "source": source, "run_id": run_id, "tags": _pairs(tags)}
        if source.startswith("models:/m-"):
            body["model_id"] = source.removeprefix("models:/")
        return _version(self._rest.create("model-versions/create", body)["model_version"])

    def register_version(self, component: str, run_id: str, source: str, tags: Mapping[str, str]) -> ModelVersion:
        """The one READY version of this run, with these tags: made, or completed, or found as it should be.

        Two processes that may register the same run must share a file lock, held by the caller.
        """
        self.ensure_model(component)
        found = self._settled(self.create_version(component, run_id, source, tags))
        missing = {key: value for key, value in tags.items() if found.tags.get(key) != value}
        self.set_version_tags(component, found.version, missing)
        return found.model_copy(update={"tags": {**found.tags, **missing}})

    def set_version_tags(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of the version; those that are not named stay."""
        for pair in _pairs(tags):
            self._rest.repeat("model-versions/set-tag", {"name": name, "version": version, **pair})

    # Aliases

    def models(self) -> dict[str, dict[str, str]]:
        """Every registered model's aliases: model to alias to version."""
        fields = {"order_by": "name ASC", "max_results": "1000"}
        return {
            row["name"]: _aliases(row) for row in self._pages("registered-models/search", "registered_models", fields)
        }

    def aliases(self, name: str) -> dict[str, str]:
        """Alias to version of the model; empty if there is no such model."""
        try:
            found = self._rest.get("registered-models/get", {"name": name})["registered_model"]
        except AnsweredError as error:
            if error.code != NOT_THERE:
                raise
            return {}
        return _aliases(found)

    def alias(self, name: str, alias: str) -> ModelVersion | None:
        """The version that carries the alias, or None."""
        version = self.aliases(name).get(alias)
        return None if version is None else self.version(name, version)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Move the alias to this version."""
        self._rest.repeat("registered-models/alias", {"name": name, "alias": alias, "version": version})

    def delete_alias(self, name: str, alias: str) -> None:
        """Take the alias away; no error if it is not there."""
        self._rest.repeat("registered-models/alias", {"name": name, "alias": alias}, method="DELETE")

    # Pages for people

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """The run's page in MLflow."""
        return f"{self.url}/#/experiments/{experiment_id}/runs/{run_id}"

    def version_url(self, name: str, version: str) -> str:
        """The version's page in MLflow."""
        return f"{self.url}/#/models/{name}/versions/{version}"

    # What the methods above share

    def _experiment(self, name: str) -> Json | None:
        try:
            found: Json = self._rest.get("experiments/get-by-name", {"experiment_name": name})["experiment"]
        except AnsweredError as error:
            if error.code != NOT_THERE:
                raise
            return None
        return found

    def _new_experiment(self, name: str) -> str:
        try:
            return str(self._rest.create("experiments/create", {"name": name})["experiment_id"])
        except AnsweredError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self.ensure_experiment(name)

    def _new_model(self, name: str) -> None:
        try:
            self._rest.create("registered-models/create", {"name": name})
        except AnsweredError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _search(self, experiments: list[str], condition: str, limit: int) -> list[Run]:
        body = {
            "experiment_ids": experiments,
            "filter": condition,
            "max_results": limit,
            "order_by": ["attributes.start_time DESC"],
        }
        return [_run(row) for row in self._rest.repeat("runs/search", body).get("runs", [])]

    def _search_versions(self, condition: str) -> Iterator[ModelVersion]:
        fields = {"filter": condition, "order_by": "version_number ASC", "max_results": "1000"}
        return map(_version, self._pages("model-versions/search", "model_versions", fields))

    def _pages(self, path: str, rows: str, fields: dict[str, str]) -> Iterator[Json]:
        """Every row of a listing that comes in pages."""
        while True:
            page = self._rest.get(path, fields)
            yield from page.get(rows, [])
            if not page.get("next_page_token"):
                return
            fields = {**fields, "page_token": page["next_page_token"]}

    def _with_aliases(self, name: str, found: list[ModelVersion]) -> list[ModelVersion]:
        """Add the aliases, which MLflow's search leaves out."""
        of: dict[str, list[str]] = {}
        for alias, version in (self.aliases(name) if found else {}).items():
            of.setdefault(version, []).append(alias)
        return [v.model_copy(update={"aliases": tuple(sorted(of.get(v.version, [])))}) for v in found]

    def _settled(self, found: ModelVersion, patience_s: float = 30.0) -> ModelVersion:
        """Wait while the registration is pending; a failed one is an error, since to try again is a second version."""
        deadline = time.monotonic() + patience_s
        while found.status == "PENDING_REGISTRATION" and time.monotonic() < deadline:
            time.sleep(0.5)
            found = self.version(found.name, found.version) or found
        if found.status != "READY":
            raise TrackingError(
                f"version {found.version} of {found.name} is {found.status}",
                "READY",
                f"delete it at {self.version_url(found.name, found.version)} and repeat the command",
            )
        return found

    def _place(self, run_id: str) -> str:
        """Artifact URI of a run, which never changes."""
        if run_id not in self._places:
            self._places[run_id] = self.get_run(run_id).artifact_uri
        return self._places[run_id]

    def _stored(self, run_id: str, path: str) -> str:
        """Path of a run's artifact inside the server's artifact store."""
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise TrackingError(f"artifact path {path!r}", "a relative path without ..", f"correct the path {path!r}")
        uri = urlsplit(self._place(run_id))
        if uri.scheme != "mlflow-artifacts":
            raise TrackingError(
                f"artifacts of run {run_id} are at {uri.geturl()}, out of the server's hands",
                "mlflow-artifacts:/…, that is a server started with --artifacts-destination",
                "make down && make up, then train again",
            )
        return f"{uri.path.strip('/')}/{parts}".removesuffix("/.")


def tag_value(text: str) -> str:
    """`text` as a tag's value: if it is too long for one, its beginning, with its full length and digest said."""
    if len(text) <= LONGEST_TAG:
        return text
    note = f" … [cut: {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()}]"
    return text[: LONGEST_TAG - len(note)] + note


def _run(row: Json) -> Run:
    info, data = row["info"], row["data"]
    return Run(
        run_id=info["run_id"],
        experiment_id=str(info["experiment_id"]),
        name=info.get("run_name", ""),
        status=info["status"],
        started=info.get("start_time", 0),
        ended=info.get("end_time"),
        artifact_uri=info["artifact_uri"],
        parameters=_mapping(data.get("params", [])),
        metrics={m["key"]: float(m["value"]) for m in data.get("metrics", [])},
        tags=_mapping(data.get("tags", [])),
    )


def _version(row: Json) -> ModelVersion:
    return ModelVersion(
        name=row["name"],
        version=str(row["version"]),
        run_id=row.get("run_id", ""),
        source=row.get("source", ""),
        status=row.get("status", "READY"),
        tags=_mapping(row.get("tags", [])),
        aliases=tuple(row.get("aliases", [])),
    )


def _aliases(model: Json) -> dict[str, str]:
    return {row["alias"]: str(row["version"]) for row in model.get("aliases", [])}


def _mapping(rows: Iterable[Json]) -> dict[str, str]:
    return {row["key"]: row.get("value", "") for row in rows}


def _pairs(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"key": key, "value": str(value)} for key, value in values.items()]


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """MLflow takes at most 100 parameters or tags in one request."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _number(value: float) -> float | str:
    """JSON has no NaN; protobuf's JSON writes it as a string."""
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no way to escape a quote."""
    if "'" in text:
        raise TrackingError(f"the name {text!r}", "a name without quotes", f"rename {text!r}")
    return f"'{text}'"


def _now() -> int:
    return time.time_ns() // 1_000_000
