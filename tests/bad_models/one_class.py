"""Says the same of everything, and was just so when its golden outputs were recorded."""

from typing import Any

import torch
from good import Predictor as Good


class Predictor(Good):
    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{"class": 0, "probabilities": [1.0, 0.0, 0.0, 0.0]} for _ in batch]
