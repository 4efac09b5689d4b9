"""Gate: judge the candidate against the floor and against what is live, on the same frozen test set."""

import hashlib
from contextlib import suppress
from pathlib import Path

from torchrelay import archive, components, gate
from torchrelay.config import component, read_json, settings, site, write_file, write_json
from torchrelay.errors import ArchiveError, TorchrelayError
from torchrelay.handover import Environment, Evaluation, TrainedRun, Verdict
from torchrelay.lineage import TAG_ARCHIVE_URL, TAG_DIGEST, TAG_ENVIRONMENT
from torchrelay.rest import NOT_THERE, AnsweredError
from torchrelay.tracking import ModelVersion, Tracking


def gate_model(name: str, train: Path, test_set: Path, output: Path) -> Verdict:
    """Write `output/verdict.json` and `output/report.html`, and keep both with the run. A refusal is a verdict too."""
    run = read_json(TrainedRun, train / "run.json", f"make deploy-dev COMPONENT={name}")
    candidate = read_json(Evaluation, train / "evaluation.json", f"make deploy-dev COMPONENT={name}")
    tracking = Tracking(site().tracking.url)
    live = tracking.alias(name, "dev-live")
    against = _live(tracking, live, test_set, candidate) if live else None
    verdict = gate.judge(component(name), run, candidate, against)
    page = gate.report(
        verdict, candidate, against.evaluation if against else None, tracking.run_url(run.experiment_id, run.run_id)
    )
    write_file(output / "report.html", page.encode())
    write_json(output / "verdict.json", verdict)
    for file in ("report.html", "verdict.json"):
        tracking.upload_artifact(run.run_id, f"torchrelay/gate/{file}", output / file)
    return verdict


def _live(tracking: Tracking, live: ModelVersion, test_set: Path, candidate: Evaluation) -> gate.Live:
    """The live version with its scores. That it has none on this test set is for the verdict to say, not an error."""
    if component(live.name).metric.allowed_regression is None:
        return gate.Live(live.version)
    try:
        return gate.Live(live.version, _evaluation_of(tracking, live, test_set, candidate))
    except ArchiveError as error:
        reason = error.found
    except AnsweredError as error:
        if error.code != NOT_THERE:
            raise
        reason = error.found
    return gate.Live(live.version, fault=f"{reason}; metric.allowed_regression: null asks for no comparison")


def _evaluation_of(tracking: Tracking, live: ModelVersion, test_set: Path, candidate: Evaluation) -> Evaluation:
    """What the live version scores on the candidate's test set: as recorded, or evaluated now where the set moved."""
    recorded = Evaluation.model_validate_json(tracking.download_artifact(live.run_id, "torchrelay/evaluation.json"))
    if recorded.test_set == candidate.test_set:
        return recorded
    if hashlib.sha256(test_set.read_bytes()).hexdigest() != candidate.test_set:
        raise TorchrelayError(
            f"{test_set} is not the test set that the candidate was evaluated on",
            f"a file with sha256 {candidate.test_set}",
            f"make deploy-dev COMPONENT={live.name}",
        )
    return _evaluate_archive(live, test_set)


def _evaluate_archive(live: ModelVersion, test_set: Path) -> Evaluation:
    """Run the very archive that is live over the new test set, in its own environment."""
    mar = _verified(live) / "model.mar"
    return archive.evaluate(mar, _python_of(live), test_set, component(live.name).task)


def _verified(live: ModelVersion) -> Path:
    """The live archive on this machine: as it lies here, or fetched where that is missing or damaged."""
    folder, key = settings().state / "archives" / live.tags[TAG_DIGEST], settings().keys / "dev" / "signing.pub"
    if folder.is_dir():
        with suppress(ArchiveError):
            archive.verify(folder, key, live.tags[TAG_DIGEST])
            return folder
    archive.fetch(live.tags[TAG_ARCHIVE_URL], folder)
    archive.verify(folder, key, live.tags[TAG_DIGEST])
    return folder


def _python_of(live: ModelVersion) -> str:
    """The version's own environment where it stands on this machine, else the component's present one."""
    file = components.environment_file(live.tags[TAG_ENVIRONMENT])
    if file.is_file():
        return read_json(Environment, file, "make deploy-dev").python
    return components.environment(live.name).python
