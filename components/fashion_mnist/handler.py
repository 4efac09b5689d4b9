"""From a request to predictions: what serving, the golden proof and the evaluation at training time all run."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LABELS, SIDE, load

IMAGE_TYPES = ("image/png", "image/jpeg")
RULE = f"an instance is {SIDE} rows of {SIDE} whole numbers from 0 to 255"


class Predictor:
    """Answers for one archive. The caller decides on threads: one each where several work side by side."""

    def __init__(self, folder: Path) -> None:
        """Load `model.safetensors` from the folder, onto the GPU where there is one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = load(folder / "model.safetensors").to(self.device)

    def decode(self, body: bytes, content_type: str) -> list[Any]:
        """The one instance in a PNG or JPEG body; ValueError if it is not one of 28×28 pixels."""
        if content_type.partition(";")[0].strip().lower() not in IMAGE_TYPES:
            raise ValueError(f"content type {content_type!r}: application/json, {' or '.join(IMAGE_TYPES)}")
        # Pillow takes as long to import as a worker has to answer several hundred requests that need none.
        from PIL import Image

        try:
            with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as image:
                if image.size != (SIDE, SIDE):
                    raise ValueError(f"an image of {image.width}×{image.height} pixels: it must have {SIDE}×{SIDE}")
                pixels = image.convert("L").tobytes()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the body is not a whole PNG or JPEG image: {error}") from error
        return [[list(pixels[start : start + SIDE]) for start in range(0, SIDE * SIDE, SIDE)]]

    def encode(self, instances: list[Any]) -> Tensor:
        """uint8 (N, 28, 28); ValueError names the first instance that breaks the rule."""
        if not instances:
            raise ValueError("instances is empty: send at least one")
        pixels = bytearray()
        for index, instance in enumerate(instances):
            pixels += as_bytes(index, instance)
        return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, SIDE, SIDE)

    @torch.inference_mode()
    def predict(self, batch: Tensor) -> list[dict[str, Any]]:
        """For every image of (N, 28, 28): the class, its label, and the probabilities of all classes."""
        probabilities = self.network(batch.to(self.device)).softmax(1)
        best = probabilities.argmax(1).tolist()
        return [
            {"class": index, "label": LABELS[index], "probabilities": row}
            for index, row in zip(best, probabilities.tolist(), strict=True)
        ]


def as_bytes(index: int, instance: Any) -> bytes:
    """The 784 pixels of one instance. `bytes` checks type and range of every number faster than an array would."""
    rows = instance if isinstance(instance, list) else []
    # A row that is a number would make bytes(number) allocate as many zeros.
    if len(rows) != SIDE or not all(isinstance(row, list) and len(row) == SIDE for row in rows):
        raise ValueError(f"instance {index} has another shape: {RULE}")
    try:
        return b"".join(map(bytes, rows))
    except (TypeError, ValueError) as error:
        raise ValueError(f"instance {index} holds something else: {RULE}") from error
