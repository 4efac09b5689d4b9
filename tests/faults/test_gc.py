"""`gc` that is killed anywhere, beside a converger, and on a real registry."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import mlflow_server  # noqa: F401
from tests.retention_rig import NODES, VERSIONS, Rig, archive, digest, rig, wanted
from torchrelay import config
from torchrelay.config import Retention
from torchrelay.delivery import survey
from torchrelay.delivery import sweep as sweeping
from torchrelay.delivery.store import State, store
from torchrelay.delivery.sweep import sweep
from torchrelay.errors import TorchrelayError
from torchrelay.lineage import TAG_DIGEST
from torchrelay.rest import Rest
from torchrelay.tracking import Tracking

POLICY = Retention(archives=0, environments_days=0)
LIVE = "4"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = rig(tmp_path / "site", monkeypatch)
    for name in NODES:
        made.remember(name, State(component="tiny", live=wanted(LIVE)))
    yield made
    config.settings.cache_clear()


# Killed


def _killed_at(boundary: int, work: Callable[[], Any], *effects: tuple[Any, str]) -> bool:
    """Do `work` in a child that is gone before its n-th effect, half-way through a tree; whether that came to pass."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        _mine(boundary, *effects)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def _mine(boundary: int, *effects: tuple[Any, str]) -> None:
    left = [boundary]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def effect(*words: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return real(*words, **named)

        return effect

    for owner, name in effects:
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("boundary", [*range(0, 40, 3), 45, 60, 75, 100, 130, 160])
def test_a_kill_leaves_nothing_half_and_the_next_one_ends_it(site: Rig, boundary: int) -> None:
    """Every rename, and every file and folder that goes, is a boundary."""
    effects = ((Path, "rename"), (os, "unlink"), (os, "rmdir"))
    assert _killed_at(boundary, lambda: sweep(site.site, POLICY), *effects)
    for folder in site.archive_folders():
        assert LIVE in site.there(folder)  # which looks that what is there by its name is whole
    swept = sweep(site.site, POLICY)
    assert not swept.errors
    for folder in site.archive_folders():
        assert site.there(folder) == {LIVE}
    assert not site.asides()


# Beside a converger


def test_a_perimeter_that_is_being_converged_is_left_alone(site: Rig) -> None:
    with store("production").lease(5):
        swept = sweep(site.site, POLICY, patience_s=0.2)
    assert any("production" in note for note in swept.notes)
    assert site.there(site.node("dev-1") / "archives") == {LIVE}
    assert site.there(site.node("production-1") / "archives") == {*VERSIONS}
    # What serves both waits for both.
    assert site.there(site.state / "archives") == {*VERSIONS}
    assert {one.thing.where for one in swept.busy} >= {"production-1", "this machine"}
    sweep(site.site, POLICY)
    assert site.there(site.node("production-1") / "archives") == {LIVE}


def test_a_node_that_applies_is_left_alone(site: Rig) -> None:
    from filelock import FileLock

    with FileLock(site.node("production-2") / "apply.lock"):
        sweep(site.site, POLICY, patience_s=0.2)
    assert site.there(site.node("production-1") / "archives") == {*VERSIONS}
    sweep(site.site, POLICY)
    assert site.there(site.node("production-1") / "archives") == {LIVE}


class _Converger(threading.Thread):
    """Rolls one version after the other out in production; each time it looks that nobody takes an archive away."""

    def __init__(self, site: Rig) -> None:
        super().__init__()
        self.site, self.ended, self.rounds, self.fault = site, threading.Event(), 0, ""

    def run(self) -> None:
        memory = store("production")
        while not self.ended.is_set() and not self.fault:
            version = VERSIONS[self.rounds % len(VERSIONS)]
            with memory.lease(30) as token:
                memory.save(State(component="tiny", live=wanted(version)), token)
                self._hold(version)
            self.rounds += 1

    def _hold(self, version: str) -> None:
        for name in NODES["production"]:
            folder = self.site.node(name) / "archives" / digest(version)
            if not folder.is_dir():
                archive(folder, version)
            self.site.tell(name, [version])
            time.sleep(0.01)
            if not (folder / "model.mar").is_file():
                self.fault = f"{folder} was taken away while version {version} came up"


def test_beside_a_converger_no_archive_vanishes_that_it_brings_up(site: Rig) -> None:
    converger = _Converger(site)
    converger.start()
    gone = 0
    enough, end = time.monotonic() + 4, time.monotonic() + 60
    while time.monotonic() < end and (time.monotonic() < enough or gone <= len(VERSIONS) or converger.rounds <= 10):
        gone += len(sweep(site.site, POLICY).gone)
        live = store("production").state("tiny").live
        assert live
    converger.ended.set()
    converger.join()
    assert not converger.fault
    assert converger.rounds > 10
    assert gone > len(VERSIONS)


# Versions, on a real server


def _register(tracking: Tracking, number: int) -> str:
    """A version with an archive on the server and a logged model; the path of its digest."""
    experiment = tracking.ensure_experiment("tiny")
    run = tracking.create_run(experiment, f"run {number}", f"run {number}")
    name = digest(str(number))
    for place in ("torchrelay/archive", "torchrelay/archive-production"):
        tracking.upload_artifact(run.run_id, f"{place}/{name}/model.mar", b"x" * 1000)
    tracking.upload_artifact(run.run_id, "torchrelay/evaluation.json", b"{}")
    rest = Rest(tracking.url)
    body = {"experiment_id": experiment, "name": "model", "source_run_id": run.run_id}
    model = rest.create("logged-models", body)["model"]["info"]
    rest.put_file(f"{model['artifact_uri'].partition(':/')[2]}/MLmodel", b"flavors: {}", 11)
    done = {"model_id": model["model_id"], "status": "LOGGED_MODEL_READY"}
    rest.repeat(f"logged-models/{model['model_id']}", done, method="PATCH")
    tracking.finish_run(run.run_id)
    tags = {TAG_DIGEST: name}
    return tracking.register_version("tiny", run.run_id, f"models:/{model['model_id']}", tags).version


@pytest.fixture
def registry(site: Rig, mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Tracking:  # noqa: F811
    """Versions 1 to 6 on a real server; @production points at 2."""
    tracking = Tracking(mlflow_server)
    for number in range(1, 7):
        if tracking.version("tiny", str(number)) is None:
            assert _register(tracking, number) == str(number)
    tracking.set_alias("tiny", "production", "2")
    monkeypatch.setattr(survey, "Tracking", lambda url: tracking)
    return tracking


@pytest.mark.real
def test_versions_go_with_their_archives_and_their_runs_stay(site: Rig, registry: Tracking) -> None:
    runs = {one.version: one.run_id for one in registry.versions("tiny")}
    policy = Retention(archives=99, versions=1)
    kept = sweep(site.site, policy.model_copy(update={"versions": None}))
    assert not kept.gone or {one.thing.kind for one in kept.gone} == {"environment"}

    def delete_nothing(url: str) -> None:
        os._exit(9)

    # Killed when the first version is gone and none of its artifacts is.
    child = os.fork()
    if not child:
        sweeping._delete_artifact = delete_nothing
        sweep(site.site, policy)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    # 2 is asked for, 4 is live, 6 is the newest; of the others nothing is left but the run.
    assert [one.version for one in registry.versions("tiny")] == ["2", "4", "6"]
    assert any((site.state / "retired").iterdir())
    swept = sweep(site.site, policy)
    assert not swept.errors
    assert not any((site.state / "retired").iterdir())
    for number in ("1", "3", "5"):
        assert registry.has_run(runs[number])
        assert registry.artifacts(runs[number], "torchrelay") == ["torchrelay/evaluation.json"]
        assert registry.download_artifact(runs[number], "torchrelay/evaluation.json") == b"{}"
    for number in ("2", "4", "6"):
        for place in ("archive", "archive-production"):
            path = f"torchrelay/{place}/{digest(number)}/model.mar"
            assert len(registry.download_artifact(runs[number], path)) == 1000
    assert registry.signature("tiny", "6") is None  # its MLmodel is there to be read


def test_a_server_that_dies_on_the_way_stops_only_what_is_its_own(site: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(name: str) -> list[Any]:
        raise TorchrelayError("no answer", "one", "make up")

    (site.state / "retired").mkdir()
    (site.state / "retired/tiny-1.json").write_text('{"component": "tiny", "version": "1", "urls": ["http://x/y"]}')
    monkeypatch.setattr(site.tracking, "version", lambda name, version: silent(name))
    swept = sweep(site.site, POLICY)
    assert [error.found for error in swept.errors] == ["no answer"]
    assert (site.state / "retired/tiny-1.json").exists()
    assert site.there(site.node("dev-1") / "archives") == {LIVE}


def test_what_cannot_be_deleted_is_named_and_the_rest_goes(site: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = site.node("dev-1") / "archives" / digest("1")
    real = shutil.rmtree

    def rmtree(path: Path, **named: Any) -> None:
        if path.name.startswith(f".{stuck.name}.") and path.parent == stuck.parent:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, **named)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    swept = sweep(site.site, POLICY)
    assert len(swept.errors) == 1
    assert "Permission denied" in swept.errors[0].found
    for folder in site.archive_folders():
        assert site.there(folder) == {LIVE}
