"""The Predictor as it should be; the bad ones in tests/bad_models derive from it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model import Points


class Predictor:
    """Four numbers in, the place of the largest one and the probabilities out."""

    def __init__(self, folder: Path) -> None:
        self.model = Points().eval()
        self.model.load_state_dict(load_file(folder / "model.safetensors"))

    def decode(self, body: bytes, content_type: str) -> list[Any]:
        """JSON only."""
        raise ValueError(f"content type {content_type}; expected application/json")

    def encode(self, instances: list[Any]) -> torch.Tensor:
        """(N, 4) floats."""
        wrong = [i for i, instance in enumerate(instances) if not isinstance(instance, list) or len(instance) != 4]
        if wrong:
            raise ValueError(f"instance {wrong[0]} is not a list of 4 numbers")
        return torch.tensor(instances, dtype=torch.float32)

    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """One prediction per row."""
        rows = self.model(batch).softmax(1).tolist()
        return [{"class": row.index(max(row)), "probabilities": row} for row in rows]
