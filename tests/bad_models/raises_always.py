"""Raises on every request."""

from typing import Any

import torch
from good import Predictor as Good


class Predictor(Good):
    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        raise RuntimeError("never")
