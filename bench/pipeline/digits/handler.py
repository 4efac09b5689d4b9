"""From a request to predictions: what serving, the golden proof and the evaluation at training time all run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import BRIGHTEST, LABELS, SIDE, load

RULE = f"an instance is {SIDE} rows of {SIDE} whole numbers from 0 to {BRIGHTEST}"


class Predictor:
    """Answers for one archive."""

    def __init__(self, folder: Path) -> None:
        """Load `model.safetensors` from the folder."""
        self.network = load(folder / "model.safetensors")

    def decode(self, body: bytes, content_type: str) -> list[Any]:  # noqa: ARG002 - the contract's form
        """Refuse by ValueError: there is no other form than JSON here."""
        raise ValueError(f"content type {content_type!r}: only application/json is understood")

    def encode(self, instances: list[Any]) -> Tensor:
        """uint8 (N, 8, 8); ValueError names the first instance that breaks the rule."""
        if not instances:
            raise ValueError("instances is empty: send at least one")
        for index, instance in enumerate(instances):
            if not is_digit(instance):
                raise ValueError(f"instance {index}: {RULE}")
        return torch.tensor(instances, dtype=torch.uint8)

    @torch.inference_mode()
    def predict(self, batch: Tensor) -> list[dict[str, Any]]:
        """For every image of (N, 8, 8): the class, its label, and the probabilities of all classes."""
        probabilities = self.network(batch).softmax(1)
        best = probabilities.argmax(1).tolist()
        return [
            {"class": index, "label": LABELS[index], "probabilities": row}
            for index, row in zip(best, probabilities.tolist(), strict=True)
        ]


def is_digit(instance: Any) -> bool:
    """Whether this is what the rule says; a bool is no number here."""
    rows = instance if isinstance(instance, list) else []
    if len(rows) != SIDE or not all(isinstance(row, list) and len(row) == SIDE for row in rows):
        return False
    return all(type(pixel) is int and 0 <= pixel <= BRIGHTEST for row in rows for pixel in row)
