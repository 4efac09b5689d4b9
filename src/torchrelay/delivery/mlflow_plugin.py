"""`mlflow deployments … -t torchserve[:perimeter]`: MLflow's way to ask, on the road that everybody takes.

The entry point `mlflow.deployments` leads here; MLflow finds `target_help`, `run_local` and the one client class.
Nothing is packed or started here: a model URI names a registered version, whose archive is signed and proven, and
the perimeter's alias asks for it. `docs/how-to/mlflow-deployments.md` lists what became of the options of the
earlier plugin mlflow-torchserve.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException

from torchrelay.config import Perimeter, Site, site
from torchrelay.delivery.mlflow_arguments import (
    FLAVOR,
    TARGET,
    URI_FORMS,
    Options,
    number_of,
    perimeter_of,
    refuse_unknown,
    request_body,
    version_of,
)
from torchrelay.errors import (
    ArchiveError,
    BusyError,
    ConfigError,
    RefusedError,
    ServingError,
    TorchrelayError,
    TrackingError,
)

if TYPE_CHECKING:
    from torchrelay.delivery.store import State
    from torchrelay.handover import NodeReport
    from torchrelay.tracking import ModelVersion, Tracking

P = ParamSpec("P")
R = TypeVar("R")
Json = dict[str, Any]


class DeploymentError(MlflowException, click.ClickException):  # type: ignore[misc]
    """A Torchrelay error as MLflow's callers expect it; its command line prints the three parts and no traceback."""

    def __init__(self, error: TorchrelayError) -> None:
        from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, ErrorCode

        code = ErrorCode.Value(_CODES[type(error)]) if type(error) in _CODES else INTERNAL_ERROR
        MlflowException.__init__(self, str(error), error_code=code)
        self.exit_code = error.exit_code  # type: ignore[misc]


class _ExistsError(RefusedError):
    """There is such a deployment already."""


class _AbsentError(RefusedError):
    """There is no such deployment."""


_CODES: dict[type[TorchrelayError], str] = {
    _ExistsError: "RESOURCE_ALREADY_EXISTS",
    _AbsentError: "RESOURCE_DOES_NOT_EXIST",
    ConfigError: "INVALID_PARAMETER_VALUE",
    RefusedError: "INVALID_STATE",
    BusyError: "RESOURCE_CONFLICT",
    TrackingError: "TEMPORARILY_UNAVAILABLE",
}


def _as_mlflow(method: Callable[P, R]) -> Callable[P, R]:
    """The method, raising what MLflow's interface promises."""

    @wraps(method)
    def wrapped(*words: P.args, **named: P.kwargs) -> R:
        try:
            return method(*words, **named)
        except TorchrelayError as error:
            raise DeploymentError(error) from error

    return wrapped


class TorchServeClient(BaseDeploymentClient):  # type: ignore[misc]
    """Deployments in one perimeter of the site whose checkout the working directory is in.

    A deployment is a component: it has the component's name, and serves one version of the registered model of that
    name. Every method raises DeploymentError, which is a `MlflowException`.
    """

    @_as_mlflow
    def __init__(self, target_uri: str) -> None:
        super().__init__(target_uri)
        self.perimeter = perimeter_of(target_uri)

    @_as_mlflow
    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, str] | None = None,
        endpoint: str | None = None,
    ) -> Json:
        """Deploy the version that `model_uri` names, where nothing of the component is deployed, and wait for it."""
        refuse_unknown(flavor, endpoint)
        here = self._here()
        live = here.live(name)
        if live is not None:
            raise _ExistsError(
                f"{self.perimeter} serves {name} version {live} already",
                "a component of which nothing is deployed",
                f"mlflow deployments update -t {self.target_uri} --name {name} -m {model_uri}",
            )
        return self._deploy(here, name, model_uri, config, "create")

    @_as_mlflow
    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, str] | None = None,
        endpoint: str | None = None,
    ) -> Json:
        """Replace what the deployment serves by the version that `model_uri` names, by the perimeter's roll-out."""
        refuse_unknown(flavor, endpoint)
        here = self._here()
        component = here.insist_on(name)
        if model_uri is None:
            Options.read(component, config or {})
            raise ConfigError(
                "an update needs a model URI: how a version is served is a part of it",
                URI_FORMS,
                f"mlflow deployments update -t {self.target_uri} --name {component} -m models:/{component}/VERSION",
            )
        return self._deploy(here, component, model_uri, config, "update")

    @_as_mlflow
    def delete_deployment(
        self, name: str, config: Mapping[str, str] | None = None, endpoint: str | None = None
    ) -> None:
        """Take the component out of service; no error where it is not. Refused where the perimeter never goes dark."""
        from torchrelay.delivery.request import withdraw

        refuse_unknown(None, endpoint)
        here = self._here()
        component, _, version = name.partition("/")
        if version and here.live(component) is not None:
            here.insist_on(name)
        options = Options.read(component, config or {})
        withdraw(here.site, self.perimeter, component, why="mlflow deployments delete", timeout_s=options.timeout_s)

    @_as_mlflow
    def list_deployments(self, endpoint: str | None = None) -> list[Json]:
        """Every component that is deployed: name, flavor, perimeter, version, digest, and whether all of it answers."""
        refuse_unknown(None, endpoint)
        here = self._here()
        reports = here.reports()
        short = ("name", "flavor", "perimeter", "version", "digest", "healthy")
        all_of_them = (here.described(name, reports) for name in here.deployed())
        return [{key: one[key] for key in short} for one in all_of_them]

    @_as_mlflow
    def get_deployment(self, name: str, endpoint: str | None = None) -> Json:
        """What is asked for, what serves, what each node really holds, and where the requests go."""
        refuse_unknown(None, endpoint)
        here = self._here()
        return here.described(here.insist_on(name), here.reports())

    @_as_mlflow
    def predict(self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None) -> Any:
        """Send the inputs through the perimeter's gateway; `metadata` of the answer says who answered.

        `inputs`: a DataFrame (its column `instances`, or a row for each instance), an array or tensor (first axis:
        instances), a list of instances, `{"instances": [...]}`, or a body (str, or bytes such as a PNG file).
        """
        from torchrelay.serving.client import send

        refuse_unknown(None, endpoint)
        here = self._here()
        component = here.insist_on(deployment_name or "")
        answer = send(here.place.gateway, component, request_body(inputs))
        if answer.status != 200 or not isinstance(answer.body, dict):
            raise ServingError(
                f"{here.place.gateway}/predictions/{component} answered {answer.status}: {answer.body}",
                'a request that the component understands: {"instances": [...]}',
                f".venv/bin/torchrelay predict --component {component} --perimeter {self.perimeter}",
            )
        return PredictionsResponse({**answer.body, "metadata": answer.headers})

    @_as_mlflow
    def explain(self, deployment_name: str | None = None, df: Any = None, endpoint: str | None = None) -> Any:  # noqa: ARG002
        """Always refused: archives answer predictions and nothing else."""
        raise RefusedError(
            f"{deployment_name or endpoint} gives no explanations: a component's handler has no such method",
            "a prediction",
            f"mlflow deployments predict -t {self.target_uri} --name {deployment_name or endpoint} -I FILE, or return "
            "what explains a prediction in the prediction itself (components/…/handler.py)",
        )

    def _here(self) -> "_Here":
        found = site()
        if self.perimeter not in found.perimeters:
            known = ", ".join(f"{TARGET}:{name}" for name in found.perimeters)
            raise ConfigError(
                f"the site has no perimeter {self.perimeter!r}",
                f"one of: {known}",
                f"mlflow deployments help -t {TARGET}",
            )
        return _Here(found, self.perimeter)

    def _deploy(self, here: "_Here", name: str, uri: str, config: Mapping[str, str] | None, verb: str) -> Json:
        from torchrelay.delivery.request import deploy

        options = Options.read(name, config or {})
        wanted = version_of(here.tracking, name, uri)
        options.insist_on_version(wanted)
        why = f"mlflow deployments {verb}"
        deploy(here.site, self.perimeter, wanted, why=why, timeout_s=options.timeout_s)
        if options.export_path:
            export(wanted, options.export_path)
        return {"name": name, "flavor": FLAVOR, "perimeter": self.perimeter, "version": wanted.version}


@dataclass(frozen=True)
class _Here:
    """One perimeter, as its control node remembers it and its nodes answer."""

    site: Site
    perimeter: str

    @property
    def place(self) -> Perimeter:
        return self.site.perimeters[self.perimeter]

    @property
    def tracking(self) -> "Tracking":
        from torchrelay.tracking import Tracking

        return Tracking(self.site.tracking.url)

    def state(self, component: str) -> "State":
        from torchrelay.delivery.store import store

        return store(self.perimeter).state(component)

    def live(self, component: str) -> str | None:
        """The version in service, or the one on its way where none is."""
        state = self.state(component)
        found = state.live or (state.rollout.wanted if state.rollout else None)
        return found.version if found else None

    def deployed(self) -> list[str]:
        from torchrelay.delivery.store import store

        return [name for name in store(self.perimeter).states() if self.live(name)]

    def insist_on(self, name: str) -> str:
        """The component of the deployment `NAME`, or `NAME/VERSION` as mlflow-torchserve called a version of it."""
        component, _, version = name.partition("/")
        live = self.live(component)
        if live is None:
            raise _AbsentError(
                f"{self.perimeter} serves nothing named {component!r}",
                f"one of: {', '.join(self.deployed()) or 'nothing is deployed yet'}",
                f"mlflow deployments create -t {TARGET}:{self.perimeter} --name {component} -m models:/…",
            )
        if version not in ("", "all") and number_of(version) != live:
            raise _AbsentError(
                f"{self.perimeter} serves version {live} of {component}, not {version}",
                "the version in service: a deployment has one",
                f"mlflow deployments update -t {TARGET}:{self.perimeter} --name {component} "
                f"-m models:/{component}/{number_of(version)}",
            )
        return component

    def reports(self) -> dict[str, "NodeReport | None"]:
        """What each node says of itself now; None where it does not answer."""
        from torchrelay.delivery import reach

        found: dict[str, NodeReport | None] = {}
        for node in self.place.nodes:
            try:
                found[node.name] = reach.observe_on(node)
            except TorchrelayError:
                found[node.name] = None
        return found

    def described(self, component: str, reports: Mapping[str, "NodeReport | None"]) -> Json:
        """All that is known of a deployment."""
        from torchrelay.delivery.sight import serves

        state = self.state(component)
        there = {name: report for name, report in reports.items() if report}
        gateway = reports.get(self.place.gateway_node)
        shares = [one for one in (gateway.routed or () if gateway else ()) if one.component == component]
        live = state.live.version if state.live else None
        return {
            "name": component,
            "flavor": FLAVOR,
            "perimeter": self.perimeter,
            "version": live,
            "digest": state.live.digest if state.live else None,
            "healthy": live is not None and serves(self.place, there, component, live),
            "requested": self.tracking.aliases(component).get(self.place.alias),
            "url": f"{self.place.gateway}/predictions/{component}",
            "percent": {one.version: one.weight for one in shares if one.weight},
            "shadow": next((one.version for one in shares if one.mirror and not one.weight), None),
            "nodes": {node.name: _held(reports.get(node.name), component) for node in self.place.nodes if node.holds},
            "rollout": state.rollout and {"version": state.rollout.wanted.version, "note": state.rollout.note},
            "refused": state.refused and {"version": state.refused.version, "reason": state.refused.reason},
        }


def _held(report: "NodeReport | None", component: str) -> dict[str, str] | str:
    """Version to health, as the node says."""
    if report is None:
        return "does not answer"
    mine = [one for one in report.held if one.component == component]
    return {one.version: "healthy" if one.healthy else "not healthy" for one in mine}


def export(wanted: "ModelVersion", folder: Path) -> Path:
    """Leave the version's archive as `folder`/NAME.mar, as mlflow-torchserve did; ArchiveError if it is another."""
    import tempfile

    from torchrelay import archive
    from torchrelay.delivery.admission import wanted_version

    release = wanted_version(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive.fetch(release.url, Path(scratch) / "archive")
        mar = Path(scratch) / "archive" / "model.mar"
        if (digest := archive.digest(mar)) != release.digest:
            raise ArchiveError(f"{release.url} has digest {digest}", release.digest, "make status")
        return mar.replace(folder / f"{wanted.name}.mar")


def run_local(name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, str] | None = None) -> None:
    """Deploy to dev, which is this machine's own perimeter under inventory/local; takes the place of what is there."""
    client = TorchServeClient(TARGET)
    client.update_deployment(name, model_uri, flavor, config) if _deployed(client, name) else client.create_deployment(
        name, model_uri, flavor, config
    )


def _deployed(client: TorchServeClient, name: str) -> bool:
    return name in [one["name"] for one in client.list_deployments()]


def target_help() -> str:
    """What `mlflow deployments help -t torchserve` prints."""
    return _HELP


_HELP = f"""\
Torchrelay: serve registered versions behind a perimeter's gateway. Run it inside the checkout, after `make up`.

Target    {TARGET}                 the perimeter dev
          {TARGET}:production      any other perimeter of the site

--name    the component: the registered model's name, and the name at the gateway (/predictions/NAME)
-m        {URI_FORMS}

create    deploys the version where nothing of the component is deployed, and waits until it serves
update    replaces what serves by the version, with the perimeter's stages (shadow, canary) and checks
delete    takes the component out of service in dev; refused in production, which serves something always
list      what is deployed; get: what is asked for, what serves, what each node holds, where requests go
predict   -I FILE with JSON: {{"instances": [...]}}, or what pandas reads as a table: a row is an instance
explain   refused: put what explains a prediction into the prediction

-C timeout=SECONDS    how long to follow a roll-out in production (default 1800; 0: ask, and do not wait)
-C VERSION=N          must be the version that -m names
-C EXPORT_PATH=DIR    also leave the archive as DIR/NAME.mar

The other options of the earlier plugin mlflow-torchserve (MODEL_FILE, HANDLER, EXTRA_FILES, REQUIREMENTS_FILE,
min-worker, …) are refused with what to write instead. See docs/how-to/mlflow-deployments.md.
"""
