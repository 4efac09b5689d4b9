"""The versions that take turns, trained in the copy by the whole chain, and how the copy is asked to serve one."""

import shutil
import time
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from checkout import Checkout
from redeploy.clients import ask
from report import say
from torchrelay import components
from torchrelay.archive import golden_set
from torchrelay.config import NodeConfig, read_json, site
from torchrelay.errors import ServingError
from torchrelay.handover import ArchiveRecord
from torchrelay.serving.apply import node_config
from torchrelay.tracking import Tracking

PERIMETER = "dev"
_SAMPLES = 1500
_SERVED_S = 120
_POLL_S = 0.005


@dataclass(frozen=True)
class Version:
    """A trained version: what its chain handed over, kept beside the copy's current results."""

    record: ArchiveRecord
    results: Path


def train(copy: Checkout, component: str) -> list[Version]:
    """Three versions by `deploy-dev`; the third one's environment has another name, so it gets an engine of its own."""
    copy.limit_data(component, _SAMPLES)
    found = []
    for seed in (1, 2, 3):
        say(f"training version {seed} of 3")
        training = {"parameters": {"epochs": 1, "seed": seed}}
        copy.override(component, {"metric": {"floor": 0.0, "allowed_regression": 1.0}, "training": training})
        if seed == 3:
            _rename_environment(component)
        copy.relay("deploy-dev", "--component", component)
        kept = copy.folder / "results" / f"{component}-{seed}"
        shutil.copytree(copy.folder / "results" / component, kept)
        found.append(Version(read_json(ArchiveRecord, kept / "archive.json", "make deploy-dev"), kept))
    return found


def _rename_environment(component: str) -> None:
    """Another lock gives another name, and an environment that is built anew under it."""
    for lock in components.lock_files(component):
        lock.write_text(f"{lock.read_text(encoding='utf-8')}# an environment of another name\n", encoding="utf-8")


def node() -> NodeConfig:
    """The one node of dev."""
    return node_config(site().perimeters[PERIMETER].nodes[0].folder)


def url(component: str) -> str:
    """Where clients send their requests."""
    return f"{site().perimeters[PERIMETER].gateway}/predictions/{component}"


def one_instance(version: Version) -> list[object]:
    """The first golden input."""
    return golden_set(version.results / "archive" / "model.mar").instances[:1]


def move_alias(version: Version) -> None:
    """Ask for the version as MLflow's own page would: move the alias, nothing else."""
    perimeter = site().perimeters[PERIMETER]
    Tracking(site().tracking.url).set_alias(version.record.component, perimeter.alias, version.record.version)


def forget(version: Version) -> None:
    """Take the archive from the node, as if the version had never been there."""
    shutil.rmtree(node().folder / "archives" / version.record.digest)


class Watch:
    """Asks again and again until a version answers; `seconds` is when it first did, counted from the beginning."""

    def __init__(self, version: Version, body: bytes) -> None:
        self._version, self._body = version.record, body
        self._began = time.perf_counter()
        self._seconds: float | None = None
        self._thread = Thread(target=self._look, daemon=True)
        self._thread.start()

    def seconds(self) -> float:
        """Wait for it; ServingError when it never answered."""
        self._thread.join()
        if self._seconds is None:
            raise ServingError(f"version {self._version.version} never answered", "an answer", "make status")
        return self._seconds

    def _look(self) -> None:
        where = urlsplit(url(self._version.component))
        connection = HTTPConnection(where.hostname or "", where.port, timeout=30)
        while time.perf_counter() - self._began < _SERVED_S:
            answered: Counter[str] = Counter()
            ask(connection, where.path, self._body, answered)
            if answered[self._version.version]:
                self._seconds = time.perf_counter() - self._began
                break
            time.sleep(_POLL_S)
        connection.close()
