"""Says the same of everything once it was told to."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    when_told = True

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{"class": 0, "probabilities": [1.0, 0.0, 0.0, 0.0]} for _ in batch]
