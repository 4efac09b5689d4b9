"""Raises where the first number is small, as in one request of six."""

from typing import Any

import torch
from good import Predictor as Good


class Predictor(Good):
    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        if (batch[:, 0] < -1).any():
            raise ValueError("too small")
        return super().predict(batch)
