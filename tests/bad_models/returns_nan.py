"""Gives probabilities that are no numbers."""

from typing import Any

import torch
from good import Predictor as Good


class Predictor(Good):
    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{**one, "probabilities": [float("nan")] * 4} for one in super().predict(batch)]
