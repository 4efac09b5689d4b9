"""Makes archives of the tiny component in tests/components/tiny, trained by hand: no torch is needed for that."""

import json
import math
import shutil
import struct
from pathlib import Path

from torchrelay import archive
from torchrelay.handover import Manifest, Registration

COMPONENT = Path(__file__).parent / "components" / "tiny"
ENVIRONMENT = "py3.11-cpu-0123456789ab"
INSTANCES = [[1.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.5, 0.25, -1.0]]
WEIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.5))


def train(folder: Path, tolerance: float = 1e-4, spoil: float = 0.0) -> Path:
    """What training leaves for packing; `spoil` is added to one golden output."""
    folder.mkdir(parents=True, exist_ok=True)
    predictions = [predict(instance) for instance in INSTANCES]
    predictions[0]["probabilities"][0] += spoil  # type: ignore[index]
    golden = {"instances": INSTANCES, "predictions": predictions, "tolerance": tolerance}
    (folder / "golden.json").write_text(json.dumps(golden))
    (folder / "model.safetensors").write_bytes(weights())
    return folder


def predict(instance: list[float]) -> dict[str, object]:
    """What the tiny Predictor answers, in plain Python."""
    logits = [0.5 * sum(w * x for w, x in zip(row, instance, strict=True)) for row in WEIGHT]
    exponents = [math.exp(logit) for logit in logits]
    rows = [exponent / sum(exponents) for exponent in exponents]
    best = rows.index(max(rows))
    return {"class": best, "label": "ab"[best], "probabilities": rows, "value": rows[0]}


def weights() -> bytes:
    """The two tensors in the safetensors format."""
    header = {
        "linear.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "linear.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + struct.pack("<8f", 0.0, 0.0, *WEIGHT[0], *WEIGHT[1])


def pack(folder: Path, version: str = "1", component: str = "tiny", **training: float) -> Manifest:
    """An unsigned archive in `folder`."""
    trained = train(folder.with_name(f"{folder.name}-train"), **training)
    registration = Registration(component=component, version=version, run_id=f"run{version}")
    return archive.pack(COMPONENT, trained, registration, ENVIRONMENT, folder)


def signed(folder: Path, private_key: Path, version: str = "1", component: str = "tiny", **training: float) -> Manifest:
    """A signed archive in `folder`."""
    manifest = pack(folder, version, component, **training)
    archive.sign(folder, private_key)
    return manifest


def copy(folder: Path, target: Path) -> Path:
    """A copy to break."""
    if target.exists():
        shutil.rmtree(target)
    return Path(shutil.copytree(folder, target))
