"""The Predictor of the test model: each instance is one number."""

import time
from pathlib import Path
from typing import Any

import torch

from model import restored


class Predictor:
    def __init__(self, folder: Path) -> None:
        self.model = restored(folder / "model.safetensors")
        if self.model.factor.item() < 0:
            raise ValueError("a negative factor is what the tests call a model that cannot be loaded")

    def decode(self, body: bytes, content_type: str) -> list[Any]:
        raise ValueError(f"{content_type} is not a number")

    def encode(self, instances: list[Any]) -> torch.Tensor:
        wrong = [index for index, instance in enumerate(instances) if not isinstance(instance, int | float)]
        if wrong:
            raise ValueError(f"instance {wrong[0]} is not a number")
        return torch.tensor(instances, dtype=torch.float32)

    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        if batch.max() > 1e6:
            time.sleep(batch.max().item() / 1e6)
        with torch.inference_mode():
            return [{"scaled": value} for value in self.model(batch).tolist()]
