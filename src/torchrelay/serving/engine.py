"""The seam between Torchrelay and whatever runs models: all that the rest of the code may know of an engine.

An engine is a supervised program that holds several versions of one component's models side by side and answers
`POST <path>` for each. `apply` talks to this protocol only, so an engine can be replaced; the conformance tests in
`tests/e2e/test_engine_conformance.py` say what an adapter has to hold.
"""

import importlib
from pathlib import Path
from typing import ClassVar, Protocol

from pydantic import Field

from torchrelay.config import Frozen
from torchrelay.errors import ConfigError
from torchrelay.handover import Endpoint, WantedVersion

_ENGINES = {"torchserve": "torchrelay.serving.torchserve:TorchServe"}


class Program(Frozen):
    """One process group that the supervisor keeps up."""

    name: str = Field(description="Unique on the node; file name of its configuration.")
    command: tuple[str, ...]
    environment: dict[str, str] = Field(default_factory=dict, description="Added to the supervisor's own.")
    directory: Path = Field(description="Working directory; must exist.")
    log: Path = Field(description="Where stdout and stderr go; rotated by the supervisor.")
    stop_wait_s: int = Field(10, ge=1, description="After this a stop becomes a kill, in seconds.")


class Instance(Frozen):
    """One engine on one node: the versions of one component that share one environment."""

    name: str = Field(description="Name of its program, unique on the node.")
    folder: Path = Field(description="Everything the engine writes, but for its log, lies under this folder.")
    python: str = Field(description="Interpreter of the component's environment.")
    ports: tuple[int, ...] = Field(description="Loopback ports, as many as the engine class says it needs.")
    java_home: Path
    log: Path
    response_timeout_s: int = 30
    max_body_bytes: int = 4 * 2**20
    max_memory_mb: int = Field(4096, description="What a worker may grow to; then another one takes its place.")
    predictions: Path | None = Field(None, description="Folder of the prediction log; None: none is written.")
    keep_inputs: bool = Field(False, description="Whether the prediction log may keep inputs.")


class Loaded(Frozen):
    """A version that an engine holds."""

    component: str
    version: str
    digest: str = Field(description="sha256 of the archive that it was loaded from.")
    healthy: bool = Field(description="Whether at least one worker can answer now.")


class Answer(Frozen):
    """What an engine answered, errors included. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Engine(Protocol):
    """The contract of an engine adapter. Every method may be called again at any time: an adapter keeps no state.

    Whatever goes wrong raises ServingError with the engine's own words and the log to read.
    """

    ports_needed: ClassVar[int]

    def __init__(self, instance: Instance) -> None: ...

    def prepare(self) -> Program:
        """Write the configuration under the instance's folder and say what to keep up; touches no running engine."""
        ...

    def ready(self) -> bool:
        """Whether the engine answers, with or without models."""
        ...

    def load(self, archive: Path, wanted: WantedVersion) -> None:
        """Hold `wanted` from `archive` (a folder with model.mar) and return once every worker can answer.

        Does nothing if it is held healthy from that digest; replaces the same version of another digest, or a sick one.
        A load that fails leaves nothing of it behind and does not touch the other versions.
        """
        ...

    def loaded(self) -> list[Loaded]:
        """What the engine holds, asked from the engine itself."""
        ...

    def predict(self, component: str, version: str, body: bytes, headers: dict[str, str]) -> Answer:
        """Send one request straight to a version, past the gateway; an error status is an answer, not an exception."""
        ...

    def unload(self, component: str, version: str) -> None:
        """Let go of a version and return once its workers are gone; nothing to do if it is not held."""
        ...

    def metrics(self) -> str:
        """The engine's metrics in Prometheus' text form."""
        ...

    def endpoint(self, component: str, version: str) -> Endpoint:
        """Where the gateway sends requests for a version, and where it asks whether that very version is well."""
        ...

    def path(self, component: str, version: str) -> str:
        """The path at the endpoint that answers for a version."""
        ...


def engine_class(name: str) -> type[Engine]:
    """The adapter called `name`: one of ours, or any other as `module:Class`. ConfigError if there is none."""
    module, _, attribute = _ENGINES.get(name, name).partition(":")
    if not attribute:
        raise ConfigError(f"there is no engine {name!r}", f"{', '.join(_ENGINES)} or module:Class", "edit node.json")
    try:
        found: type[Engine] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"engine {name!r}: {error}", "an importable module:Class", "edit node.json") from error
    return found


def digest_file(folder: Path, component: str, version: str) -> Path:
    """The file in an instance's folder that tells the handler the digest of the archive it came from.

    An archive cannot hold its own digest; the handler finds the folder in TORCHRELAY_INSTANCE.
    """
    return folder / "digests" / component / version
