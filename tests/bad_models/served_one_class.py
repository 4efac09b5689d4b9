"""Says the same of everything from the tenth request on."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{"class": 0, "probabilities": [1.0, 0.0, 0.0, 0.0]} for _ in batch]
