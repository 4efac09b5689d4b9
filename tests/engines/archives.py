"""Archives of the test model `scale`, one factor a version, packed the way that real ones are."""

import json
import struct
from pathlib import Path

from torchrelay.archive import pack
from torchrelay.config import write_file, write_json
from torchrelay.handover import GoldenSet, Registration, WantedVersion

_SOURCES = Path(__file__).parent / "scale"


def packed(folder: Path, version: str, factor: float) -> tuple[Path, WantedVersion]:
    """The archive of one version, and the order to load it."""
    train = folder / f"train-{version}-{factor}"
    write_file(train / "model.safetensors", _safetensors(factor))
    golden = GoldenSet(instances=[1, 2], predictions=[{"scaled": factor}, {"scaled": 2 * factor}], tolerance=1e-5)
    write_json(train / "golden.json", golden)
    registration = Registration(component="scale", version=version, run_id=f"run-{version}")
    archive = folder / f"archive-{version}-{factor}"
    manifest = pack(_SOURCES, train, registration, "test", archive)
    return archive, _wanted(version, manifest.digest)


def _wanted(version: str, digest: str) -> WantedVersion:
    return WantedVersion(
        component="scale",
        version=version,
        digest=digest,
        environment="test",
        url="unused",
        workers=1,
        batch_size=8,
        max_batch_delay_ms=1,
        response_timeout_s=10,
        max_body_bytes=2**20,
    )


def _safetensors(factor: float) -> bytes:
    """One float32 named `factor`, written by hand: this interpreter has no torch."""
    header = json.dumps({"factor": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", factor)
