"""What the words of `mlflow deployments` mean here: targets, model URIs, options and inputs.

Every option of mlflow-torchserve's documented examples is accepted, or refused with the new way to say it.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from torchrelay.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from torchrelay.tracking import ModelVersion, Tracking

TARGET = "torchserve"
FLAVOR = "mar"  # what is deployed is the archive, whatever flavor MLflow has logged beside it
URI_FORMS = "models:/NAME/VERSION, models:/NAME@ALIAS, models:/m-… or runs:/RUN_ID/…"
_DEFAULT_PERIMETER = "dev"

# Options of mlflow-torchserve that say what goes into the archive, and where the pipeline finds it.
_PACKED = {
    "MODEL_FILE": "the model's class in components/{name}/model.py",
    "HANDLER": "the component's components/{name}/handler.py",
    "EXTRA_FILES": "what handler.py needs, in modules of components/{name} that it imports",
    "REQUIREMENTS_FILE": "the packages in components/{name}/requirements.in, locked by make lock",
}
# Parameters of TorchServe's management API that it passed on, and the fields of component.yaml that say the same.
_SERVING = {
    "INITIAL_WORKERS": "serving.workers",
    "MIN_WORKER": "serving.workers",
    "MAX_WORKER": "serving.workers",
    "BATCH_SIZE": "serving.batch_size",
    "MAX_BATCH_DELAY": "serving.max_batch_delay_ms",
    "RESPONSE_TIMEOUT": "serving.response_timeout_s",
}
# Everything else that it took: what there is instead, and what to type.
_REPLACED = {
    "SET_DEFAULT": ("one version for callers, the one that is deployed", "leave it out"),
    "SYNCHRONOUS": ("a command that waits, unless told not to", "leave it out, or -C timeout=0"),
    "NUMBER_GPU": ("the setting `variant` for the whole site", "variant: cuda in config/local.yaml, then make up"),
    "DEVICE": ("the setting `variant` for the whole site", "variant: cuda in config/local.yaml, then make up"),
    "CONFIG_PROPERTIES": (
        "addresses from the site's inventory",
        "unset CONFIG_PROPERTIES, and name a perimeter: -t torchserve:production",
    ),
    "EXPORT_URL": (
        "nodes that fetch archives from the tracking server by themselves",
        "unset EXPORT_URL, or leave it out",
    ),
}
_ACCEPTED = ("VERSION", "EXPORT_PATH", "TIMEOUT")


def perimeter_of(target: str) -> str:
    """The perimeter that a target names: `torchserve` is dev's, `torchserve:production` production's."""
    parts = urlsplit(target)
    words = [word for word in (parts.netloc, *parts.path.split("/")) if word] if parts.scheme else []
    if parts.query or parts.fragment or len(words) > 1 or (parts.scheme or parts.path) != TARGET:
        raise ConfigError(
            f"{target!r} is no target of this plugin", f"{TARGET} or {TARGET}:PERIMETER", f"-t {TARGET}:production"
        )
    return words[0] if words else _DEFAULT_PERIMETER


def version_of(tracking: "Tracking", name: str, uri: str) -> "ModelVersion":
    """The registered version that `uri` names; RefusedError if it names none, or another component's."""
    if found := re.fullmatch(r"runs:/([^/]+)(?:/.*)?", uri):
        return _found(tracking.version_of_run(name, found[1]), name, uri)
    if found := re.fullmatch(r"models:/(m-[^/@]+)", uri):
        made = [one for one in tracking.versions(name) if one.source == uri]
        return _found(made[0] if made else None, name, uri)
    found = re.fullmatch(r"models:/([^/@]+)(?:/([0-9]+)|@([^/@]+))", uri)
    if not found:
        raise _no_version(name, uri)
    model, number, alias = found.groups()
    if model != name:
        raise RefusedError(
            f"{uri} is a version of {model}, and the deployment is called {name}",
            "a deployment that has its component's name: that is what callers say at the gateway",
            f"the same command with --name {model}",
        )
    return _found(tracking.version(name, number) if number else tracking.alias(name, alias), name, uri)


def _found(version: "ModelVersion | None", name: str, uri: str) -> "ModelVersion":
    if version is None:
        raise RefusedError(
            f"no registered version of {name} is {uri}",
            "a version that the pipeline has registered",
            f"make deploy-dev COMPONENT={name}",
        )
    return version


def _no_version(name: str, uri: str) -> RefusedError:
    """Files, buckets, stages and `latest`: nothing that would be the same version tomorrow, judged and signed."""
    return RefusedError(
        f"{uri} names no registered version: only what the gate judged and the pipeline packed and signed is served",
        URI_FORMS,
        f"make deploy-dev COMPONENT={name}, which trains, registers and packs; then -m models:/{name}/VERSION",
    )


def number_of(version: str) -> str:
    """`2.0`, as mlflow-torchserve counted, is version 2 of the registry."""
    return re.sub(r"\.0+$", "", version)


@dataclass(frozen=True)
class Options:
    """What `-C NAME=VALUE` may say here. Names are read as mlflow-torchserve did: in any case, with - or _."""

    version: str | None
    export_path: Path | None
    timeout_s: float

    @classmethod
    def read(cls, name: str, config: Mapping[str, str]) -> "Options":
        """Raise ConfigError for what is refused, with the new way to say it; the environment counts as it did."""
        from torchrelay.delivery.request import PATIENCE_S

        environment = {
            key: os.environ[key] for key in ("EXPORT_PATH", "CONFIG_PROPERTIES", "EXPORT_URL") if key in os.environ
        }
        given = {**environment, **{key.upper().replace("-", "_"): str(value) for key, value in config.items()}}
        for key, value in given.items():
            if key not in _ACCEPTED:
                raise _refused_option(name, key, value)
        path = given.get("EXPORT_PATH")
        timeout_s = _seconds(given["TIMEOUT"]) if "TIMEOUT" in given else PATIENCE_S
        return cls(given.get("VERSION"), Path(path) if path else None, timeout_s)

    def insist_on_version(self, wanted: "ModelVersion") -> None:
        """VERSION must be the one that the model URI names: the registry counts versions, nobody chooses them."""
        if self.version is not None and number_of(self.version) != wanted.version:
            raise ConfigError(
                f"-C VERSION={self.version}, and the model URI names version {wanted.version}",
                "the version that the registry gave",
                f"leave it out, or -m models:/{wanted.name}/{number_of(self.version)}",
            )


def _refused_option(name: str, key: str, value: str) -> ConfigError:
    """An option that says what is said elsewhere now, or that nobody knows."""
    found = f"{key}={value}"
    if key in _PACKED:
        return ConfigError(
            f"{found} says what to pack, and a deployment packs nothing: a version has its signed archive",
            _PACKED[key].format(name=name),
            f"put it there, make deploy-dev COMPONENT={name}, then the same command without {key}",
        )
    if key in _SERVING:
        field = _SERVING[key]
        return ConfigError(
            f"{found} says how to serve, which is a part of the version",
            f"{field} in components/{name}/component.yaml",
            f"set {field} there, make deploy-dev COMPONENT={name}, then the same command without {key}",
        )
    if key in _REPLACED:
        expected, instead = _REPLACED[key]
        return ConfigError(f"{found} has no meaning here", expected, instead)
    return ConfigError(
        f"there is no option {key}", f"one of: {', '.join(_ACCEPTED)}", f"mlflow deployments help -t {TARGET}"
    )


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ConfigError(f"TIMEOUT={text} is no number of seconds", "seconds, or 0 not to wait", "-C timeout=600")
    return float(text)


def refuse_unknown(flavor: str | None, endpoint: str | None) -> None:
    """What MLflow's interface knows and this target does not."""
    if flavor not in (None, FLAVOR):
        raise ConfigError(f"flavor {flavor!r}: what is deployed is the archive", FLAVOR, "leave --flavor out")
    if endpoint is not None:
        raise ConfigError(
            f"endpoint {endpoint!r}: this target has none; a perimeter has one gateway",
            "a deployment's name",
            "mlflow deployments … --name NAME",
        )


def request_body(inputs: Any) -> bytes:
    """The body of a request to the gateway; see `TorchServeClient.predict`."""
    import json

    if isinstance(inputs, str | bytes):
        return inputs.encode() if isinstance(inputs, str) else inputs
    if not isinstance(inputs, dict):
        inputs = {"instances": _instances(inputs)}
    return json.dumps(inputs, default=_plain).encode()


def _instances(inputs: Any) -> list[Any]:
    """One for each row of a DataFrame, or along the first axis of anything else."""
    if hasattr(inputs, "columns"):
        return _rows(inputs)
    found = inputs.tolist() if hasattr(inputs, "tolist") else inputs
    if not isinstance(found, list):
        raise ConfigError(
            f"inputs are {type(inputs).__name__}", "a DataFrame, an array, a list or JSON", "see predict's help"
        )
    return found


def _rows(frame: Any) -> list[Any]:
    """The column `instances` alone is the instances; named columns make objects, counted ones lists."""
    import pandas as pd

    dates = [str(name) for name in frame.columns if pd.api.types.is_datetime64_any_dtype(frame[name])]
    if dates:
        raise ConfigError(
            f"pandas has read {', '.join(dates)} as dates, and what was written is lost",
            "numbers and texts",
            'write the file as {"instances": [...]}, whose objects pandas leaves as they are',
        )
    plain = frame.astype(object).where(frame.notna(), None)
    if list(frame.columns) == ["instances"]:
        return list(plain["instances"])
    if isinstance(frame.columns, pd.RangeIndex) or all(isinstance(name, int) for name in frame.columns):
        return [list(row) for row in plain.itertuples(index=False, name=None)]
    return list(plain.to_dict("records"))


def _plain(value: Any) -> Any:
    """Arrays and NumPy's numbers inside instances."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ConfigError(
        f"an instance holds {type(value).__name__}", "numbers, texts, lists and objects", "convert it first"
    )
