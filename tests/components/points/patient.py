"""Right, and takes as many seconds as a caller's first number is above a thousand."""

import time
from typing import Any

import torch
from good import Predictor as Good


class Predictor(Good):
    """What the good one answers, later."""

    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """One prediction per row."""
        time.sleep(max(0.0, batch[:, 0].max().item() - 1000))
        return super().predict(batch)
