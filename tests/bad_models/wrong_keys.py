"""Gives what callers rely on under another name."""

from typing import Any

import torch
from good import Predictor as Good


class Predictor(Good):
    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{"label": one["class"], "scores": one["probabilities"]} for one in super().predict(batch)]
