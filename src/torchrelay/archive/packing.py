"""Packs a trained run into an archive: the same inputs give the same bytes, on any machine."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from torchrelay.archive import mar
from torchrelay.archive.folders import replaced
from torchrelay.archive.mar import Member
from torchrelay.archive.modules import serving_modules
from torchrelay.config import Json, write_json
from torchrelay.errors import ArchiveError
from torchrelay.handover import GoldenSet, Manifest, Registration


def pack(component_dir: Path, train_dir: Path, registration: Registration, environment: str, target: Path) -> Manifest:
    """Write `target`/model.mar and `target`/manifest.json, replacing what was in `target`.

    `train_dir` holds the run's model.safetensors and golden.json; `environment` is the name of the environment
    that the archive must run in. Raises ArchiveError when an input is missing or is not what it should be.
    """
    golden = _golden(train_dir / mar.GOLDEN)
    release = _release(registration, environment)
    members = {name: Member.at(path) for name, path in serving_modules(component_dir).items()}
    members |= {
        mar.TORCHSERVE_MANIFEST: Member.of(torchserve_manifest(registration.component, registration.version)),
        mar.BASE_HANDLER: Member.of(files("torchrelay.serving").joinpath("handler.py").read_bytes()),
        mar.WEIGHTS: _weights(train_dir / mar.WEIGHTS),
        mar.GOLDEN: Member.of(golden),
        mar.RELEASE: Member.of(json_bytes(release)),
    }
    with replaced(target) as folder:
        with (folder / mar.MAR).open("wb") as file:
            mar.write(file, members)
        mar.check(folder / mar.MAR)
        manifest = Manifest(**release, digest=mar.digest(folder / mar.MAR), golden=hashlib.sha256(golden).hexdigest())
        write_json(folder / mar.MANIFEST, manifest)
    return manifest


def torchserve_manifest(component: str, version: str) -> bytes:
    """What TorchServe reads first. It warns once a load that `createdOn` is missing: a date would change the bytes."""
    return json_bytes(
        {
            "archiverVersion": "0.12.0",
            "model": {"handler": mar.BASE_HANDLER, "modelName": component, "modelVersion": version},
            "runtime": "python",
        }
    )


def json_bytes(content: Json) -> bytes:
    """JSON that is the same bytes for the same content."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _release(registration: Registration, environment: str) -> dict[str, str]:
    return {**registration.model_dump(), "environment": environment}


def _golden(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        found = GoldenSet.model_validate_json(content)
    except OSError as error:
        raise _untrained(path, str(error.strerror)) from error
    except ValidationError as error:
        raise _untrained(path, f"not a golden set: {error}") from error
    if not found.instances or len(found.instances) != len(found.predictions):
        raise _untrained(path, f"{len(found.instances)} instances and {len(found.predictions)} predictions")
    return content


def _weights(path: Path) -> Member:
    if not path.is_file():
        raise _untrained(path, "no such file")
    with path.open("rb") as file:
        mar.check_weights_header(str(path), path.stat().st_size, file)
    return Member.at(path)


def _untrained(path: Path, what: str) -> ArchiveError:
    return ArchiveError(
        f"{path}: {what}", "model.safetensors and golden.json as training leaves them", "make deploy-dev"
    )
