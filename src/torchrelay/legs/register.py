"""Register and package: one model version per run, and the signed archive that will serve it."""

import json
from pathlib import Path

from filelock import FileLock

from torchrelay import archive, components, lineage
from torchrelay.config import component, read_json, settings, site, write_json
from torchrelay.errors import ArchiveError, TorchrelayError
from torchrelay.handover import (
    ArchiveRecord,
    DataVersion,
    Environment,
    Manifest,
    Proof,
    Registration,
    TrainedRun,
    Verdict,
)
from torchrelay.legs.places import results
from torchrelay.lineage import GitState
from torchrelay.tracking import Tracking

# What the legs leave that follow the gate, in their order.
_OF_A_VERSION = ("registration.json", "archive.json", "proof.json", "deploy/dev.json")


def register_model(name: str, train: Path, verdict: Verdict, data: DataVersion, output: Path) -> Registration:
    """The model version of the run in `train`: found if it exists, made if not, with its verdict and lineage on it."""
    again = f"make deploy-dev COMPONENT={name}"
    run = _run_in(train, verdict.run_id, name)
    tracking = Tracking(site().tracking.url)
    tags = lineage.tags(
        component=name,
        run=run,
        data=data,
        environment=components.environment(name),
        verdict=verdict,
        git=read_json(GitState, train / "git.json", again),
        parent_run=_parent_run(tracking, name, verdict),
    )
    lock = settings().state / "locks" / f"register-{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        present = tracking.version_of_run(name, run.run_id)
        said = lineage.unsaid(tags, present.tags if present else {})
        version = tracking.register_version(name, run.run_id, run.model_uri, said)
    registration = Registration(component=name, version=version.version, run_id=run.run_id)
    write_json(output, registration)
    return registration


def _run_in(train: Path, expected: str, name: str) -> TrainedRun:
    """The run that left `train`; TorchrelayError if it is another than expected: an orphaned training may end late."""
    again = f"make deploy-dev COMPONENT={name}"
    run = read_json(TrainedRun, train / "run.json", again)
    if run.run_id != expected:
        raise TorchrelayError(f"{train} was left by run {run.run_id}", f"run {expected}, which was judged", again)
    return run


def _parent_run(tracking: Tracking, name: str, verdict: Verdict) -> str | None:
    parent = tracking.version(name, verdict.live_version) if verdict.live_version else None
    return parent.run_id if parent else None


def lost(name: str) -> list[Path]:
    """The hand-over files that rest on a version, or on a run, which somebody has deleted from the registry since.

    All down to the last leg's: Snakemake does not make a missing file anew for the sake of one that is there.
    """
    file = results(name) / "registration.json"
    if not file.is_file():
        return []
    registered = read_json(Registration, file, f"rm {file}")
    tracking = Tracking(site().tracking.url)
    if not tracking.has_run(registered.run_id):
        gone = ["train/run.json", "gate/verdict.json", *_OF_A_VERSION]
    else:
        found = tracking.version(name, registered.version)
        gone = [] if found and found.run_id == registered.run_id else list(_OF_A_VERSION)
    return [path for path in (results(name) / one for one in gone) if path.is_file()]


def package_archive(name: str, registration: Registration, train: Path, folder: Path, record: Path) -> ArchiveRecord:
    """Pack, sign and upload, once per version: the archive that a version already has is fetched, not made again.

    One that is damaged, or signed by a key that is ours no more, is packed again; ArchiveError if that gives another.
    """
    tracking = Tracking(site().tracking.url)
    manifest = _made_before(tracking, registration, train, folder) or _packed(name, registration, train, folder)
    url = tracking.artifact_url(registration.run_id, f"torchrelay/archive/{manifest.digest}")
    for file in ("model.mar", "manifest.json", "model.sig"):
        path = f"torchrelay/archive/{manifest.digest}/{file}"
        tracking.upload_artifact(registration.run_id, path, folder / file)
    tags = {
        lineage.TAG_ARCHIVE_URL: url,
        lineage.TAG_ENVIRONMENT: manifest.environment,
        lineage.TAG_SERVING: json.dumps(_serving(name), sort_keys=True),
        # Last: a version that has a digest has all that serving it needs.
        lineage.TAG_DIGEST: manifest.digest,
    }
    tracking.set_version_tags(name, registration.version, tags)
    found = ArchiveRecord(
        component=name,
        version=registration.version,
        digest=manifest.digest,
        environment=manifest.environment,
        url=url,
    )
    write_json(record, found)
    return found


def _serving(name: str) -> dict[str, object]:
    """How the version asks to be served."""
    policy = component(name)
    return {**policy.serving.model_dump(), "keep_inputs": policy.monitoring.keep_inputs}


def _made_before(tracking: Tracking, registration: Registration, train: Path, folder: Path) -> Manifest | None:
    """The archive that this version was given earlier, when the code around the model may have been another."""
    version = tracking.version(registration.component, registration.version)
    digest = version.tags.get(lineage.TAG_DIGEST) if version else None
    if version is None or digest is None:
        return None
    archive.fetch(version.tags[lineage.TAG_ARCHIVE_URL], folder)
    try:
        return archive.verify(folder, settings().keys / "dev" / "signing.pub", digest)
    except ArchiveError as error:
        return _signed_anew(error, digest, registration, train, folder)


def _signed_anew(error: ArchiveError, digest: str, registration: Registration, train: Path, folder: Path) -> Manifest:
    """The very archive again, from what training left: what the server holds is not signed without a look."""
    name = registration.component
    manifest = _packed(name, registration, train, folder)
    if manifest.digest != digest:
        raise ArchiveError(
            f"{error.found}; packed again it has the digest {manifest.digest}",
            f"the archive {digest} that version {registration.version} was proven with",
            f"rm -r results/{name}/train, then make deploy-dev COMPONENT={name}, which trains a new version",
        ) from error
    return manifest


def _packed(name: str, registration: Registration, train: Path, folder: Path) -> Manifest:
    environment = components.environment(name).name
    manifest = archive.pack(components.folder(name), train, registration, environment, folder)
    _run_in(train, registration.run_id, name)
    keys = archive.ensure_key(settings().keys / "dev")
    archive.sign(folder, keys.private)
    return manifest


def prove_archive(name: str, record: ArchiveRecord, folder: Path, output: Path) -> Proof:
    """The exact archive, in its own environment, must reproduce the golden outputs; the proof goes on the version."""
    again = f"make deploy-dev COMPONENT={name}"
    python = read_json(Environment, components.environment_file(record.environment), again).python
    key = settings().keys / "dev" / "signing.pub"
    proof = archive.prove(folder / "model.mar", python, admit=lambda: archive.verify(folder, key, record.digest))
    Tracking(site().tracking.url).set_version_tags(name, record.version, {lineage.TAG_PROOF: record.digest})
    write_json(output, proof)
    return proof
