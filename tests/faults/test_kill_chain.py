"""kill -9 between any two effects of gate, register, package, prove and deploy: a rerun ends with one version a run.

The registry and the node are simulated so that every boundary can be tried; the legs, the plan and converge are real.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import tiny
from torchrelay import archive, components, ledger, lineage
from torchrelay.config import Component, Node, Perimeter, Settings, Site, TrackingServer, read_json, write_json
from torchrelay.config import Rollout as RolloutPolicy
from torchrelay.delivery import converge, reach, telling
from torchrelay.delivery import store as memory
from torchrelay.delivery.admission import Trusting, refusal
from torchrelay.errors import ArchiveError, RefusedError, ServingError, TorchrelayError
from torchrelay.handover import (
    ArchiveRecord,
    DataVersion,
    Desired,
    Endpoint,
    Environment,
    Evaluation,
    Fault,
    HeldVersion,
    Manifest,
    NodeReport,
    Proof,
    Registration,
    RouteShare,
    TrainedRun,
    Verdict,
)
from torchrelay.legs import deploy, judge, register
from torchrelay.tracking import ModelVersion


class Killed(BaseException):
    """The process is gone: nothing may catch this."""


class Registry:
    """What outlives a kill: versions, aliases, artifacts, the ledger, and what the node serves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions_made: list[ModelVersion] = []
        self.aliases_set: dict[str, str] = {}
        self.ledger: dict[str, ledger.Entry] = {}
        self.desired = Desired(perimeter="dev", components=())
        self.node_fails: TorchrelayError | None = None
        self.boundaries = 0
        self.kill_at: int | None = None

    def effect(self, do: Callable[[], Any]) -> Any:
        self._boundary()
        found = do()
        for alias, version in self.aliases_set.items():
            held = self.version("tiny", version)
            assert held is not None
            assert refusal(held) is None, f"{alias} points at a refused version"
        self._boundary()
        return found

    def _boundary(self) -> None:
        self.boundaries += 1
        if self.boundaries == self.kill_at:
            raise Killed

    def register_version(self, component: str, run_id: str, source: str, tags: Mapping[str, str]) -> ModelVersion:
        if not any(one.run_id == run_id for one in self.versions_made):
            made = ModelVersion(
                name=component,
                version=str(len(self.versions_made) + 1),
                run_id=run_id,
                source=source,
                status="READY",
                tags={},
                aliases=(),
            )
            self.effect(lambda: self.versions_made.append(made))
        version = next(one for one in self.versions_made if one.run_id == run_id)
        self.set_version_tags(component, version.version, tags)
        return version

    def set_version_tags(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            held = self.version(name, version)
            assert held is not None
            self.effect(lambda held=held, key=key, value=value: held.tags.__setitem__(key, value))

    def version_of_run(self, name: str, run_id: str) -> ModelVersion | None:
        return next((one for one in self.versions_made if one.run_id == run_id), None)

    def version(self, name: str, version: str) -> ModelVersion | None:
        return next((one for one in self.versions_made if one.version == version), None)

    @property
    def served(self) -> list[str]:
        return [routed.version.version for routed in self.desired.routes]

    def report(self, before: Desired | None = None) -> NodeReport:
        if self.node_fails:
            raise self.node_fails
        held = tuple(
            HeldVersion(
                component=one.component,
                version=one.version,
                digest=one.digest,
                healthy=True,
                changed=before is not None and one not in before.components,
                endpoint=ENDPOINT,
                path="/",
            )
            for one in self.desired.components
        )
        routed = tuple(
            RouteShare(
                component=one.version.component,
                version=one.version.version,
                digest=one.version.digest,
                weight=one.weight,
                mirror=one.mirror,
                endpoints=(ENDPOINT,),
            )
            for one in self.desired.routes
        )
        return NodeReport(node="dev-1", held=held, routed=routed, gateway_healthy=True, told=self.desired)

    def aliases(self, name: str) -> dict[str, str]:
        return dict(self.aliases_set)

    def models(self) -> dict[str, dict[str, str]]:
        return {"tiny": self.aliases_set}

    def alias(self, name: str, alias: str) -> ModelVersion | None:
        return self.version(name, self.aliases_set.get(alias, ""))

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self.effect(lambda: self.aliases_set.__setitem__(alias, version))

    def delete_alias(self, name: str, alias: str) -> None:
        self.effect(lambda: self.aliases_set.pop(alias, None))

    def artifact_url(self, run_id: str, path: str) -> str:
        return str(self.folder / run_id / path)

    def upload_artifact(self, run_id: str, path: str, content: Path) -> None:
        target = self.folder / run_id / path

        def copy() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(content, target)

        self.effect(copy)

    def download_artifact(self, run_id: str, path: str) -> bytes:
        return (self.folder / run_id / path).read_bytes()

    def run_url(self, experiment_id: str, run_id: str) -> str:
        return f"http://x/#/experiments/{experiment_id}/runs/{run_id}"


ENDPOINT = Endpoint(host="127.0.0.1", port=1)
PERIMETER = Perimeter(
    alias="dev", gateway="http://x", gateway_node="dev-1", nodes=(Node(name="dev-1", folder=Path("/nowhere")),)
)
PRODUCTION = PERIMETER.model_copy(
    update={"alias": "production", "progressive": True, "keeps_last": True, "warm": 1, "orchestrator": "http://o"}
)
SITE = Site(
    supervisor=Path("s"),
    tracking=TrackingServer(url="http://x"),
    perimeters={"dev": PERIMETER, "production": PRODUCTION},
)
GIT = lineage.GitState(commit="c", dirty=False, tree="t")
DIGESTS = (lineage.TAG_DIGEST, lineage.TAG_PROOF)
ADMISSIBLE = {
    lineage.TAG_VERDICT: "pass",
    lineage.TAG_ARCHIVE_URL: "http://x/a",
    lineage.TAG_ENVIRONMENT: "py311-cpu-0",
    lineage.TAG_SERVING: "{}",
}
DATA = DataVersion(component="tiny", hash="h")
ENVIRONMENT = Environment(name=tiny.ENVIRONMENT, variant="cpu", python="python", lock_sha256="0")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    made = Registry(tmp_path / "artifacts")
    here = Settings(state=tmp_path / "state", keys=tmp_path / "keys")
    described = Component.model_validate(
        {"name": "tiny", "description": "d", "task": "classification", "data": "none", "metric": {"floor": 0.5}}
    )

    def apply_on(node: Node, wanted: Desired) -> tuple[NodeReport, None]:
        if made.node_fails:
            raise made.node_fails
        before = made.desired
        if wanted != before:
            made.effect(lambda: setattr(made, "desired", wanted))
        return made.report(before), None

    saved = memory.Store.save

    def verify(folder: Path, key: Path, digest: str | None = None) -> Manifest:
        assert archive.digest(folder / "model.mar") == digest
        return read_json(Manifest, folder / "manifest.json", "x")

    def fetch(url: str, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(url, target)

    def proof(mar: Path, python: str, admit: Callable[[], object]) -> Proof:
        admit()
        return Proof(component="tiny", version="1", digest=archive.digest(mar), samples=3, largest_difference=0)

    def record(tracking: object, perimeter: str, entry: ledger.Entry, outbox: Path) -> str:
        made.effect(lambda: made.ledger.setdefault(entry.key(perimeter), entry))
        return "run"

    replaced: dict[tuple[object, str], object] = {
        (archive, "sign"): lambda folder, key: (folder / "model.sig").write_text("signed"),
        (archive, "verify"): verify,
        (archive, "fetch"): fetch,
        (archive, "prove"): proof,
        (components, "environment"): lambda name: ENVIRONMENT,
        (components, "folder"): lambda name: tiny.COMPONENT,
        (register, "component"): lambda name: described,
        (judge, "component"): lambda name: described,
        (ledger, "record"): record,
        (ledger, "note"): lambda perimeter, entry, outbox, pages=None: record(None, perimeter, entry, outbox),
        (ledger, "flush_outbox"): lambda tracking, outbox: {},
        (reach, "apply_on"): apply_on,
        (reach, "observe_on"): lambda node: made.report(),
        (memory.Store, "save"): lambda self, state, token: made.effect(lambda: saved(self, state, token)),
    }
    for module in (judge, register, deploy, converge):
        replaced[module, "Tracking"] = lambda url, hasty=False: made
    for module in (judge, register, deploy):
        replaced[module, "site"] = lambda: SITE
    for module in (register, telling, memory):
        replaced[module, "settings"] = lambda: here
    environment = tmp_path / "environment.json"
    environment.write_text(ENVIRONMENT.model_dump_json())
    replaced[components, "environment_file"] = lambda name: environment
    for (owner, name), value in replaced.items():
        monkeypatch.setattr(owner, name, value)
    yield made


def chain(folder: Path, run_id: str, passed: bool = True) -> None:
    """The legs after training, each skipped when its output is there: what Snakemake does."""
    files = ("gate/verdict.json", "registration.json", "archive.json", "proof.json", "dev.json")
    places = {name: folder / run_id / name for name in files}
    trained = folder / run_id / "train"
    if not trained.exists():
        aside = train(folder / run_id / "aside", run_id, right=9 if passed else 4)
        judge.Tracking("").upload_artifact(run_id, "torchrelay/evaluation.json", aside / "evaluation.json")
        aside.rename(trained)
    if not places["gate/verdict.json"].exists():
        judge.gate_model("tiny", trained, folder / "test.npz", places["gate/verdict.json"].parent)
    if not places["registration.json"].exists():
        verdict = read_json(Verdict, places["gate/verdict.json"], "x")
        register.register_model("tiny", trained, verdict, DATA, places["registration.json"])
    registration = read_json(Registration, places["registration.json"], "x")
    packed = folder / run_id / "archive"
    if not places["archive.json"].exists():
        register.package_archive("tiny", registration, trained, packed, places["archive.json"])
    record = read_json(ArchiveRecord, places["archive.json"], "x")
    if not places["proof.json"].exists():
        register.prove_archive("tiny", record, packed, places["proof.json"])
    if not places["dev.json"].exists():
        deploy.deploy_model("tiny", record, "dev", places["dev.json"])


def train(folder: Path, run_id: str, git: lineage.GitState = GIT, right: int = 9) -> Path:
    """What the leg `train_model` leaves: a model that is right `right` times of 10."""
    tiny.train(folder)
    evaluation = Evaluation(test_set="t", scores=[1.0] * right + [0.0] * (10 - right))
    run = TrainedRun(
        run_id=run_id,
        experiment_id="1",
        model_uri="models:/m-1",
        metrics={"accuracy": right / 10},
        parameters={},
        device="cpu",
    )
    for name, content in (("evaluation.json", evaluation), ("git.json", git), ("run.json", run)):
        write_json(folder / name, content)
    return folder


def test_killed_at_any_boundary_a_rerun_ends_with_one_version_per_run_which_is_live(
    registry: Registry, tmp_path: Path
) -> None:
    for attempt in range(1, 200):
        run = f"run{attempt}"
        registry.boundaries, registry.kill_at = 0, attempt
        try:
            chain(tmp_path, run)
            break
        except Killed:
            registry.kill_at = None
            chain(tmp_path, run)
        runs = [one.run_id for one in registry.versions_made]
        assert len(set(runs)) == len(runs) == attempt
        assert registry.aliases_set == {"dev": str(attempt), "dev-live": str(attempt)}
        assert registry.served == [str(attempt)]
        assert [entry.to_version for entry in registry.ledger.values()] == [str(made) for made in range(1, attempt + 1)]
    assert attempt > 30, "the boundaries were not reached"


def test_changed_settings_reach_the_node_whenever_it_is_killed_and_make_no_version(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(tmp_path, "one")
    for attempt in range(1, 100):
        policy = register.component("tiny")
        serving = policy.serving.model_copy(update={"workers": 1 + attempt})
        monitoring = policy.monitoring.model_copy(update={"keep_inputs": bool(attempt % 2)})
        changed = policy.model_copy(update={"serving": serving, "monitoring": monitoring})
        monkeypatch.setattr(register, "component", lambda name, changed=changed: changed)
        for name in ("archive.json", "proof.json", "dev.json"):  # what depends on the settings
            (tmp_path / "one" / name).unlink()
        registry.boundaries, registry.kill_at = 0, attempt
        with suppress(Killed):
            chain(tmp_path, "one")
        done, registry.kill_at = registry.boundaries < attempt, None
        chain(tmp_path, "one")
        (held,), (routed,) = registry.desired.components, registry.desired.routes
        assert (held.version, held.workers, held.keep_inputs) == ("1", 1 + attempt, bool(attempt % 2))
        assert routed.version == held
        if done:
            break
    assert attempt > 5, "the boundaries were not reached"
    assert registry.aliases_set == {"dev": "1", "dev-live": "1"}
    assert [entry.kind for entry in registry.ledger.values()] == ["rollout"]


def test_another_components_trouble_keeps_nobody_waiting(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where its record cannot be read at all."""
    close = converge.Converger._close

    def fails(self: converge.Converger, component: str, asked: Any) -> Any:
        if component == "other":
            raise KeyError("torchrelay.serving")
        return close(self, component, asked)

    monkeypatch.setattr(converge.Converger, "_close", fails)
    monkeypatch.setattr(Registry, "models", lambda self: {"tiny": self.aliases_set, "other": {}})
    store = memory.store("dev")
    with store.lease(1) as token:
        store.save(memory.State(component="other"), token)
    chain(tmp_path, "one")
    assert registry.served == ["1"]
    assert "other could not be looked at" in store.state("other").trouble
    assert "other is in trouble" in capsys.readouterr().err
    with pytest.raises(ServingError, match="other could not be looked at"):
        converge.converge(SITE, "dev", "test")


def test_a_version_that_failed_to_load_is_tried_again_by_the_same_command(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker may have been killed for want of memory, which says nothing of the version."""
    chain(tmp_path, "one")
    apply_on, failures = reach.apply_on, [1]

    def fails(node: Node, wanted: Desired) -> tuple[NodeReport, TorchrelayError | None]:
        if failures and any(one.version == "2" for one in wanted.components):
            failures.pop()
            fault = Fault(
                component="tiny", version="2", found="lost a worker", expected="e", next_command="n", final=True
            )
            return registry.report().model_copy(update={"faults": (fault,)}), ServingError("lost a worker", "e", "n")
        return apply_on(node, wanted)

    monkeypatch.setattr(reach, "apply_on", fails)
    with pytest.raises(TorchrelayError, match="lost a worker"):
        chain(tmp_path, "two")
    assert registry.served == ["1"]
    chain(tmp_path, "two")
    assert registry.served == ["2"]


def test_a_refused_run_moves_no_alias_whenever_it_is_killed(registry: Registry, tmp_path: Path) -> None:
    chain(tmp_path, "good")
    for attempt in range(1, 200):
        run = f"bad{attempt}"
        registry.boundaries, registry.kill_at = 0, attempt
        with pytest.raises((Killed, RefusedError)) as caught:
            chain(tmp_path, run, passed=False)
        if caught.type is RefusedError:
            break
        registry.kill_at = None
        with pytest.raises(RefusedError, match="below the floor"):
            chain(tmp_path, run, passed=False)
        assert registry.aliases_set == {"dev": "1", "dev-live": "1"}
        assert registry.served == ["1"]
    assert {entry.kind for entry in registry.ledger.values()} == {"rollout", "refusal"}


class Judge:
    """Stands in for what is counted: every stage passes, but for the one that a version is to fail in."""

    def __init__(self, fails: dict[str, int]) -> None:
        self.fails = fails

    def gather(self, state: memory.State, perimeter: Perimeter) -> memory.State:
        rollout = state.rollout
        assert rollout is not None
        judgement = "breach" if self.fails.get(rollout.wanted.version) == rollout.stage else "pass"
        judged = rollout.model_copy(update={"judgement": judgement, "note": f"stage {rollout.stage}: {judgement}"})
        return state.model_copy(update={"rollout": judged})

    def pages(self, state: memory.State, perimeter: str, reason: str, *, passed: bool) -> dict[str, str]:
        return {}


def orchestrate(judge_: Judge) -> None:
    """One look after the other until there is nothing more to do: what production's orchestrator does."""
    store = memory.store("production")
    for _ in range(50):
        with store.lease(1) as token:
            outcome = converge.Converger(
                SITE, "production", store, token, why="test", gatekeeper=Trusting(), evidence=judge_
            ).tick()
        assert outcome.errors == []
        if not outcome.soon:
            return
    raise AssertionError("it does not come to rest")


@pytest.mark.parametrize("fails_in", [None, 0, 2], ids=["passes", "shadow", "25 %"])
def test_killed_at_any_step_of_a_roll_out_production_serves_one_version_and_says_so_once(
    fails_in: int | None, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converge, "component_settings", lambda _: Component.model_construct(rollout=RolloutPolicy()))
    live, told = "", []
    for attempt in range(100):
        made = registry.register_version("tiny", f"run{attempt}", "s", {})
        digest = f"d{attempt}"
        registry.set_version_tags("tiny", made.version, ADMISSIBLE | dict.fromkeys(DIGESTS, digest))
        registry.aliases_set["production"] = made.version
        judged = Judge({made.version: fails_in} if live and fails_in is not None else {})
        registry.boundaries, registry.kill_at = 0, attempt or None
        with suppress(Killed):
            orchestrate(judged)
        done, registry.kill_at = registry.boundaries < attempt, None
        orchestrate(judged)
        refused = live and fails_in is not None
        told.append(("refusal" if refused else "rollout", made.version))
        live = live if refused else made.version
        assert {one.version.version: one.weight for one in registry.desired.routes} == {live: 100}
        assert registry.aliases_set["production-live"] == live
        assert [(entry.kind, entry.to_version) for entry in registry.ledger.values()] == told
        state = memory.store("production").state("tiny")
        assert (state.rollout, state.live and state.live.version) == (None, live)
        if done:
            break
    assert attempt > 20, "the boundaries were not reached"


def test_a_node_that_gives_no_report_is_not_taken_to_serve(registry: Registry, tmp_path: Path) -> None:
    chain(tmp_path, "one")
    registry.node_fails = ServingError("apply on dev-1 took over 900 s", "an answer", "make status")
    with pytest.raises(ServingError, match="900 s"):
        chain(tmp_path, "two")
    assert registry.aliases_set == {"dev": "2", "dev-live": "1"}
    assert [entry.to_version for entry in registry.ledger.values()] == ["1"]
    registry.node_fails = None
    chain(tmp_path, "two")
    assert registry.aliases_set == {"dev": "2", "dev-live": "2"}


def test_what_nobody_asks_for_any_more_is_live_no_more_once_no_node_serves_it(
    registry: Registry, tmp_path: Path
) -> None:
    chain(tmp_path, "one")
    del registry.aliases_set["dev"]
    registry.node_fails = ServingError("no answer", "an answer", "make status")
    with pytest.raises(ServingError):
        converge.converge(SITE, "dev", "test")
    assert registry.aliases_set == {"dev-live": "1"}
    registry.node_fails = None
    for _ in range(2):
        converge.converge(SITE, "dev", "test")
        assert registry.aliases_set == {}
        assert registry.served == []
    kinds = [(entry.kind, entry.from_version, entry.to_version) for entry in registry.ledger.values()]
    assert kinds == [("rollout", None, "1"), ("withdrawal", "1", None)]


def test_judging_a_live_version_anew_changes_its_verdict_but_not_what_it_came_from(
    registry: Registry, tmp_path: Path
) -> None:
    chain(tmp_path, "one")
    chain(tmp_path, "two")
    before = dict(registry.versions_made[1].tags)
    later = lineage.GitState(commit="later", dirty=True, tree="later")
    trained = train(tmp_path / "two" / "train", "two", later)
    judged = read_json(Verdict, tmp_path / "two" / "gate" / "verdict.json", "x")
    judged = judged.model_copy(update={"live_version": "2", "candidate": 0.8})
    register.register_model("tiny", trained, judged, DATA, tmp_path / "again.json")
    after = registry.versions_made[1].tags
    assert {name for name in after if after[name] != before[name]} == {lineage.TAG_SCORE}
    assert len(registry.versions_made) == 2


def test_what_an_orphaned_training_left_meanwhile_is_neither_registered_nor_packed_for_the_judged_run(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_given: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(register, "package_archive", killed)
        chain(tmp_path, "one")
    assert (tmp_path / "one" / "registration.json").exists()
    assert not (tmp_path / "one" / "archive.json").exists()
    train(tmp_path / "one" / "train", "orphan")
    for lost in ("registration.json", None):
        with pytest.raises(TorchrelayError, match="was left by run orphan"):
            chain(tmp_path, "one")
        assert not (tmp_path / "one" / "archive.json").exists()
        if lost:
            (tmp_path / "one" / lost).unlink()
    assert "dev-live" not in registry.aliases_set


def test_an_archive_signed_by_a_lost_key_is_packed_and_signed_anew_as_it_was(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(tmp_path, "one")
    before = (tmp_path / "one" / "archive.json").read_bytes()
    (tmp_path / "one" / "archive.json").unlink()
    _trust_only(monkeypatch, "signed with the new key")
    chain(tmp_path, "one")
    assert (tmp_path / "one" / "archive.json").read_bytes() == before


def test_an_archive_that_cannot_be_packed_as_it_was_is_not_signed_for_its_version(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(tmp_path, "one")
    (tmp_path / "one" / "archive.json").unlink()
    _trust_only(monkeypatch, "signed with the new key")
    tiny.train(tmp_path / "one" / "train", tolerance=0.5)
    with pytest.raises(ArchiveError, match="packed again it has the digest"):
        chain(tmp_path, "one")
    assert not (tmp_path / "one" / "archive.json").exists()


def _trust_only(monkeypatch: pytest.MonkeyPatch, signature: str) -> None:
    """From now on archives are signed, and verified, by another key."""

    def sign(folder: Path, key: Path) -> None:
        (folder / "model.sig").write_text(signature)

    def verify(folder: Path, key: Path, digest: str | None = None) -> Manifest:
        if (folder / "model.sig").read_text() != signature:
            raise ArchiveError(f"{folder} is not signed by {key}", "a signature by that key", "make deploy-dev")
        return read_json(Manifest, folder / "manifest.json", "x")

    monkeypatch.setattr(archive, "sign", sign)
    monkeypatch.setattr(archive, "verify", verify)
