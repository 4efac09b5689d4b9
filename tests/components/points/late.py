"""Predictors that are good wherever they are tried out, and turn bad where they serve."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from good import Predictor as Good

SERVED = "TORCHRELAY_INSTANCE" in os.environ


class Late(Good):
    """Good for `good_calls` forward passes and for `good_s` seconds after that; then `spoilt` answers."""

    good_calls, good_s = 10, 0.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.calls, self.since = 0, float("inf")

    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """What the good one answers, or `spoilt`."""
        self.calls += 1
        if self.calls == self.good_calls:
            self.since = time.monotonic()
        if SERVED and time.monotonic() > self.since + self.good_s:
            return self.spoilt(batch)
        return self.answers(batch)

    def answers(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """What the good one answers."""
        return super().predict(batch)

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """What is wrong with it."""
        raise NotImplementedError
