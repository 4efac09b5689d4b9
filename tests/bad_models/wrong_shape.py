"""Gives three probabilities of four classes."""

from typing import Any

import torch
from good import Predictor as Good


class Predictor(Good):
    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{**one, "probabilities": one["probabilities"][:3]} for one in super().predict(batch)]
