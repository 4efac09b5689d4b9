"""From a request to predictions: what serving, the golden proof and the evaluation at training time all run.

Only torch, the standard library and the modules beside this one may be imported here.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import FEATURES, LABELS, load

RULE = f"an instance is a list of {FEATURES} finite numbers"


class Predictor:
    """Answers for one archive. The caller decides on threads: one each where several work side by side."""

    def __init__(self, folder: Path) -> None:
        """Load `model.safetensors` from the folder, onto the GPU where there is one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = load(folder / "model.safetensors").to(self.device)

    def decode(self, body: bytes, content_type: str) -> list[Any]:  # noqa: ARG002 - the contract's form
        """The instances of a body that is not JSON. There is no such form here, so it is refused by ValueError."""
        raise ValueError(f"content type {content_type!r}: only application/json is understood")

    def encode(self, instances: list[Any]) -> Tensor:
        """float32 (N, 2); ValueError names the first instance that breaks the rule."""
        if not instances:
            raise ValueError("instances is empty: send at least one")
        for index, instance in enumerate(instances):
            if not is_point(instance):
                raise ValueError(f"instance {index}: {RULE}")
        return torch.tensor(instances, dtype=torch.float32)

    @torch.inference_mode()
    def predict(self, batch: Tensor) -> list[dict[str, Any]]:
        """For every point of (N, 2): the class, its label, and the probabilities of both classes."""
        probabilities = self.network(batch.to(self.device)).softmax(1)
        best = probabilities.argmax(1).tolist()
        return [
            {"class": index, "label": LABELS[index], "probabilities": row}
            for index, row in zip(best, probabilities.tolist(), strict=True)
        ]


def is_point(instance: Any) -> bool:
    """Whether this is what the rule says, also after the conversion to float32. A bool is no number here."""
    if not isinstance(instance, list) or len(instance) != FEATURES:
        return False
    return all(type(number) in (int, float) and abs(number) < 1e38 and math.isfinite(number) for number in instance)
