"""Register and package: one model version per run, and the signed archive that will serve it."""

import json
from pathlib import Path

from filelock import FileLock

from torchrelay import archive, components, lineage
from torchrelay.config import component, read_json, settings, site, write_json
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
from torchrelay.tracking import Tracking


def register_model(name: str, run: TrainedRun, verdict: Verdict, data: DataVersion, output: Path) -> Registration:
    """The model version of this run: found if it exists, made if not, with its verdict and lineage on it."""
    tracking = Tracking(site().tracking.url)
    tags = lineage.tags(
        component=name,
        run=run,
        data=data,
        environment=components.environment(name),
        verdict=verdict,
        parent_run=_parent_run(tracking, name, verdict),
    )
    lock = settings().state / "locks" / f"register-{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        version = tracking.register_version(name, run.run_id, run.model_uri, tags)
    registration = Registration(component=name, version=version.version, run_id=run.run_id)
    write_json(output, registration)
    return registration


def _parent_run(tracking: Tracking, name: str, verdict: Verdict) -> str | None:
    parent = tracking.version(name, verdict.live_version) if verdict.live_version else None
    return parent.run_id if parent else None


def package_archive(name: str, registration: Registration, train: Path, folder: Path, record: Path) -> ArchiveRecord:
    """Pack, sign and upload, once per version: the archive that a version already has is fetched, not made again."""
    tracking = Tracking(site().tracking.url)
    manifest = _made_before(tracking, registration, folder) or _packed(name, registration, train, folder)
    url = tracking.artifact_url(registration.run_id, f"torchrelay/archive/{manifest.digest}")
    for file in ("model.mar", "manifest.json", "model.sig"):
        path = f"torchrelay/archive/{manifest.digest}/{file}"
        tracking.upload_artifact(registration.run_id, path, folder / file)
    tags = {
        lineage.TAG_ARCHIVE_URL: url,
        lineage.TAG_ENVIRONMENT: manifest.environment,
        lineage.TAG_SERVING: json.dumps(component(name).serving.model_dump(), sort_keys=True),
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


def _made_before(tracking: Tracking, registration: Registration, folder: Path) -> Manifest | None:
    """The archive that this version was given earlier, when the code around the model may have been another."""
    version = tracking.version(registration.component, registration.version)
    digest = version.tags.get(lineage.TAG_DIGEST) if version else None
    if version is None or digest is None:
        return None
    archive.fetch(version.tags[lineage.TAG_ARCHIVE_URL], folder)
    return archive.verify(folder, settings().keys / "dev" / "signing.pub", digest)


def _packed(name: str, registration: Registration, train: Path, folder: Path) -> Manifest:
    environment = components.environment(name).name
    manifest = archive.pack(components.folder(name), train, registration, environment, folder)
    keys = archive.ensure_key(settings().keys / "dev")
    archive.sign(folder, keys.private)
    return manifest


def prove_archive(name: str, record: ArchiveRecord, folder: Path, output: Path) -> Proof:
    """The exact archive, in its own environment, must reproduce the golden outputs; the proof goes on the version."""
    archive.verify(folder, settings().keys / "dev" / "signing.pub", record.digest)
    again = f"make deploy-dev COMPONENT={name}"
    python = read_json(Environment, components.environment_file(record.environment), again).python
    proof = archive.prove(folder / "model.mar", python)
    Tracking(site().tracking.url).set_version_tags(name, record.version, {lineage.TAG_PROOF: record.digest})
    write_json(output, proof)
    return proof
