"""Production's gatekeeper: decides by its own keys, its own evaluation and its own policy, never by dev's word.

An archive comes in when it is signed by a key that production lets in, holds code that is committed in production's
own checkout, and passes production's own gate over production's copy of the frozen test set. Then it is signed with
production's own key, which is the only one that production's nodes trust.
"""

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torchrelay import archive, components, gate
from torchrelay.config import Component, Json, Perimeter, Site, component_names, read_json, root, settings, write_file
from torchrelay.config import component as component_settings
from torchrelay.delivery.admission import Gatekeeper, decision, refusal, tags_hash, wanted_version
from torchrelay.delivery.replaying import TOLERANCE, answered, logged_requests, patience
from torchrelay.delivery.store import Admission
from torchrelay.errors import ArchiveError, BrokenOffError, ConfigError, DataError, ServingError, TorchrelayError
from torchrelay.handover import Environment, Evaluation, Manifest, WantedVersion
from torchrelay.lineage import TAG_COMMIT, TAG_DIGEST, TAG_ENVIRONMENT
from torchrelay.serving.predictions import Request, difference
from torchrelay.tracking import ModelVersion, Tracking

# A model that hangs must not keep the next one waiting for long.
_EXAMINE_S, _PROOF_S = 60.0, 120.0
# Judging keeps a core busy for seconds, beside what serves. Not lower: on a machine without a moment to spare it would
# never end.
_NICENESS = 5
# A candidate whose run is ended from outside so often, as by the kernel for its memory, is refused for that.
_TRIES = 3
_FILES = ("model.mar", "manifest.json", "model.sig")

log = logging.getLogger(__name__)


class Strict:
    """Decides for the perimeter `name`; see the module."""

    def __init__(self, site: Site, name: str) -> None:
        self.site = site
        self.name = name
        self.perimeter: Perimeter = site.perimeters[name]
        self.tracking = Tracking(site.tracking.url)
        self.folder = settings().state / "perimeters" / name / "admission"
        self._broken_off: Counter[tuple[str, str, str]] = Counter()

    def policy(self, version: ModelVersion) -> str:
        """The component's policy in this checkout, and what the pipeline wrote on the version."""
        if version.name not in component_names():
            return f"none {tags_hash(version)}"
        return f"{gate.policy_hash(component_settings(version.name))[:16]} {tags_hash(version)}"

    def passing(self, version: ModelVersion) -> str:
        """The policy and the component's committed files: what keeps uncommitted code out until it is committed."""
        return f"{self.policy(version)} {gate.committed(root(), version.name)}"

    def decide(self, version: ModelVersion, live: WantedVersion | None) -> Admission:
        """Admit or refuse. TorchrelayError while it cannot be decided: the registry away, an environment not built."""
        policy = self.policy(version)
        log.info("looking at %s version %s", version.name, version.version)
        reason = self._unknown(version) or refusal(version)
        if reason:
            return decision(version, policy, reason, None)
        try:
            folder = self._verified(version)
        except ArchiveError as error:
            return decision(version, policy, f"its archive does not come in: {error.found}", None)
        try:
            return self._judge(version, live, folder, policy)
        except BrokenOffError as error:
            key = (version.name, version.version, version.tags[TAG_DIGEST])
            self._broken_off[key] += 1
            if self._broken_off[key] < _TRIES:
                raise
            return decision(version, policy, f"{error.found}, {_TRIES} times", None)

    def _unknown(self, version: ModelVersion) -> str | None:
        known = component_names()
        return None if version.name in known else f"{self.name}'s checkout has no component {version.name!r}"

    def _verified(self, version: ModelVersion) -> Path:
        """The archive's folder here, once its signature, its digest and what it says of itself are checked."""
        key = self.perimeter.admits
        if key is None:
            raise ConfigError(f"perimeter {self.name} lets no key in", "control_perimeters.….admits", "make up")
        wanted = wanted_version(version)

        def check(folder: Path) -> None:
            _insist_it_is(archive.verify(folder, key, wanted.digest), version)

        return self._let_in(wanted, check)

    def _let_in(self, wanted: WantedVersion, check: Callable[[Path], object]) -> Path:
        """The folder of an archive that passes the check; one that does not never takes the place of another."""
        folder = self.folder / wanted.digest
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incoming.", dir=self.folder) as aside:
            archive.fetch(wanted.url, Path(aside) / "archive")
            check(Path(aside) / "archive")
            shutil.rmtree(folder, ignore_errors=True)
            (Path(aside) / "archive").rename(folder)
        return folder

    def _judge(self, version: ModelVersion, live: WantedVersion | None, folder: Path, policy: str) -> Admission:
        settings_ = component_settings(version.name)
        evidence = self._evidence(version, live, folder, settings_)
        verdict = gate.promote(settings_, version.version, evidence)
        if evidence.provenance_faults:
            policy = self.passing(version)
        url = self.tracking.version_url(version.name, version.version)
        live_url = self.tracking.version_url(version.name, live.version) if live else None
        page = gate.promotion_report(verdict, evidence, url, live_url)
        report = self._keep(version, "report.html", page.encode())
        self._keep(version, "verdict.json", verdict.model_dump_json(indent=2).encode())
        if verdict.verdict == "refuse":
            return decision(version, policy, "; ".join(verdict.reasons), None).model_copy(update={"report": report})
        wanted = self._countersigned(version, folder, settings_)
        return decision(version, policy, None, wanted).model_copy(update={"report": report})

    def _evidence(
        self, version: ModelVersion, live: WantedVersion | None, folder: Path, policy: Component
    ) -> gate.Evidence:
        mar, python = folder / "model.mar", _python(version.tags[TAG_ENVIRONMENT], version.name)
        if faults := _code_faults(mar, version):  # code that nobody committed is not run, not even to judge it
            return gate.Evidence(
                candidate=Evaluation(test_set="", scores=[]),
                live_version=live.version if live else None,
                proof_tolerance=0.0,
                provenance_faults=faults,
            )
        tests, requests = _test_set(version.name), self._requests(version.name, policy)
        tried = self._examined(mar, python, tests, policy, requests) or self._piecemeal(
            mar, python, tests, policy, requests
        )
        theirs = self._live_evaluation(live, tests, policy) if live and _asks_for_live(policy) else None
        return gate.Evidence(
            candidate=tried.evaluation,
            live=theirs,
            live_version=live.version if live else None,
            signature_candidate=self._signature(version.name, version.version),
            signature_live=self._signature(version.name, live.version) if live else None,
            proof_difference=tried.difference,
            proof_tolerance=archive.golden_set(mar).tolerance,
            proof_error=tried.proof_error,
            **_compared(requests, tried.answers, version),
        )

    def _requests(self, name: str, policy: Component) -> list[Request]:
        """The newest requests that production logged."""
        return logged_requests(self.perimeter, name, policy.rollout.replay_requests)

    def _examined(
        self, mar: Path, python: str, tests: Path, policy: Component, requests: list[Request]
    ) -> "_Tried | None":
        """The candidate's proof, scores and answers; None if anything goes wrong on the way."""
        try:
            found = archive.examine(
                mar,
                python,
                test_set=tests,
                task=policy.task,
                requests=_given(requests),
                patience_s=patience(policy),
                timeout_s=_EXAMINE_S,
            )
        except BrokenOffError:
            raise
        except ArchiveError as error:
            log.info("one after the other: %s", error.found)
            return None
        self._keep_evaluation(mar, tests, found.evaluation)
        return _Tried(found.proof.largest_difference, "", found.evaluation, found.answers)

    def _piecemeal(self, mar: Path, python: str, tests: Path, policy: Component, requests: list[Request]) -> "_Tried":
        """The same of a candidate that fails somewhere, so that the report says where."""
        error, difference, answers = "", None, None
        try:
            difference = archive.prove(mar, python, timeout_s=_PROOF_S).largest_difference
        except BrokenOffError:
            raise
        except ArchiveError as failure:
            error = failure.found
        evaluation = self._evaluated(mar, python, tests, policy)
        try:
            answers = archive.replay(mar, python, _given(requests), patience(policy))
        except BrokenOffError:
            raise
        except ArchiveError as failure:
            log.warning("the replay failed: %s", failure.found)
        return _Tried(difference, error, evaluation, answers)

    def _evaluated(self, mar: Path, python: str, tests: Path, policy: Component) -> Evaluation:
        """Scores of the archive over the test set, kept, since neither of the two ever changes."""
        kept = self._evaluation_file(mar, tests)
        if kept.is_file():
            return read_json(Evaluation, kept, f"rm {kept}")
        try:
            found = archive.evaluate(mar, python, tests, policy.task)
        except BrokenOffError:
            raise
        except ArchiveError as error:
            log.warning("the evaluation failed: %s", error.found)
            return Evaluation(test_set=hashlib.sha256(tests.read_bytes()).hexdigest(), scores=[])
        self._keep_evaluation(mar, tests, found)
        return found

    def _evaluation_file(self, mar: Path, tests: Path) -> Path:
        key = f"{archive.digest(mar)}-{hashlib.sha256(tests.read_bytes()).hexdigest()[:16]}"
        return self.folder / "evaluations" / f"{key}.json"

    def _keep_evaluation(self, mar: Path, tests: Path, found: Evaluation) -> None:
        write_file(self._evaluation_file(mar, tests), found.model_dump_json().encode())

    def _live_evaluation(self, live: WantedVersion, tests: Path, policy: Component) -> Evaluation:
        """Of what production signed itself, and nothing else: it is run here. No candidate is blamed where it ends."""
        trust = archive.ensure_key(settings().keys / self.name).public

        def check(folder: Path) -> None:
            archive.verify(folder, trust, live.digest)

        folder = self.folder / live.digest
        try:
            check(folder)
        except ArchiveError:  # not here, or signed anew since
            self._let_in(live, check)
        try:
            return self._evaluated(folder / "model.mar", _python(live.environment, live.component), tests, policy)
        except BrokenOffError as error:
            what = f"live version {live.version} could not be evaluated: {error.found}"
            raise ServingError(what, "its scores, to compare with", "make doctor") from error

    def _signature(self, name: str, version: str) -> dict[str, object] | None:
        """MLflow's signature of a version; None where it has none or is gone."""
        try:
            return self.tracking.signature(name, version)
        except TorchrelayError as error:
            log.warning("no signature of version %s: %s", version, error.found)
            return None

    def _countersigned(self, version: ModelVersion, folder: Path, policy: Component) -> WantedVersion:
        """What nodes are told: the archive under production's own signature, served by production's own settings."""
        key = archive.ensure_key(settings().keys / self.name)
        archive.sign(folder, key.private)
        place = f"torchrelay/archive-{self.name}/{version.tags[TAG_DIGEST]}"
        for file in _FILES:
            self.tracking.upload_artifact(version.run_id, f"{place}/{file}", folder / file)
        wanted = wanted_version(version, self.tracking.artifact_url(version.run_id, place))
        own = {**policy.serving.model_dump(), "keep_inputs": policy.monitoring.keep_inputs}
        return wanted.model_copy(update=own)

    def _keep(self, version: ModelVersion, name: str, content: bytes) -> str:
        """Log a file with the version's run; its URL."""
        place = f"torchrelay/promotion/{self.name}/{version.version}/{name}"
        self.tracking.upload_artifact(version.run_id, place, content)
        return self.tracking.artifact_url(version.run_id, place)


def _yield() -> None:
    if sys.platform == "linux":
        # Nobody but root may come up again, so whoever started lower stays there.
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


class Aside:
    """A gatekeeper that looks at versions in threads of its own, so that roll-outs go on meanwhile.

    On Linux these, and all that they start, yield to what serves: there every thread has a priority.
    """

    def __init__(self, keeper: Gatekeeper) -> None:
        self.keeper = keeper
        self._pool = ThreadPoolExecutor(2, "gatekeeper", initializer=_yield)
        # By the version in service as well: a comparison with another one says nothing.
        self._looking: dict[tuple[str, str, str, str], Future[Admission | None]] = {}

    def policy(self, version: ModelVersion) -> str:
        """As the gatekeeper says."""
        return self.keeper.policy(version)

    def passing(self, version: ModelVersion) -> str:
        """As the gatekeeper says."""
        return self.keeper.passing(version)

    def decide(self, version: ModelVersion, live: WantedVersion | None) -> Admission | None:
        """The decision, or None while it is being made; raises what kept the gatekeeper from one."""
        key = (version.name, version.version, self.policy(version), live.digest if live else "")
        looking = self._looking.get(key)
        if looking is None:
            self._looking[key] = self._pool.submit(self.keeper.decide, version, live)
            return None
        if not looking.done():
            return None
        del self._looking[key]
        return looking.result()


class _Tried(NamedTuple):
    """What a candidate did when it was tried out; no answers if the replay failed as a whole."""

    difference: float | None
    proof_error: str
    evaluation: Evaluation
    answers: list[Json] | None


def _asks_for_live(policy: Component) -> bool:
    return policy.metric.allowed_regression is not None or policy.metric.allowed_slice_regression is not None


def _given(requests: list[Request]) -> list[Json]:
    return [{"id": one.logged.id, "inputs": one.logged.instances} for one in requests]


def _compared(requests: list[Request], answers: list[Json] | None, version: ModelVersion) -> dict[str, Any]:
    """The replay as the gate reads it. What production itself had refused says nothing, and is not among these."""
    if answers is None:
        return {"replay": gate.Replay(errors=len(requests))}
    if not requests:
        return {}
    logged = [one.logged for one in requests]
    digest = version.tags[TAG_DIGEST]
    found = [answered(one, answer, version.version, digest) for one, answer in zip(logged, answers, strict=True)]
    failed = [one for one in found if one.status >= 500]
    pairs = [(a, b) for a, b in zip(logged, found, strict=True) if b.status < 500]
    differing = [(a, b) for a, b in pairs if difference(a, b, TOLERANCE)]
    examples = tuple(gate.Disagreement(id=a.id, live=a.output, candidate=b.output) for a, b in differing[:20])
    replay = gate.Replay(compared=len(pairs), disagreed=len(differing), errors=len(failed), examples=examples)
    return {"replay": replay, "latencies_ms": tuple(one.milliseconds for one in found)}


def _insist_it_is(manifest: Manifest, version: ModelVersion) -> None:
    found = (manifest.component, manifest.version, manifest.environment)
    expected = (version.name, version.version, version.tags[TAG_ENVIRONMENT])
    if found != expected:
        raise ArchiveError(f"it is {' '.join(found)}", " ".join(expected), f"make deploy-dev COMPONENT={version.name}")


def _code_faults(mar: Path, version: ModelVersion) -> tuple[str, ...]:
    """Why the archive's code is committed neither where it was trained nor, by now, in HEAD."""
    trained, head = version.tags.get(TAG_COMMIT, ""), gate.head(root())
    faults = gate.code_faults(mar, root(), version.name, trained)
    if faults and head and not gate.code_faults(mar, root(), version.name, head):
        return ()
    return tuple(faults)


def _python(environment: str, name: str) -> str:
    file = components.environment_file(environment)
    command = f"make environment COMPONENT={name}"
    return read_json(Environment, file, command).python


def _test_set(name: str) -> Path:
    """Production's copy of the frozen test set: that of its own checkout."""
    tests = root() / "data" / name / "prepared" / "test.npz"
    if not tests.is_file():
        raise DataError(f"{tests} does not exist", "the frozen test set", f".venv/bin/dvc repro {name}")
    return tests
